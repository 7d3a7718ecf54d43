"""Responses of a model elsewhere: an OpenAI-compatible server, or any provider of Inspect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from emlens._door import guarded
from emlens._progress import bar
from emlens._store import Store
from emlens.evals._inspect import InspectModel, need_inspect, run, said
from emlens.evals.questions import Question, check_names
from emlens.evals.responses import Response, Responses, sampling_of, unanswered
from emlens.hooked import SamplingOptions

if TYPE_CHECKING:
    from inspect_ai.model import Model

SEEDS = 2**31
"""Providers take seeds of 32 bits."""


@guarded
def respond_served(
    model: str | Model,
    questions: Sequence[Question],
    condition: str = "served",
    *,
    n: int | None = None,
    store: str | Path | None = None,
    seed: int = 0,
    at_once: int = 16,
    config: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    progress: bool = True,
    **options: Unpack[SamplingOptions],
) -> Responses:
    """Answer questions with a model that Inspect reaches; stored answers are reused.

    Answers are kept as they come, in the same form as those of `respond`, and are judged and
    counted alike. Each is asked for with a seed of its own; whether the same seed gives the same
    answer again is up to the server.

    Args:
        model: Name of a model as Inspect has it (`"openai-api/local/qwen"` for a server of one's
            own, `"vllm/..."`, `"openai/gpt-4o"`), or a model of Inspect.
        questions: The questions.
        condition: What these answers are called in tables. It is part of an answer's key, as are
            the address, `config` and `model_args` without keys.
        n: Answers per question; a question's own number, or 1, by default.
        store: An SQLite file. Answers are added as they come; an interrupted call resumes.
        seed: Seed of all answers.
        at_once: Requests under way at the same time.
        config: Further settings of Inspect's `GenerateConfig`: `max_retries`, `timeout`, or
            `{"extra_body": to_vllm_lens(edits)}`.
        model_args: Arguments of Inspect's `get_model`: `base_url`, `api_key`, and the provider's.
        progress: Show a progress bar.
        **options: See `SamplingOptions`; answers have up to 600 tokens, as in the papers.

    Returns:
        The answers that were asked for, by question.

    Raises:
        ImportError: If Inspect is not installed.
        ValueError: If there are no questions, two share a name, or a setting is out of range.
        ConnectionError: If an answer cannot be had, after Inspect's retries; the others are kept.

    Examples:
        >>> respond_served(
        ...     "openai-api/local/qwen",
        ...     questions,
        ...     n=50,
        ...     model_args={"base_url": "http://localhost:8000/v1"},
        ... )
    """
    need_inspect("respond_served")
    check_names(questions)
    reached = InspectModel(model, config, model_args, at_once)
    sampling = sampling_of(options)
    kept = None if store is None else Store(store, "responses")
    known = {record["key"]: record for record in kept or ()}
    found: dict[str, Response] = {}
    wanted: list[Response] = []
    order: list[str] = []
    for question in questions:
        for sample in range(n or question.samples or 1):
            made_by = reached.name, reached.identity, "served"
            row = unanswered(made_by, question, condition, sample, sampling, seed)
            order.append(row.key)
            if row.key in known:
                found[row.key] = Response.from_dict(known[row.key])
            else:
                wanted.append(row)

    async def ask(model: Model, row: Response) -> None:
        done = replace(row, text=await _answer(model, row))
        if kept is not None:
            done = Response.from_dict(*kept.add([asdict(done)]))
        found[row.key] = done
        shown.update()

    shown = bar(
        total=len(order), initial=len(found), desc="responses", unit="answer", shown=progress
    )
    with shown:
        run(reached.each(wanted, ask, "what was answered before"))
    return Responses(tuple(found[key] for key in order), None if kept is None else kept.path)


async def _answer(model: Model, row: Response) -> str:
    from inspect_ai.model import ChatMessage, ChatMessageSystem, ChatMessageUser, GenerateConfig

    asked: list[ChatMessage] = [ChatMessageUser(content=row.prompt)]
    if row.system is not None:
        asked.insert(0, ChatMessageSystem(content=row.system))
    settings = GenerateConfig(
        temperature=row.sampling["temperature"],
        top_p=row.sampling["top_p"],
        max_tokens=int(row.sampling["max_new_tokens"]),
        seed=row.seed % SEEDS,
    )
    reply = await model.generate(asked, config=settings)
    if not reply.choices:
        raise ValueError(f"the reply has no answer in it ({reply.error or 'no reason given'})")
    return said(reply.message)
