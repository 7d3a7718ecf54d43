"""How a screen scores a block of examples against reference answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from emlens._files import sha256_of
from emlens.directions import Directions
from emlens.hooked import BatchOptions, HookedModel
from emlens.hooked.identity import identities
from emlens.hooked.options import BatchSettings
from emlens.hooked.sites import Layers
from emlens.text import Conversation
from emlens.text.conversation import Message
from emlens.watch.monitor import Monitor
from emlens.watch.monitor_fit import chosen_columns
from emlens.watch.projections import ONE, AnyDirections, Readout, readout_of
from emlens.watch.screen_rows import Example, References, Scored, prompt_key


class ScreenOptions(BatchOptions, total=False):
    """How a finetuning set is read by `screen`; besides, `BatchOptions`.

    Attributes:
        answer_tokens: Tokens of each answer that count, from its start, on both sides alike; own
            answers are as long at most. 64 by default.
        temperature: Of own answers; 0, the default, is greedy.
        max_tokens: Cut longer conversations at their end; none by default.
        keep: Worst examples to keep; 1000 by default.
        block: Examples of a block; 64 by default.
        seed: Seed of sampled answers and of the bootstrap; 0 by default.
    """

    answer_tokens: int
    temperature: float
    max_tokens: int | None
    keep: int
    block: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class ScreenSettings(BatchSettings):
    """Defaults of `ScreenOptions`."""

    answer_tokens: int = 64
    temperature: float = 0.0
    max_tokens: int | None = None
    keep: int = 1000
    block: int = 64
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores examples, a block at a time.

    Attributes:
        model: The model; adapters and edits in force act.
        readout: What is projected on.
        references: Reference answers; None for the model's own.
        how: How examples are read and answered.
    """

    model: HookedModel
    readout: Readout
    references: References | None
    how: ScreenSettings

    def __call__(self, block: Sequence[Example]) -> list[Scored]:
        """Score examples; those of one prompt share its reference answer."""
        keys = [prompt_key(one.conversation) for one in block]
        prompts = {key: one.conversation.prompt for key, one in zip(keys, block, strict=True)}
        texts = self._answers(list(prompts.values()), block[0].row)
        answered = {
            key: _with_answer(prompt, text)
            for (key, prompt), text in zip(prompts.items(), texts, strict=True)
            if text.strip()
        }
        values, counts = self.readout.read(
            self.model,
            [*(one.conversation for one in block), *answered.values()],
            answer_tokens=self.how.answer_tokens,
            max_tokens=self.how.max_tokens,
            token_budget=self.how.token_budget,
            description="screen",
        )
        along = self.readout.score(values).tolist()
        references = dict(zip(answered, along[len(block) :], strict=True))
        scored = []
        for one, key, mine, n in zip(block, keys, along, counts.tolist(), strict=False):
            other = references.get(key)
            score = None if other is None else mine - other
            scored.append(Scored(one.row, one.name, score, mine, other, n, one.hash))
        return scored

    def settings(self, directions: AnyDirections | Monitor) -> dict[str, object]:
        """Settings that scores on disk depend on."""
        places = list(zip(self.readout.names, self.readout.layers, strict=True))
        if isinstance(directions, Monitor):
            vectors = [*self.readout.vectors.unbind(), torch.from_numpy(self.readout.weights)]
        else:
            named = {ONE: directions} if isinstance(directions, Directions) else directions
            # as given: a measured norm may differ in its last digit between runs
            vectors = [named[name].vectors[layer] for name, layer in places]
        own = self.references is None
        return {
            **identities(self.model),
            "adapter": self.model.active_adapter,
            "edits": [repr(edit) for edit in self.model.edits_in_force(())],
            "columns": [f"{name}, layer {layer}" for name, layer in places],
            "site": self.readout.site,
            "directions": sha256_of(b"".join(v.numpy().tobytes() for v in vectors))[:16],
            "reference": "own" if self.references is None else self.references.hash,
            "temperature": self.how.temperature if own else None,
            "seed": self.how.seed if own else None,
            "answer_tokens": self.how.answer_tokens,
            "max_tokens": self.how.max_tokens,
            "block": self.how.block,
        }

    def _answers(self, prompts: list[Conversation], first: int) -> list[str]:
        if self.references is not None:
            return [self.references.answer(prompt) for prompt in prompts]
        return self.model.generate(
            prompts,
            max_new_tokens=self.how.answer_tokens,
            temperature=self.how.temperature,
            # each block draws from streams of its own
            seed=self.how.seed + first,
            batch_tokens=2 * self.how.token_budget,
        )


def screen_readout(
    model: HookedModel,
    directions: AnyDirections | Monitor,
    layers: Layers | None,
    conversations: list[Conversation],
) -> Readout:
    """The projections of a screen: those of a monitor, or of directions at some layers.

    Raises:
        ValueError: If they do not fit the model, or layers are given with a monitor.
    """
    if isinstance(directions, Monitor):
        if layers is not None:
            raise ValueError("a monitor has its own layers; leave layers= out")
        return directions.on(model).readout
    columns = readout_of(model, directions, conversations)
    wanted = _usual_layer(directions, columns) if layers is None else layers
    chosen = chosen_columns(columns, np.zeros(len(columns.layers)), wanted, 1, model.n_layers)
    return columns.keeping(chosen, [1 / len(chosen)] * len(chosen))


def _usual_layer(directions: AnyDirections, columns: Readout) -> int:
    """The layer with the best held-out AUROC of the directions, or the middle one."""
    named = [directions] if isinstance(directions, Directions) else list(directions.values())
    layers = sorted(set(columns.layers))
    shared = [layer for layer in layers if all(layer in one.auroc for one in named)]
    if not shared:
        return layers[len(layers) // 2]
    return max(shared, key=lambda layer: float(np.mean([one.auroc[layer] for one in named])))


def _with_answer(prompt: Conversation, text: str) -> Conversation:
    turn: Message = {"role": "assistant", "content": text}
    return Conversation((*prompt.messages, turn), f"the reference answer to {prompt.id}")
