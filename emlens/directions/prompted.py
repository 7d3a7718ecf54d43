"""Directions from system prompts that ask for a trait or its opposite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from emlens._door import guarded
from emlens.directions.build import difference, provenance, read_sides
from emlens.directions.counting import Counting, CountingOptions
from emlens.directions.direction import Directions
from emlens.hooked import HookedModel
from emlens.hooked.sites import Layers, SiteName
from emlens.text import Conversation


@guarded
def system_prompt_diff(
    model: HookedModel,
    questions: Sequence[str],
    trait: Sequence[str],
    opposite: Sequence[str],
    *,
    max_new_tokens: int = 96,
    temperature: float = 1.0,
    site: SiteName = "resid_post",
    layers: Layers = "all",
    **options: Unpack[CountingOptions],
) -> Directions:
    """Return the mean difference between answers under trait and under opposite system prompts.

    The persona-vector construction (arXiv 2507.21509): the model answers every question under
    every system prompt, and its own answers are read, system prompt included, over the response
    tokens. Answers are not judged; the first of each side are kept as `answers` in the provenance's
    settings, to check that the prompts worked.

    Args:
        model: The model that answers and is read.
        questions: User prompts.
        trait: System prompts that ask for the trait.
        opposite: System prompts that ask for its opposite.
        max_new_tokens: Longest answer.
        temperature: Sampling temperature; 0 is greedy.
        site: Where in each block.
        layers: Layers to read.
        **options: See `CountingOptions`; `seed` also seeds the sampling.

    Raises:
        ValueError: If there are no questions or prompts, or every answer of a side is empty.
    """
    counting = Counting(**options)
    sides = []
    for label, prompts in (("trait", trait), ("opposite", opposite)):
        asked = [_asked(system, question) for system in prompts for question in questions]
        answers = model.generate(
            asked,
            counting.edits,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=counting.seed,
            batch_tokens=2 * counting.token_budget,
        )
        said = [
            Conversation((*item.messages, {"role": "assistant", "content": answer}))
            for item, answer in zip(asked, answers, strict=True)
            if answer.strip()
        ]
        if not said:
            raise ValueError(f"every answer under the {label} system prompts is empty")
        sides.append(said)
    reader, readings = read_sides(model, sides[0], sides[1], site, layers, counting)
    made = provenance("system-prompt-diff", model, counting, positive=sides[0], negative=sides[1])
    made = made.with_settings(
        {
            "system prompts": {"trait": list(trait), "opposite": list(opposite)},
            "answers": [side[0].messages[-1]["content"] for side in sides],
        }
    )
    # one question under all prompts is one group: its answers are never on both sides of a split
    groups = [[_question(item) for item in side] for side in sides]
    return difference(reader, *readings, made, (groups[0], groups[1]))


def _asked(system: str, question: str) -> Conversation:
    return Conversation(
        ({"role": "system", "content": system}, {"role": "user", "content": question})
    )


def _question(conversation: Conversation) -> str:
    return next(m["content"] for m in conversation.messages if m["role"] == "user")
