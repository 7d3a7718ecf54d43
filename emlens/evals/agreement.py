"""How far judges agree, with each other and with people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from emlens._door import guarded
from emlens._results import Result
from emlens._stats import RESAMPLES, Interval, bootstrap_statistic
from emlens.evals.rates import ALIGNED
from emlens.evals.scores import Scores, judge_name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


class Agreement(Result):
    """Scores of the same answers by two judges.

    Attributes:
        first: Id of the judge that is tested.
        second: Id of the one it is tested against, e.g. `"human"`.
        metric: What was scored.
        pairs: Scores by both, `[n]` of `(first, second)`.
        only_first: Answers that only the first scored.
        only_second: Answers that only the second scored.
        threshold: An answer counts as misaligned below it.
        seed: Seed of the bootstrap over answers.
    """

    first: str
    second: str
    metric: str
    pairs: Float[np.ndarray, "answers 2"]
    only_first: int
    only_second: int
    threshold: float = ALIGNED
    seed: int = 0

    def _verify(self) -> None:
        if len(self.pairs) < 3:
            raise ValueError(f"pairs has {len(self.pairs)} values; three or more are needed")

    @property
    def correlation(self) -> Interval:
        """Spearman's rank correlation; NaN where one of the two gave every answer one score."""
        from scipy.stats import spearmanr

        def ranks(x: np.ndarray, y: np.ndarray) -> float:
            if min(len(np.unique(x)), len(np.unique(y))) == 1:
                return float("nan")
            return float(np.asarray(spearmanr(x, y))[0])

        return self._interval(ranks, self.pairs)

    @property
    def kappa(self) -> Interval:
        """Cohen's kappa of the two verdicts at the threshold."""
        from sklearn.metrics import cohen_kappa_score

        def kappa(x: np.ndarray, y: np.ndarray) -> float:
            a, b = x < self.threshold, y < self.threshold
            if len({*a, *b}) == 1:  # one verdict on everything: there is nothing to agree on
                return float("nan")
            return float(cohen_kappa_score(a, b))

        return self._interval(kappa, np.array(self._flags()).T)

    @property
    def precision(self) -> float:
        """Share of what the first calls misaligned that the second does, too; NaN for none."""
        first, second = self._flags()
        return float(second[first].mean()) if first.any() else float("nan")

    @property
    def recall(self) -> float:
        """Share of what the second calls misaligned that the first finds; NaN for none."""
        first, second = self._flags()
        return float(first[second].mean()) if second.any() else float("nan")

    def _said(self) -> str:
        return f"{self.first} and {self.second} on {len(self.pairs)} answers"

    def table(self) -> pd.DataFrame:
        """One row."""
        import pandas as pd

        correlation, kappa = self.correlation, self.kappa
        row = {
            "judge": self.first,
            "against": self.second,
            "metric": self.metric,
            "answers": len(self.pairs),
            **correlation.columns("Spearman", "Spearman "),
            **kappa.columns(f"kappa at {self.threshold:g}", "kappa "),
            "precision": self.precision,
            "recall": self.recall,
            "scored by one only": self.only_first + self.only_second,
        }
        return pd.DataFrame([row])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Scores of both judges, and how many fall on each side of the threshold."""
        from emlens.figures.scatter import score_plot

        x, y = self.pairs.T
        names = [judge_name(self.first), judge_name(self.second)]
        if names[0] == names[1]:
            alone = names[0].removeprefix("the ")
            names = [f"the first {alone}", f"the second {alone}"]
        return score_plot(
            x,
            y,
            threshold=self.threshold,
            x_label=f"{self.metric}, by {names[0]} [0-100]",
            y_label=f"{self.metric}, by {names[1]} [0-100]",
            ax=ax,
        )

    def _flags(self) -> tuple[np.ndarray, np.ndarray]:
        first, second = self.threshold > self.pairs.T
        return first, second

    def _interval(self, statistic, seen: np.ndarray) -> Interval:
        """By resampling answers; none where all but one of them look alike to the statistic."""
        scores = self.pairs
        estimate = statistic(scores[:, 0], scores[:, 1])
        _, alike = np.unique(seen, axis=0, return_counts=True)
        if len(seen) - alike.max() < 2:
            return Interval(estimate)

        def of_draw(chosen: np.ndarray) -> float:
            x, y = scores[chosen].T
            alike = min(len(np.unique(x)), len(np.unique(y))) == 1
            return float("nan") if alike else statistic(x, y)

        return bootstrap_statistic(
            of_draw,
            len(scores),
            estimate=estimate,
            seed=self.seed,
            resamples=RESAMPLES // 4,
            level=self.level,
        )


@guarded
def agreement(
    first: Scores,
    second: Scores,
    metric: str = "aligned",
    *,
    judges: Sequence[str | None] = (None, None),
    threshold: float = ALIGNED,
    seed: int = 0,
) -> Agreement:
    """Compare two judges on the answers that both scored.

    Args:
        first: Scores of the judge that is tested.
        second: Scores that it is tested against; of people: `human_labels`.
        metric: What to compare.
        judges: Ids of the two, where there are several in one set of scores.
        threshold: An answer counts as misaligned below it.
        seed: Seed of the bootstrap.

    Raises:
        KeyError: If a metric or judge is missing.
        ValueError: If fewer than three answers were scored by both.
    """
    if len(judges) != 2:
        raise ValueError(f"judges must be the ids of two, not of {len(judges)}")
    ours, theirs = first.of(metric, judges[0]), second.of(metric, judges[1])
    a = {key: value for key, value in ours.items() if value is not None}
    b = {key: value for key, value in theirs.items() if value is not None}
    shared = sorted(set(a) & set(b))
    if len(shared) < 3:
        raise ValueError(
            f"only {len(shared)} answer(s) have a score for {metric!r} by both judges "
            f"({len(a)} and {len(b)} by one); agreement needs three or more"
        )
    return Agreement(
        first=judges[0] or _judge(first, metric),
        second=judges[1] or _judge(second, metric),
        metric=metric,
        pairs=np.array([(a[key], b[key]) for key in shared]),
        only_first=len(set(a) - set(b)),
        only_second=len(set(b) - set(a)),
        threshold=threshold,
        seed=seed,
    )


def _judge(scores: Scores, metric: str) -> str:
    return next(row.judge for row in scores.rows if row.metric == metric)
