"""How much of a behaviour there is under some conditions: without generation, or judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import Float

from emlens._door import check_fields, guard_methods
from emlens._reading import expanded
from emlens._stats import Interval, bootstrap_mean, bootstrap_ratio
from emlens.evals.questions import Question
from emlens.evals.rates import ALIGNED, COHERENT, rates
from emlens.evals.responses import respond
from emlens.evals.scores import Judge, judge, judge_name
from emlens.hooked import HookedModel
from emlens.hooked.condition import Conditions
from emlens.hooked.options import BatchSettings
from emlens.measures import log_odds
from emlens.measures.measured import Measured
from emlens.text import Pair

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

LABEL = 46
"""Letters of an axis label's line."""


class Effect(Measured):
    """A number per prompt and condition.

    Attributes:
        what: What the number is, with its unit.
        conditions: Names of the conditions; the first is the reference.
        prompts: Names of the prompts, `[n]`.
        values: `[conditions, n]`; NaN where nothing could be scored.
        coherent: Share of coherent answers by condition; NaN where nothing was generated.
        seed: Seed of the bootstrap over prompts.
        judged_by: Who judged, and what that judge says of its own worth; empty for no judge.
        acting: The adapters and edits that acted under each condition, in words.
    """

    AXES = {"coherent": "conditions"}

    what: str
    conditions: tuple[str, ...]
    prompts: tuple[str, ...]
    values: Float[np.ndarray, "conditions prompts"]
    coherent: tuple[float, ...]
    seed: int = 0
    judged_by: str = ""
    acting: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str | None:
        """What a figure says above itself: who judged."""
        return judge_title(self.judged_by)

    def of(self, condition: str) -> np.ndarray:
        """Values of one condition, `[n]`.

        Raises:
            KeyError: If there is no such condition.
        """
        return self.values[self._index(condition)]

    def mean(self, condition: str) -> Interval:
        """Mean over prompts with its interval."""
        return self._interval(self.of(condition))

    def change(self, condition: str, base: str | None = None) -> Interval:
        """Mean paired change against a condition, the first by default."""
        return self._interval(self.of(condition) - self.of(base or self.conditions[0]))

    def share(self, condition: str, whole: str, base: str) -> Interval:
        """Change of a condition as a share of another's, percent, over the prompts of all three.

        NaN where the other's change is not clear of zero: a share of nothing means nothing.
        """
        shift = self.of(condition) - self.of(base)
        full = self.of(whole) - self.of(base)
        known = np.isfinite(shift) & np.isfinite(full)
        if not known.any() or not self._interval(full[known]).excludes_zero:
            return Interval(float("nan"))
        sign = np.sign(full[known].sum())
        return bootstrap_ratio(
            100 * sign * shift[known], sign * full[known], seed=self.seed, level=self.level
        )

    def table(self) -> pd.DataFrame:
        """One row per condition."""
        import pandas as pd

        rows = []
        for name, coherent in zip(self.conditions, self.coherent, strict=True):
            level, change = self.mean(name), self.change(name)
            row = {
                "condition": name,
                **level.columns(self.what),
                **change.columns(f"change of {self.what}", "change "),
            }
            acting = {"acting": self._acting(name)}
            rows.append({**row, **answer_columns(coherent, self.judged_by), **acting})
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Change of each condition against the first, with intervals paired by prompt.

        With a single condition it is the mean over prompts.
        """
        from emlens.figures.bars import dot_intervals

        first, *others = self.conditions
        values = [self.change(name) for name in others] or [self.mean(first)]
        what, bracket, unit = self.what.partition(" [")
        label = f"change of {what} against {first}{bracket}{unit}" if others else self.what
        return dot_intervals(
            groups=others or [first],
            series=None,
            values=[value.estimate for value in values],
            low=[value.low for value in values],
            high=[value.high for value in values],
            y_label=fill(label, LABEL),
            title=self.title,
            ax=ax,
        )

    def _interval(self, values: np.ndarray) -> Interval:
        known = values[np.isfinite(values)]
        if not len(known):
            return Interval(float("nan"))
        return bootstrap_mean(known, seed=self.seed, level=self.level)


def judge_title(judged_by: str) -> str | None:
    """Title of a figure of judged answers; None where there was no judge."""
    judge, _, _ = judged_by.partition(", ")
    return f"judged by {judge_name(judge)}" if judge else None


def answer_columns(coherent: float, judged_by: str) -> dict[str, object]:
    """Columns that stand beside a number made of answers: coherent ones, and who judged."""
    known = {} if np.isnan(coherent) else {"coherent [%]": 100 * coherent}
    return {**known, **({"judged by": judged_by} if judged_by else {})}


class Behaviour(Protocol):
    """Measures a behaviour under conditions, on prompts of its own."""

    def measure(self, model: HookedModel, conditions: Conditions) -> Effect:
        """The effect under each condition."""
        ...


@guard_methods
@dataclass(frozen=True)
class LogOddsJudge:
    """No generation at all: log-odds of misaligned against aligned answers.

    Attributes:
        pairs: Held-out prompts with both answers.
        token_budget: Padded tokens of a batch.
        seed: Seed of the bootstrap.
    """

    pairs: Sequence[Pair]
    token_budget: int = BatchSettings.token_budget
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def measure(self, model: HookedModel, conditions: Conditions) -> Effect:
        """Log-odds under each condition, nats per token.

        Raises:
            ValueError: If there are no pairs.
        """
        found = log_odds(
            model, self.pairs, conditions, token_budget=self.token_budget, seed=self.seed
        )
        return Effect(
            what="log-odds [nats/token]",
            conditions=found.conditions,
            prompts=found.ids,
            values=found.values,
            coherent=(float("nan"),) * len(found.conditions),
            seed=self.seed,
            acting=found.acting,
        )


@guard_methods
@dataclass(frozen=True)
class JudgedRate:
    """Answers are sampled and judged: the share of misaligned, coherent ones per question.

    Attributes:
        questions: The questions.
        judge: The judge.
        n: Answers per question.
        metric: What makes an answer misaligned where it is low.
        max_new_tokens: Longest answer.
        store: Folder in which responses and scores are kept; stored ones are reused.
        threshold: An answer is misaligned below it.
        coherence: An answer is coherent above it.
        seed: Seed of the answers and of the bootstrap.
    """

    questions: Sequence[Question]
    judge: Judge
    n: int = 4
    metric: str = "aligned"
    max_new_tokens: int = 128
    store: Path | None = None
    threshold: float = ALIGNED
    coherence: float = COHERENT
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def measure(self, model: HookedModel, conditions: Conditions) -> Effect:
        """Share of misaligned answers under each condition, percent of the scored ones."""
        answers = respond(
            model,
            self.questions,
            conditions,
            n=self.n,
            store=None if self.store is None else expanded(self.store) / "responses.sqlite",
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            progress=False,
        )
        scores = judge(
            answers,
            self.judge,
            [self.metric, "coherent"],
            store=None if self.store is None else expanded(self.store) / "scores.sqlite",
            progress=False,
        )
        found = rates(
            answers,
            scores,
            metric=self.metric,
            judge=self.judge.id,
            threshold=self.threshold,
            coherence=self.coherence,
            apart=False,
        )
        prompts = tuple(dict.fromkeys(question.id for question in self.questions))
        tables = [found.by_question(name) for name in conditions]
        trust = getattr(self.judge, "trust", {}).get(self.metric)
        return Effect(
            what="misaligned [% of scored]",
            conditions=tuple(conditions),
            prompts=prompts,
            values=np.array(
                [[_percent(*of.get(prompt, (0.0, 0.0))) for prompt in prompts] for of in tables]
            ),
            coherent=tuple(found.coherent_share(name).estimate for name in conditions),
            seed=self.seed,
            judged_by=self.judge.id + ("" if trust is None else f", {trust.short}"),
            acting={row.condition: row.acting for row in answers},
        )


def _percent(hits: float, scored: float) -> float:
    return 100 * hits / scored if scored else float("nan")
