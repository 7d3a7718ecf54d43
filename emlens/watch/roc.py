"""How well a score separates two classes, and thresholds for it, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from emlens._results import Result
from emlens._stats import Interval, reach, tails

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAST = 0.25
"""Least share of the variance left within prompts, as a few pairs can agree by chance."""


class Roc(Result):
    """The ROC curve of a score on held-out conversations.

    Attributes:
        false_alarms: Share of aligned conversations at or above each threshold, `[m]`.
        hits: Share of misaligned ones, `[m]`.
        thresholds: The thresholds, falling, `[m]`; the first is infinite.
        auroc: Area under the curve.
        low: Lower end of its 95% interval, over prompts.
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
        from emlens.figures.lines import line_bands
        from emlens.figures.style import COLOURS, MARKED

        ax = line_bands(
            {"held-out": (self.false_alarms, self.hits)},
            x_label="false alarms [share of aligned]",
            y_label="hits [share of misaligned]",
            title=f"AUROC {Interval(self.auroc, self.low, self.high):.3f}",
            colours={"held-out": COLOURS["base"]},
            ax=ax,
        )
        ax.plot([0, 1], [0, 1], color=COLOURS["random"], linestyle=(0, (4, 1.6)), zorder=1)
        ax.plot(*self.operating, marker="D", color=MARKED, zorder=5)
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
    level: float | None = None,
) -> Interval:
    """AUROC with an interval over groups (prompts) that has a width at 0 and 1 as well.

    Newcombe's method 5 (2006): the areas whose distance from the estimate is that of a t interval,
    in standard errors by Hanley and McNeil's formula at that area. The variance is
    multiplied by two ratios at the estimate: that of DeLong's to the formula's, where it is larger,
    and that of DeLong's over groups (Obuchowski 1997) to DeLong's.

    If a class comes from a single group, its spread is unknown and the ends are NaN.
    """
    _, groups = np.unique(groups, return_inverse=True)
    classes = (truth, ~truth)
    sizes = [int(side.sum()) for side in classes]
    degrees = np.array([len(np.unique(groups[side])) - 1 for side in classes])
    if not min(sizes):
        return Interval(float("nan"))
    below = _share_below(np.sort(scores[~truth]), scores[truth])
    above = 1 - _share_below(np.sort(scores[truth]), scores[~truth])
    estimate = float(below.mean())
    if degrees.min() < 1:
        return Interval(estimate)
    parts = [(one - estimate) / len(one) for one in (below, above)]
    alone = sum(float(part @ part) * n / (n - 1) for part, n in zip(parts, sizes, strict=True))
    sums = [
        np.bincount(groups[side], part, int(groups.max()) + 1)
        for side, part in zip(classes, parts, strict=True)
    ]
    own = np.array([part @ part for part in sums]) * (degrees + 1) / degrees
    design, freedom = 1.0, float(degrees.sum())
    if own.sum() > 1e-12 * estimate and alone > 1e-12 * estimate:
        both = own.sum() + 2 * float(sums[0] @ sums[1])
        over = alone / _hanley(estimate, *sizes)
        design = max(over, 1.0) * max(both / alone, _LEAST)
        freedom = float(own.sum() ** 2 / (own**2 / degrees).sum())
    far = float(reach(freedom, level)) * design**0.5
    return Interval(estimate, *(_rejected(estimate, end, sizes, far) for end in (0.0, 1.0)))


def _share_below(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Share of ordered values below each of some values; half of those that are equal."""
    sides = [np.searchsorted(ordered, values, side=side) for side in ("left", "right")]
    return (sides[0] + sides[1]) / (2 * len(ordered))


def _hanley(area: float, n_hits: int, n_rest: int) -> float:
    """Variance of an AUROC in Hanley and McNeil's formula, as Newcombe has it for both classes."""
    more = (n_hits + n_rest) / 2 - 1
    inner = (1 - area) / (2 - area) + area / (1 + area)
    return area * (1 - area) * (1 + more * inner) / (n_hits * n_rest)


def _rejected(area: float, end: float, sizes: Sequence[int], far: float) -> float:
    """The area between the estimate and 0 or 1 that is `far` standard errors off, or the end."""
    from scipy.optimize import brentq

    def beyond(at: float) -> float:
        return abs(at - area) - far * _hanley(at, *sizes) ** 0.5

    if area == end:
        return end
    # not from the estimate itself, which is a trivial root at 0 and 1
    return float(brentq(beyond, area + 1e-9 * (end - area), end, xtol=1e-9))  # pyright: ignore


def threshold_for(
    scores: Float[np.ndarray, " n"],
    truth: Bool[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    max_false_alarms: float | None,
) -> float:
    """The score above which a conversation is flagged.

    The lowest score of an aligned conversation whose `promise` for new conversations is at most
    `max_false_alarms`, the highest where none is; or, for None, the score at which hits minus false
    alarms is largest (Youden).
    """
    aligned = scores[~truth]
    if max_false_alarms is None:
        candidates = np.unique(scores)
        above = [
            1 - np.searchsorted(side, candidates, side="right") / len(side)
            for side in (np.sort(scores[truth]), np.sort(aligned))
        ]
        return float(candidates[np.argmax(above[0] - above[1])])
    weights, prompts = _in_parts(groups[~truth])
    values, place = np.unique(aligned, return_inverse=True)
    at = np.bincount(place, weights)
    above = at.sum() - at.cumsum()
    # 1e-9: 0.05 * 20 has to allow one
    kept = values[above + 1 <= max_false_alarms * (prompts + 1) + 1e-9]
    return float(kept[0] if len(kept) else values[-1])


def promise(
    aligned: Float[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    threshold: float,
    level: float | None = None,
) -> Interval:
    """Expected false alarms among new conversations at a threshold set on these scores.

    With `k` of `n` scores above the threshold, a new one is above it with probability at most
    `(k + 1) / (n + 1)`, whatever their distribution. Over sets of `n`, the share of false alarms
    has a beta distribution, `B(k + 1, n - k)`, whose quantiles are the interval. Several answers
    to one prompt count as one, in parts (Lee, Barber & Willett 2023, arXiv 2306.06342).

    Args:
        aligned: Scores of aligned conversations that the threshold was set on, `[n]`.
        groups: Number of the prompt of each, `[n]`.
        threshold: A score above it is flagged.
        level: Level of the interval.
    """
    from scipy.stats import beta

    weights, n = _in_parts(groups)
    k = float(weights[aligned > threshold].sum())
    low, high = beta.ppf(tails(level), k + 1, max(n - k, 1e-9))
    return Interval((k + 1) / (n + 1), float(low), float(high))


def _in_parts(groups: np.ndarray) -> tuple[np.ndarray, int]:
    """The part of its prompt that each conversation is, and the number of prompts."""
    _, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return 1 / sizes[place], len(sizes)


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
