"""How well a score tells two classes apart, and thresholds for it, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from emlens._results import Result
from emlens._stats import RESAMPLES, Interval, bootstrap_statistic

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Roc(Result):
    """The ROC curve of a score on held-out conversations.

    Attributes:
        false_alarms: Share of aligned conversations at or above each threshold, `[m]`.
        hits: Share of misaligned ones, `[m]`.
        thresholds: The thresholds, falling, `[m]`; the first is infinite.
        auroc: Area under the curve.
        low: Lower end of its 95% interval, by bootstrap over prompts.
        high: Its upper end.
        n_aligned: Aligned conversations.
        n_misaligned: Misaligned ones.
        operating: False alarms and hits at the monitor's threshold.
    """

    HOLDS_ENDS = True

    AXES = {"hits": "false_alarms", "thresholds": "false_alarms"}
    INFINITE = ("thresholds",)

    false_alarms: tuple[float, ...]
    hits: tuple[float, ...]
    thresholds: tuple[float, ...]
    auroc: float
    low: float
    high: float
    n_aligned: int
    n_misaligned: int
    operating: tuple[float, float]

    def _said(self) -> str:
        n = f"{self.n_misaligned} misaligned and {self.n_aligned} aligned"
        return f"AUROC {Interval(self.auroc, self.low, self.high):.3f} on {n}"

    def table(self) -> pd.DataFrame:
        """One row per threshold."""
        return pd.DataFrame(
            {"threshold": self.thresholds, "false alarms": self.false_alarms, "hits": self.hits}
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The curve, the diagonal that chance gives, and the threshold in use."""
        from emlens.figures import COLOURS
        from emlens.figures.lines import line_bands

        ax = line_bands(
            {"held-out": (self.false_alarms, self.hits)},
            x_label="false alarms [share of aligned]",
            y_label="hits [share of misaligned]",
            title=f"AUROC {Interval(self.auroc, self.low, self.high):.3f}",
            colours={"held-out": COLOURS["general"]},
            ax=ax,
        )
        ax.plot([0, 1], [0, 1], color=COLOURS["random"], linestyle=(0, (4, 1.6)), zorder=1)
        ax.plot(*self.operating, marker="D", color=COLOURS["base"], zorder=5)
        ax.annotate("threshold", self.operating, (8, -12), textcoords="offset points", fontsize=9)
        return ax


def auroc(scores: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> float:
    """Area under the ROC curve; NaN where one class is missing."""
    from sklearn.metrics import roc_auc_score

    if truth.all() or not truth.any():
        return float("nan")
    return float(roc_auc_score(truth, scores))


def auroc_interval(
    scores: Float[np.ndarray, " n"],
    truth: Bool[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """AUROC with its percentile bootstrap interval, resampling groups (prompts).

    Where all of a class come from one group, nothing is known of its spread: the ends are NaN.
    """
    estimate = auroc(scores, truth)
    known, groups = np.unique(groups, return_inverse=True)
    if min(len(np.unique(groups[side])) for side in (truth, ~truth)) < 2:
        return Interval(estimate)
    _, place = np.unique(scores, return_inverse=True)
    levels = int(place.max()) + 1

    def of_draw(chosen: np.ndarray) -> float:
        drawn = np.bincount(chosen, minlength=len(known))[groups]
        hits = np.bincount(place[truth], drawn[truth], levels)
        rest = np.bincount(place[~truth], drawn[~truth], levels)
        if not hits.sum() or not rest.sum():
            return float("nan")
        return float(hits @ (rest.cumsum() - rest / 2) / hits.sum() / rest.sum())

    return bootstrap_statistic(
        of_draw, len(known), estimate=estimate, seed=seed, resamples=resamples
    )


def threshold_for(
    scores: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"], max_false_alarms: float | None
) -> float:
    """The score above which a conversation is flagged.

    The lowest score of an aligned conversation that keeps the share of aligned ones above it at
    most `max_false_alarms`; or, for None, the score at which hits minus false alarms is largest
    (Youden).
    """
    aligned = np.sort(scores[~truth])
    if max_false_alarms is None:
        candidates = np.unique(scores)
        above = [
            1 - np.searchsorted(side, candidates, side="right") / len(side)
            for side in (np.sort(scores[truth]), aligned)
        ]
        return float(candidates[np.argmax(above[0] - above[1])])
    # 1e-9: 0.05 * 20 has to allow one
    allowed = int(np.floor(max_false_alarms * len(aligned) + 1e-9))
    return float(aligned[len(aligned) - 1 - allowed])


def within_groups(
    scores: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"], groups: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " pairs"]:
    """For each group with both classes, the share of its pairs that are in the right order."""
    found = []
    for group in np.unique(groups):
        here = groups == group
        hit, rest = scores[here & truth], scores[here & ~truth]
        if len(hit) and len(rest):
            gap = hit[:, None] - rest[None]
            found.append(float((gap > 0).mean() + (gap == 0).mean() / 2))
    return np.array(found)


def numbered(keys: Sequence[str]) -> Int[np.ndarray, " n"]:
    """A number per key, from 0 in the order of first appearance."""
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])
