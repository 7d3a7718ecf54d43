"""Intervals: bootstrap over documents, questions or pairs, and small helpers.

An interval needs two units that count. With fewer there is an estimate and no interval: its ends
are NaN, tables leave them blank, and figures draw no bar.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95% interval; the ends are NaN where there is none."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside of the interval."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self:+.3f}"

    def __format__(self, spec: str) -> str:
        """The three numbers in one format, `+.3f` by default."""
        shown = spec or "+.3f"
        if np.isnan([self.low, self.high]).all() and not np.isnan(self.estimate):
            return f"{self.estimate:{shown}} [no interval]"
        return f"{self.estimate:{shown}} [{self.low:{shown}}, {self.high:{shown}}]"


def bootstrap_mean(values: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Percentile bootstrap interval of a mean over independent units."""
    array = np.asarray(values, dtype=float)
    return bootstrap_ratio(array, np.ones_like(array), seed=seed, resamples=resamples)


def bootstrap_ratio(
    sums: ArrayLike,
    counts: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    widened: bool = False,
) -> Interval:
    """Percentile bootstrap interval of `sum(sums) / sum(counts)`, resampling units.

    Units whose sum and count are both zero say nothing: they are left out, and the interval is
    the one without them. With fewer than two others its ends are NaN.

    Args:
        sums: Per-unit sums, e.g. nats per document, `[n]`.
        counts: Per-unit counts, e.g. tokens per document, `[n]`.
        seed: Seed of the resampling; the same seed resamples the same units.
        resamples: Number of resamples.
        widened: Take quantiles further out, as far as a t interval of as many units reaches: plain
            percentiles are too narrow for few units (Hesterberg 2015, arXiv 1411.5279).

    Raises:
        ValueError: If there are no units, lengths differ, or nothing was counted.
    """
    top, bottom = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    if top.shape != bottom.shape or top.ndim != 1 or not len(top):
        raise ValueError(f"sums {top.shape} and counts {bottom.shape} must be equal and not empty")
    if bottom.sum() <= 0:
        raise ValueError("nothing was counted, so there is no ratio")
    estimate = float(top.sum() / bottom.sum())
    counted = (top != 0) | (bottom != 0)
    top, bottom = top[counted], bottom[counted]
    if len(top) < 2:
        return Interval(estimate, float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(len(top), np.full(len(top), 1 / len(top)), size=resamples)
    totals = draws @ bottom
    ratios = (draws @ top)[totals > 0] / totals[totals > 0]
    tail = _tail(len(top)) if widened else (1 - LEVEL) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


def bootstrap_trainings(
    sums: ArrayLike, counts: ArrayLike | None = None, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap interval of a mean, resampling trainings and units alike.

    With one training it holds what other units would give, with several what another training
    would give as well, as far as these few show it. Units that count nothing are left out, and
    with fewer than two others the ends are NaN, however many trainings there are.

    Args:
        sums: Per-unit sums of each training, `[trainings, n]`.
        counts: Per-unit counts, the same for all, `[n]`; one each by default.
        seed: Seed of the resampling.
        resamples: Number of resamples.

    Raises:
        ValueError: If lengths differ, or there is nothing.
    """
    top = np.asarray(sums, dtype=float)
    if top.ndim != 2 or not top.size:
        raise ValueError(f"sums must be [trainings, units] and not empty, not {top.shape}")
    bottom = np.ones(top.shape[1]) if counts is None else np.asarray(counts, dtype=float)
    if len(top) == 1:
        return bootstrap_ratio(top[0], bottom, seed=seed, resamples=resamples)
    if bottom.shape != top.shape[1:] or bottom.sum() <= 0:
        raise ValueError(f"counts {bottom.shape} do not fit sums {top.shape}")
    estimate = float(top.mean(0).sum() / bottom.sum())
    counted = (top != 0).any(0) | (bottom != 0)
    top, bottom = top[:, counted], bottom[counted]
    if top.shape[1] < 2:
        return Interval(estimate, float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    trainings, units = (
        generator.multinomial(n, np.full(n, 1 / n), size=resamples) for n in top.shape
    )
    totals = units @ bottom
    means = np.einsum("rt,tu,ru->r", trainings / len(top), top, units, optimize=True)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means[totals > 0] / totals[totals > 0], [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


def _tail(n: int) -> float:
    """Share of resamples to leave out at either end, for intervals of `n` units."""
    from scipy.stats import norm, t

    reach = float(t.ppf(0.5 + LEVEL / 2, n - 1)) * (n / (n - 1)) ** 0.5
    return float(norm.cdf(-reach))


def mean_over_seeds(values: ArrayLike) -> Interval:
    """Mean over independent repeats with its t interval; no interval for a single one."""
    from scipy.stats import t

    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = float(t.ppf(0.5 + LEVEL / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return Interval(mean, mean - half, mean + half)
