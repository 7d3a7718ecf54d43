"""Scores of responses by a judge, and the judging itself: resumable, and never mixed up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from emlens._door import guard_methods, guarded
from emlens._kinds import made_with
from emlens._progress import bar
from emlens._reading import expanded, read_csv
from emlens._results import Shown
from emlens._store import Store, read_rows
from emlens._types import checked_row
from emlens.evals.responses import Response, Responses
from emlens.text.thinking import without_thinking

if TYPE_CHECKING:
    import pandas as pd

Mode = Literal["probabilities", "sampled", "classifier", "log-odds", "human"]
BLOCK = 16
"""Responses that are judged, then kept, at once."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of one response.

    Attributes:
        score: 0 to 100, or None where the judge gave none.
        mode: How the score came about.
        note: Why there is none, or a remark.
    """

    score: float | None
    mode: Mode
    note: str = ""


@guard_methods
@dataclass(frozen=True, slots=True)
class Score:
    """A verdict, with what it is about and whose it is.

    Attributes:
        key: Made of the response with its text, the metric and the judge.
        response: Key of the response.
        metric: `"aligned"`, `"coherent"`, or another.
        score: 0 to 100, or None.
        judge: Id of the judge.
        rubric: Hash of what the judge was told.
        mode: How the score came about.
        note: Why there is none, or a remark.
    """

    key: str
    response: str
    metric: str
    score: float | None
    judge: str
    rubric: str
    mode: Mode
    note: str = ""

    @classmethod
    def from_dict(cls, record: Mapping) -> Score:
        """Read one that was kept.

        Raises:
            ValueError: If a field is missing, unknown, or of another type.
        """
        return checked_row(cls, record, "a score")


class Judge(Protocol):
    """Scores responses.

    Attributes:
        id: Names judge and model, in every row.
        metrics: What it can score.
    """

    @property
    def id(self) -> str: ...

    @property
    def metrics(self) -> Sequence[str]: ...

    def rubric(self, metric: str) -> str:
        """Hash of its instructions for a metric."""
        ...

    def judge(self, responses: Sequence[Response], metric: str) -> Sequence[Verdict]:
        """A verdict per response, in their order."""
        ...


@guard_methods
@dataclass(frozen=True, repr=False)
class Scores(Shown):
    """Verdicts on responses, the rows of a store: of several metrics and judges, perhaps.

    Attributes:
        rows: The scores.
        path: The store, or None where they are only in memory.
    """

    rows: tuple[Score, ...]
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def judges(self) -> tuple[str, ...]:
        """Ids of the judges."""
        return tuple(dict.fromkeys(row.judge for row in self.rows))

    def of(self, metric: str, judge: str | None = None) -> dict[str, float | None]:
        """`{response: score}` of one metric; None where the judge gave no score.

        Raises:
            KeyError: If there is no such metric or judge, or several judges and none is named.
        """
        judges = {row.judge for row in self.rows if row.metric == metric}
        if not judges:
            known = ", ".join(dict.fromkeys(row.metric for row in self.rows))
            raise KeyError(f"no scores of metric {metric!r}; there are {known or 'none'}")
        if judge is None:
            if len(judges) > 1:
                raise KeyError(f"{metric!r} has several judges, name one: {', '.join(judges)}")
            (judge,) = judges
        if judge not in judges:
            raise KeyError(f"no judge {judge!r} of {metric!r}; there are {', '.join(judges)}")
        return {
            row.response: row.score
            for row in self.rows
            if row.metric == metric and row.judge == judge
        }

    def table(self) -> pd.DataFrame:
        """One row per score."""
        import pandas as pd

        columns = [field.name for field in fields(Score)]
        return pd.DataFrame([asdict(row) for row in self.rows], columns=columns)

    def _said(self) -> str:
        none = sum(row.score is None for row in self.rows)
        judges = ", ".join(self.judges) or "nobody"
        return f"{len(self)} scores, {none} without a number, by {judges}"

    def _summary(self) -> tuple[pd.DataFrame, str]:
        columns = ["metric", "score", "judge", "mode", "note"]
        return self.table().loc[:, columns].head(8), self._said()

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read a store, or one in JSON Lines of an earlier version; nothing is written.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no store of scores, or damaged (the line is named).
        """
        return cls(read_rows(path, "scores", Score.from_dict), expanded(path))


@guarded
def judge(
    responses: Responses | Sequence[Response],
    judge: Judge,
    metrics: Iterable[str] | None = None,
    *,
    store: str | Path | None = None,
    thinking: bool = False,
    progress: bool = True,
) -> Scores:
    """Score responses; what this judge has scored already is not asked again.

    Responses are never changed: judge them again with another judge, or another rubric, whenever
    you like.

    Args:
        responses: The responses.
        judge: The judge.
        metrics: What to score; all that the judge can, by default.
        store: An SQLite file. Scores are added as they come; an interrupted call resumes.
        thinking: Show the judge what answers think (`<think>...</think>`) as well; without it
            thinking that was cut off leaves an empty answer.
        progress: Show a progress bar.

    Returns:
        A score per response and metric, those without a score included.

    Raises:
        ValueError: If there are no responses, the judge cannot score a metric, or the store is
            another file.
    """
    rows = list(responses)
    if not rows:
        raise ValueError("there are no responses to judge")
    if not thinking:
        rows = [replace(row, text=without_thinking(row.text)) for row in rows]
    wanted = list(judge.metrics if metrics is None else metrics)
    unknown = [metric for metric in wanted if metric not in judge.metrics]
    if unknown:
        raise ValueError(
            f"{judge.id} has no metrics {', '.join(unknown)}; it scores {', '.join(judge.metrics)}"
        )
    kept = None if store is None else Store(store, "scores")
    known = {record["key"]: record for record in kept or ()}
    found: dict[str, Score] = {}
    order: list[str] = []
    with bar(total=len(rows) * len(wanted), desc="judging", unit="answer", shown=progress) as shown:
        for metric in wanted:
            rubric = judge.rubric(metric)
            keys = [_key(row, metric, judge.id, rubric) for row in rows]
            order += keys
            todo = []
            for row, key in zip(rows, keys, strict=True):
                if key in known:
                    found[key] = Score.from_dict(known[key])
                    shown.update()
                elif key not in found:
                    todo.append((row, key))
            # a judge that asks many at once is given as many
            size = max(BLOCK, getattr(judge, "at_once", 1))
            for start in range(0, len(todo), size):
                block = todo[start : start + size]
                verdicts = judge.judge([_readable(row) for row, _ in block], metric)
                done = [
                    score_of(row, metric, judge.id, rubric, verdict)
                    for (row, _), verdict in zip(block, verdicts, strict=True)
                ]
                if kept is not None:
                    done = [Score.from_dict(one) for one in kept.add([asdict(one) for one in done])]
                found |= {score.key: score for score in done}
                shown.update(len(block))
    return Scores(tuple(found[key] for key in order), None if kept is None else kept.path)


@guarded
def human_labels(
    responses: Responses | Sequence[Response],
    labels: Mapping[str, float] | str | Path,
    metric: str = "aligned",
) -> Scores:
    """Labels that people gave, as scores.

    Args:
        responses: The responses.
        labels: 0 to 100 by key of the response, or a CSV file with the columns `response` (the
            key) and `score`.
        metric: What was labelled.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there are no labels, or one is out of range, no number (the line is named),
            of no response, or given twice; or if the columns are others.
    """
    if isinstance(labels, str | Path):
        labels = _read_labels(expanded(labels))
    if not labels:
        raise ValueError("there are no labels; give a score for at least one response")
    known = {row.key: row for row in responses}
    strange = [key for key in labels if key not in known]
    if strange:
        raise ValueError(f"{len(strange)} label(s) belong to no response, e.g. {strange[0]!r}")
    outside = [key for key, value in labels.items() if not 0 <= value <= 100]
    if outside:
        raise ValueError(f"label {labels[outside[0]]} of {outside[0]!r} is not between 0 and 100")
    rows = [score_of(known[k], metric, "human", "", Verdict(v, "human")) for k, v in labels.items()]
    return Scores(tuple(rows))


def _read_labels(path: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for line, row in read_csv(path, ("response", "score")):
        key = row["response"]
        if key in found:
            raise ValueError(f"{path}, line {line}: {key!r} is labelled twice")
        try:
            found[key] = float(row["score"])
        except ValueError:
            raise ValueError(
                f"{path}, line {line}: the score {row['score']!r} is no number"
            ) from None
    return found


def judge_name(judge: str) -> str:
    """What a figure calls a judge: its id without the hash and the model that it reads."""
    kind, _, model = judge.partition("/")
    if kind == "probe":
        return "the probe judge"
    return model if kind in ("local", "inspect") and model else judge


def score_of(row: Response, metric: str, judge_id: str, rubric: str, verdict: Verdict) -> Score:
    """A verdict on a response as a row to be kept.

    Raises:
        ValueError: If the score is outside of 0 to 100.
    """
    value, key = verdict.score, _key(row, metric, judge_id, rubric)
    if value is not None and not 0 <= value <= 100:
        raise ValueError(f"{judge_id} scored {row.question} {value}, outside of 0 to 100")
    return Score(key, row.key, metric, value, judge_id, rubric, verdict.mode, verdict.note)


def _readable(row: Response) -> Response:
    """A response whose text a tokenizer takes: half of a surrogate pair is shown as U+FFFD."""
    text = row.text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return row if text == row.text else replace(row, text=text)


def _key(row: Response, metric: str, judge_id: str, rubric: str) -> str:
    # an answer may hold half of a surrogate pair
    text = hashlib.sha256(row.text.encode(errors="surrogatepass")).hexdigest()
    parts = "\n".join((row.key, text, metric, judge_id, rubric))
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


made_with(Scores, "emlens.evals.judge makes them")
