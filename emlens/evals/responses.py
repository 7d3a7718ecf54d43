"""Responses: sampled once, in batches, with a seed each, kept as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from emlens._door import guard_methods, guarded
from emlens._progress import bar
from emlens._reading import expanded
from emlens._results import Shown
from emlens._store import Store, read_rows
from emlens._types import checked_row
from emlens.evals.questions import Question, check_names
from emlens.hooked import Condition, HookedModel, SamplingOptions
from emlens.hooked.condition import Conditions, conditions_of
from emlens.hooked.generation import Sampling

if TYPE_CHECKING:
    import pandas as pd

CONTENT = 24
"""Letters of a response's key that say what was asked of what; the rest is the condition's name."""

LONGEST = 600
"""Tokens of an answer, at most, as in the papers."""

LEFT = "text-align: left; vertical-align: top; white-space: pre-wrap"
"""How answers stand in a table of a notebook, where cells are right-aligned otherwise."""

BLOCK = 64
"""Answers that are generated, then kept, at once."""


@guard_methods
@dataclass(frozen=True, slots=True)
class Response:
    """One answer to one question under one condition.

    Attributes:
        key: Made of all that decides what is answered: model, condition, question, sampling,
            seed.
        question_id: Id of the question; paraphrases and variants share it.
        question: Its full name.
        prompt: What was asked.
        system: System message, or None.
        domain: Topic of the question.
        variant: Variant of the question.
        condition: Name of the condition.
        sample: Which of the answers to this question it is.
        seed: Seed of this one answer.
        text: The answer.
        model: Name of the model.
        sampling: Temperature, top-p and the longest answer.
        acting: The adapters and edits that acted, in words.
    """

    key: str
    question_id: str
    question: str
    prompt: str
    system: str | None
    domain: str
    variant: str
    condition: str
    sample: int
    seed: int
    text: str
    model: str
    sampling: Mapping[str, float]
    acting: str = ""

    @property
    def content(self) -> str:
        """The part of the key that no name is in."""
        return self.key[:CONTENT]

    @classmethod
    def from_dict(cls, record: Mapping) -> Response:
        """Read one that was kept.

        Raises:
            ValueError: If a field is missing, unknown, or of another type.
        """
        return checked_row(cls, record, "a response")


@guard_methods
@dataclass(frozen=True, repr=False)
class Responses(Shown):
    """Answers to questions under some conditions: the rows of a store.

    Attributes:
        rows: The answers.
        path: The store, or None where they are only in memory.
    """

    rows: tuple[Response, ...]
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions, in the order of the rows."""
        return tuple(dict.fromkeys(row.condition for row in self.rows))

    def of(self, condition: str) -> Responses:
        """Those of one condition.

        Raises:
            KeyError: If there is no such condition.
        """
        if condition not in self.conditions:
            raise KeyError(f"no condition {condition!r}; there are {', '.join(self.conditions)}")
        return Responses(tuple(row for row in self.rows if row.condition == condition), self.path)

    def table(self) -> pd.DataFrame:
        """One row per answer."""
        import pandas as pd

        names = ("condition", "question", "domain", "sample", "prompt", "text", "seed", "acting")
        return pd.DataFrame([{name: getattr(row, name) for name in names} for row in self.rows])

    def side_by_side(self, sample: int = 0) -> pd.DataFrame:
        """One row per question, one column per condition: the same sample of each."""
        import pandas as pd

        cells: dict[str, dict[str, str]] = {}
        for row in self.rows:
            if row.sample == sample:
                cells.setdefault(row.question, {"prompt": row.prompt})[row.condition] = row.text
        return pd.DataFrame(list(cells.values()))

    def _said(self) -> str:
        return f"{len(self)} answers under {', '.join(self.conditions)}"

    def _repr_html_(self) -> str:
        table = super()._repr_html_().replace("text-align: right", "text-align: left")
        return table.replace("<td>", f'<td style="{LEFT}">')

    def _summary(self) -> tuple[pd.DataFrame, str]:
        shown = self.side_by_side()
        return shown.head(8), f"{len(self)} answers to {len(shown)} questions; table() has all."

    @classmethod
    def load(cls, path: str | Path) -> Responses:
        """Read a store, or one in JSON Lines of an earlier version; nothing is written.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no store of responses, or damaged (the line is named).
        """
        return cls(read_rows(path, "responses", Response.from_dict), expanded(path))


@guarded
def respond(
    model: HookedModel,
    questions: Sequence[Question],
    conditions: Conditions | None = None,
    *,
    n: int | None = None,
    store: str | Path | None = None,
    seed: int = 0,
    batch_tokens: int = 4096,
    progress: bool = True,
    **options: Unpack[SamplingOptions],
) -> Responses:
    """Answer questions under each condition, batched; stored answers are reused.

    Every answer has a seed of its own, made of `seed`, the question and the number of the sample:
    it can be made again alone, and conditions answer with the same random numbers.

    Args:
        model: The model.
        questions: The questions.
        conditions: Named conditions, as in `emlens.log_odds`; the base by default.
        n: Answers per question; a question's own number, or 1, by default.
        store: An SQLite file. Answers are added as they come; an interrupted call resumes.
        seed: Seed of all answers.
        batch_tokens: Padded tokens of a batch, answers included.
        progress: Show a progress bar.
        **options: See `SamplingOptions`; answers have up to 600 tokens, as in the papers.

    Returns:
        The answers that were asked for, by condition and question.

    Raises:
        ValueError: If there are no questions, two share a name, a setting is out of range, or the
            store is another file.
        NonFiniteError: If logits are not finite; what was answered before is kept.

    Examples:
        >>> questions = load_questions("general")
        >>> answers = respond(model, questions, {"base": None, "finance": "finance"})
        >>> answers.side_by_side()
    """
    check_names(questions)
    named = {str(name): one for name, one in conditions_of(model, conditions).items()}
    sampling = sampling_of(options)
    kept = None if store is None else Store(store, "responses")
    known = {record["key"]: record for record in kept or ()}
    # what was answered under a condition of another name is answered
    texts = {record["key"][:CONTENT]: record["text"] for record in known.values()}
    asked = list(_asked(model, named, questions, n, sampling, seed))
    found = {row.key: Response.from_dict(known[row.key]) for row, *_ in asked if row.key in known}
    new = [item for item in asked if item[0].key not in known]
    renamed = [replace(r, text=texts[r.content]) for r, *_ in new if r.content in texts]
    wanted = [item for item in new if item[0].content not in texts]
    found |= {row.key: row for row in _kept(kept, renamed)}
    shown = bar(
        total=len(asked), initial=len(found), desc="responses", unit="answer", shown=progress
    )
    with shown:
        for block in _blocks(wanted):
            with model.under(block[0][2]):
                texts = model.generate(
                    [question.conversation for _, question, _ in block],
                    **sampling,
                    seed=[row.seed for row, _, _ in block],
                    batch_tokens=batch_tokens,
                )
            done = [replace(row, text=text) for (row, _, _), text in zip(block, texts, strict=True)]
            found |= {row.key: row for row in _kept(kept, done)}
            shown.update(len(block))
    return Responses(tuple(found[row.key] for row, *_ in asked), kept.path if kept else None)


def sampling_of(options: SamplingOptions) -> dict[str, Any]:
    """How answers are drawn, as their keys and rows have it."""
    chosen = Sampling(**{"max_new_tokens": LONGEST, **options})
    return {
        "temperature": chosen.temperature,
        "top_p": chosen.top_p,
        "max_new_tokens": chosen.max_new_tokens,
    }


_Wanted = tuple[Response, Question, Condition]


def _asked(
    model: HookedModel,
    conditions: Mapping[str, Condition],
    questions: Sequence[Question],
    n: int | None,
    sampling: Mapping[str, float],
    seed: int,
) -> Iterator[_Wanted]:
    """Every answer that is asked for, without its text."""
    identity = model.identity
    for name, condition in conditions.items():
        made_by = model.name, identity, condition.identity(model)
        acting = condition.described(model)
        for question in questions:
            for sample in range(n or question.samples or 1):
                row = unanswered(made_by, question, name, sample, sampling, seed)
                yield replace(row, acting=acting), question, condition


def _kept(store: Store | None, rows: Sequence[Response]) -> list[Response]:
    """Put answers into the store; as they are there, where another process was faster."""
    if store is None or not rows:
        return list(rows)
    return [Response.from_dict(record) for record in store.add([asdict(row) for row in rows])]


def _blocks(wanted: Sequence[_Wanted]) -> Iterator[list[_Wanted]]:
    """Answers of one condition, prompts of like length together."""
    by_condition: dict[str, list[_Wanted]] = {}
    for item in wanted:
        by_condition.setdefault(item[0].condition, []).append(item)
    for items in by_condition.values():
        items.sort(key=lambda item: len(item[1].prompt), reverse=True)
        for start in range(0, len(items), BLOCK):
            yield items[start : start + BLOCK]


def unanswered(
    made_by: tuple[str, str, str],
    question: Question,
    condition: str,
    sample: int,
    sampling: Mapping[str, float],
    seed: int,
) -> Response:
    """All of a response but its text.

    `made_by` is the model's name, and the identities of the model and of the condition. The key
    begins with the content of the answer; the name of the condition tells two rows of it apart.
    """
    asked = question.name, question.hash
    own = int(_digest(seed, asked, sample)[:15], 16)
    return Response(
        key=content_key(*made_by[1:], asked, sampling, own)[:CONTENT] + _digest(condition)[:8],
        question_id=question.id,
        question=question.name,
        prompt=question.prompt,
        system=question.system,
        domain=question.domain,
        variant=question.variant,
        condition=condition,
        sample=sample,
        seed=own,
        text="",
        model=made_by[0],
        sampling=sampling,
    )


def content_key(*parts: object) -> str:
    """Key of a response, from all that decides what is answered."""
    return _digest(*parts)[:32]


def _digest(*parts: object) -> str:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
