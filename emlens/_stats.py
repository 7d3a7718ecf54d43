"""Intervals: their level, bootstraps over units, t intervals over repeats, Wilson's of shares.

An interval needs two units that count. With fewer there is an estimate and no interval: its ends
are NaN, tables leave them blank, and figures draw no bar.

Every function here takes the level of its interval; left out, it is the one in force, 0.95 outside
of any `interval_level` block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from emlens._arguments import NOT_NEGATIVE
from emlens._door import guarded

RESAMPLES = 2000
LEVEL = 0.95

_in_force: ContextVar[float] = ContextVar("level of intervals", default=LEVEL)
_NAN = float("nan")


@contextmanager
@guarded
def interval_level(level: float) -> Iterator[None]:
    """Measure with intervals of another level than 95%.

    A result keeps the level that it was measured at, shows all its intervals at it, and saves it.

    Args:
        level: Share of cases in which an interval holds the truth, between 0 and 1.

    Example:
        >>> with emlens.interval_level(0.9):
        ...     scores = emlens.log_odds(model, pairs, conditions)
    """
    token = _in_force.set(level)
    try:
        yield
    finally:
        _in_force.reset(token)


def level_in_force() -> float:
    """The level of intervals for which none is asked: that of the innermost block."""
    return _in_force.get()


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its interval; the ends are NaN where there is none."""

    estimate: float
    low: float = _NAN
    high: float = _NAN

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside of the interval."""
        return self.low > 0 or self.high < 0

    def columns(self, name: str, before: str = "", factor: float = 1) -> dict[str, float]:
        """The estimate under a name and the ends under `low` and `high`, as tables have them.

        Args:
            name: The column of the estimate.
            before: What stands before `low` and `high`.
            factor: What all three are multiplied by: 100 for percent.
        """
        return {
            name: factor * self.estimate,
            f"{before}low": factor * self.low,
            f"{before}high": factor * self.high,
        }

    def __str__(self) -> str:
        return f"{self:+.3f}"

    def __format__(self, spec: str) -> str:
        """The three numbers in one format, `+.3f` by default."""
        shown = spec or "+.3f"
        if np.isnan([self.low, self.high]).all() and not np.isnan(self.estimate):
            return f"{self.estimate:{shown}} [no interval]"
        return f"{self.estimate:{shown}} [{self.low:{shown}}, {self.high:{shown}}]"


def central(values: ArrayLike, level: float | None = None) -> np.ndarray:
    """The ends between which the middle of some values lies, along the first axis, `[2, ...]`."""
    return np.quantile(np.asarray(values), tails(level), axis=0)


def tails(level: float | None = None) -> list[float]:
    """The two quantiles between which an interval lies."""
    tail = (1 - _known(level)) / 2
    return [tail, 1 - tail]


def reach(degrees: ArrayLike = np.inf, level: float | None = None) -> np.ndarray:
    """Standard errors from the middle of a t interval to its ends; of a normal one for `inf`."""
    from scipy.stats import t

    return np.asarray(t.ppf(0.5 + _known(level) / 2, degrees))


def bootstrap_mean(
    values: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES, level: float | None = None
) -> Interval:
    """Percentile bootstrap interval of a mean over independent units."""
    array = np.asarray(values, dtype=float)
    return bootstrap_ratio(array, np.ones_like(array), seed=seed, resamples=resamples, level=level)


def bootstrap_ratio(
    sums: ArrayLike,
    counts: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    widened: bool = False,
    level: float | None = None,
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
        level: Level of the interval.

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
        return Interval(estimate)
    draws = _draws(np.random.default_rng(seed), len(top), resamples)
    totals = draws @ bottom
    ratios = (draws @ top)[totals > 0] / totals[totals > 0]
    return _between(estimate, ratios, _tail_of_t(len(top), level) if widened else tails(level)[0])


def bootstrap_gap(
    first: ArrayLike,
    second: ArrayLike,
    *,
    seed: int = 0,
    level: float | None = None,
) -> Interval:
    """Percentile bootstrap interval of the difference of two ratios over the same units.

    Args:
        first: Per-unit sums and counts, `[2, n]`.
        second: The same of what is taken off.
        seed: Seed of the resampling.
        level: Level of the interval.
    """
    (a, n), (b, m) = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    estimate = float(a.sum() / n.sum() - b.sum() / m.sum())
    if len(a) < 2:
        return Interval(estimate)
    draws = _draws(np.random.default_rng(seed), len(a), RESAMPLES)
    return _between(
        estimate, (draws @ a) / (draws @ n) - (draws @ b) / (draws @ m), tails(level)[0]
    )


def bootstrap_trainings(
    sums: ArrayLike,
    counts: ArrayLike | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float | None = None,
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
        level: Level of the interval.

    Raises:
        ValueError: If lengths differ, or there is nothing.
    """
    top = np.asarray(sums, dtype=float)
    if top.ndim != 2 or not top.size:
        raise ValueError(f"sums must be [trainings, units] and not empty, not {top.shape}")
    bottom = np.ones(top.shape[1]) if counts is None else np.asarray(counts, dtype=float)
    if len(top) == 1:
        return bootstrap_ratio(top[0], bottom, seed=seed, resamples=resamples, level=level)
    if bottom.shape != top.shape[1:] or bottom.sum() <= 0:
        raise ValueError(f"counts {bottom.shape} do not fit sums {top.shape}")
    estimate = float(top.mean(0).sum() / bottom.sum())
    counted = (top != 0).any(0) | (bottom != 0)
    top, bottom = top[:, counted], bottom[counted]
    if top.shape[1] < 2:
        return Interval(estimate)
    generator = np.random.default_rng(seed)
    trainings, units = (_draws(generator, n, resamples) for n in top.shape)
    totals = units @ bottom
    means = np.einsum("rt,tu,ru->r", trainings / len(top), top, units, optimize=True)
    return _between(estimate, means[totals > 0] / totals[totals > 0], tails(level)[0])


def bootstrap_statistic(
    statistic: Callable[..., float],
    *sizes: int,
    estimate: float,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float | None = None,
) -> Interval:
    """Percentile bootstrap interval of any statistic of one sample or several.

    Args:
        statistic: Of the places that were drawn from each sample, `[n]`; NaN for a draw that says
            nothing.
        *sizes: Units of each sample.
        estimate: The statistic of the samples themselves.
        seed: Seed of the resampling.
        resamples: Number of resamples.
        level: Level of the interval.
    """
    generator = np.random.default_rng(seed)
    found = np.array(
        [statistic(*(generator.integers(0, n, n) for n in sizes)) for _ in range(resamples)]
    )
    known = found[np.isfinite(found)]
    return _between(estimate, known, tails(level)[0]) if len(known) > 1 else Interval(estimate)


class RunningMean:
    """A mean and its bootstrap interval, in one pass and without keeping the units.

    Units are drawn with Poisson weights, so each is needed only once.

    Args:
        seed: Seed of the weights.
        draws: Number of resamples.
    """

    def __init__(self, seed: int | list[int], draws: int) -> None:
        self.n = 0
        self._sum = 0.0
        self._generator = np.random.default_rng(seed)
        self._sums, self._counts = np.zeros(draws), np.zeros(draws)

    def add(self, value: float) -> None:
        """Take in one unit."""
        self.n += 1
        self._sum += value
        weights = self._generator.poisson(1.0, len(self._sums))
        self._sums += weights * value
        self._counts += weights

    def interval(self, level: float | None = None) -> Interval:
        """The mean of all units so far."""
        mean, drawn = self._sum / self.n, self._counts > 0
        if self.n < 2:
            return Interval(mean)
        return _between(mean, self._sums[drawn] / self._counts[drawn], tails(level)[0])


def mean_over_seeds(values: ArrayLike, level: float | None = None) -> Interval:
    """Mean over independent repeats with its t interval; no interval for a single one."""
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean)
    half = float(reach(len(array) - 1, level) * array.std(ddof=1) / np.sqrt(len(array)))
    return Interval(mean, mean - half, mean + half)


@guarded(n=NOT_NEGATIVE)
def wilson(hits: int, n: int, level: float | None = None) -> Interval:
    """Wilson's interval of a share; NaN where nothing was counted."""
    from scipy.stats import binomtest

    if n == 0:
        return Interval(_NAN)
    found = binomtest(hits, n).proportion_ci(_known(level), method="wilson")
    return Interval(hits / n, float(found.low), float(found.high))


def p_value(found: Interval, *, degrees: float = np.inf, level: float | None = None) -> float:
    """Two-sided p of an interval: below `1 - level` where it excludes zero, and only there.

    The end that is nearer to zero is moved as that of a t interval moves with its level.

    Args:
        found: The interval; NaN without ends.
        degrees: Degrees of freedom of a t interval; of a bootstrap none.
        level: Level of the interval.
    """
    from scipy.stats import t

    half = found.estimate - found.low if found.estimate > 0 else found.high - found.estimate
    if np.isnan(half) or half <= 0:
        return _NAN if np.isnan(half) else float(found.estimate == 0)
    return float(2 * t.sf(abs(found.estimate) / half * reach(degrees, level), degrees))


def holm(p: ArrayLike) -> np.ndarray:
    """Holm's correction of some p values for their number: one is kept where it is below alpha."""
    values = np.asarray(p, dtype=float)
    order = np.argsort(values)
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    return np.minimum(steps, 1.0)[np.argsort(order)]


def _known(level: float | None) -> float:
    return level_in_force() if level is None else level


def _draws(generator: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    """How often each of `n` units is in each resample, `[resamples, n]`."""
    return generator.multinomial(n, np.full(n, 1 / n), size=resamples)


def _between(estimate: float, draws: np.ndarray, tail: float) -> Interval:
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


def _tail_of_t(n: int, level: float | None) -> float:
    """Share of resamples to leave out at either end, to reach as far as a t interval of `n`."""
    from scipy.stats import norm

    return float(norm.cdf(-float(reach(n - 1, level)) * (n / (n - 1)) ** 0.5))
