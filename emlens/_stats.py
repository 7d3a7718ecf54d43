"""Intervals: their level, means and shares over units, t intervals over repeats, Wilson's.

An interval needs two units that count. With fewer there is an estimate and no interval: its ends
are NaN, tables leave them blank, and figures draw no bar.

Every function here takes the level of its interval; left out, it is the one in force, 0.95 outside
of any `interval_level` block. How often each interval holds the truth: `docs/intervals.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from emlens._arguments import NOT_NEGATIVE
from emlens._door import guarded

RESAMPLES = 2000
LEVEL = 0.95

_in_force: ContextVar[float] = ContextVar("level of intervals", default=LEVEL)
_NAN = float("nan")
_FEW = 4
"""Fewer units have no bootstrap: too many of their resamples hold one unit only."""


@contextmanager
@guarded
def interval_level(level: float) -> Iterator[None]:
    """Use intervals of another level than 95% inside the block.

    Results keep the level that they were measured at, use it for all intervals, and save it.

    Args:
        level: Probability that an interval contains the truth, between 0 and 1.

    Examples:
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
    """An estimate with its interval; the ends are NaN if there is none."""

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


def bootstrap_mean(values: ArrayLike, *, seed: int = 0, level: float | None = None) -> Interval:
    """Interval of a mean over independent units: `bootstrap_ratio` with one count each."""
    array = np.asarray(values, dtype=float)
    return bootstrap_ratio(array, np.ones_like(array), seed=seed, level=level)


def bootstrap_ratio(
    sums: ArrayLike, counts: ArrayLike, *, seed: int = 0, level: float | None = None
) -> Interval:
    """Interval of `sum(sums) / sum(counts)` over units, at least as wide as a t interval.

    Each end is as many standard errors away as a studentised bootstrap of the units says (Hall
    1988): no fewer than those of a t interval, and no more than twice as many. So the end in the
    tail of skewed units lies further out. Fewer than four units have a t interval.

    Units whose sum and count are both zero say nothing: they are left out, and the interval is
    the one without them. With fewer than two others its ends are NaN.

    Args:
        sums: Per-unit sums, e.g. nats per document, `[n]`.
        counts: Per-unit counts, e.g. tokens per document, `[n]`.
        seed: Seed of the resampling; the same seed resamples the same units.
        level: Level of the interval.

    Raises:
        ValueError: If there are no units, lengths differ, or nothing was counted.
    """
    return _moved(*_of_units(_ratio(sums, counts), seed=seed, level=level))


def bootstrap_gap(
    first: ArrayLike, second: ArrayLike, *, seed: int = 0, level: float | None = None
) -> Interval:
    """The same of the difference of two ratios over the same units.

    Args:
        first: Per-unit sums and counts, `[2, n]`.
        second: The same of what is taken off.
        seed: Seed of the resampling.
        level: Level of the interval.
    """
    pair = [_ratio(*np.asarray(one, dtype=float)) for one in (first, second)]
    return _moved(*_of_units(*pair, seed=seed, level=level))


def bootstrap_trainings(
    sums: ArrayLike,
    counts: ArrayLike | None = None,
    *,
    seed: int = 0,
    level: float | None = None,
) -> Interval:
    """Interval of a mean over trainings and units, both of them random.

    With one training it holds what other units would give, with several what another training
    would give as well. The distances of its ends from the mean are the roots of the summed squares
    of two distances: that over units, of the means of the trainings, and that of a t interval over
    trainings, less what chance alone, the interaction of the two, adds to their variance (a method
    of variance estimates recovery: Zou & Donner 2008). Two trainings say next to nothing of a
    third: their t interval reaches 12.7 standard errors.

    Units that count nothing are left out, and with fewer than two others the ends are NaN,
    however many trainings there are.

    Args:
        sums: Per-unit sums of each training, `[trainings, n]`.
        counts: Per-unit counts, the same for all, `[n]`; one each by default.
        seed: Seed of the resampling.
        level: Level of the interval.

    Raises:
        ValueError: If lengths differ, or there is nothing.
    """
    each = np.asarray(sums, dtype=float)
    if each.ndim != 2 or not each.size:
        raise ValueError(f"sums must be [trainings, units] and not empty, not {each.shape}")
    bottom = np.ones(each.shape[1]) if counts is None else np.asarray(counts, dtype=float)
    if bottom.shape != each.shape[1:] or bottom.sum() <= 0:
        raise ValueError(f"counts {bottom.shape} do not fit sums {each.shape}")
    estimate, low, high = _of_units(_ratio(each.mean(0), bottom), seed=seed, level=level)
    runs = len(each)
    if runs == 1:
        return _moved(estimate, low, high)
    apart = (each.sum(1) / bottom.sum() - estimate)[:, None]
    mixed = (each - each.mean(0)) / bottom.sum() - apart * bottom / bottom.sum()
    units = int(((each != 0).any(0) | (bottom != 0)).sum())
    chance = (mixed**2).sum() * units / max(units - 1, 1) / (runs - 1)
    between = max(float((apart**2).sum() / (runs - 1) - chance), 0.0) / runs
    further = float(reach(runs - 1, level)) ** 2 * between
    return _moved(estimate, (low**2 + further) ** 0.5, (high**2 + further) ** 0.5)


def share_of_units(
    hits: ArrayLike, counts: ArrayLike, *, seed: int = 0, level: float | None = None
) -> Interval:
    """Interval of a share of answers that come in units, such as questions, which may differ.

    Wilson's interval of as many independent answers as these are worth: their number divided by
    the design effect (the variance of the share over units by that of independent answers, at
    least 1), with the reach that `bootstrap_ratio` gives in place of the normal quantile. It has a
    width where there is no hit as well. Units of one answer each have Wilson's own.

    How many units a claim needs: with eight that differ a lot (a rate of 13%, log-odds with a
    spread of 2) the median interval is 47 points wide (`docs/intervals.md`). With two or three it
    spans most of all shares; that of one unit is Wilson's over its answers, and says nothing of
    other units.

    Args:
        hits: Hits per unit, `[n]`.
        counts: Answers per unit, `[n]`.
        seed: Seed of the resampling.
        level: Level of the interval.
    """
    top, bottom = _ratio(hits, counts)
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    n, estimate = float(bottom.sum()), float(top.sum() / bottom.sum())
    if len(top) == 1 or bottom.max() == 1:
        return wilson(float(top.sum()), n, level)
    binomial = estimate * (1 - estimate) / n
    low, high, variance = _reaches(((top, bottom),), seed=seed, level=level, share=True)
    worth = n / max(variance / binomial, 1.0) if binomial else n
    ends = _wilson(estimate, worth, low)[0], _wilson(estimate, worth, high)[1]
    return Interval(estimate, *ends)


def gap_of_shares(
    first: ArrayLike, second: ArrayLike, *, seed: int = 0, level: float | None = None
) -> Interval:
    """Interval of the difference of two shares over the same units (Newcombe 1998, method 10).

    The distances of the ends of `share_of_units` from both shares are combined as standard errors
    of paired numbers are, with the correlation over units.

    Args:
        first: Hits and answers per unit, `[2, n]`.
        second: The same of what is taken off.
        seed: Seed of the resampling.
        level: Level of the interval.
    """
    pair = [np.asarray(one, dtype=float) for one in (first, second)]
    a, b = (share_of_units(*one, seed=seed, level=level) for one in pair)
    parts = [hits - one.estimate * n for (hits, n), one in zip(pair, (a, b), strict=True)]
    spread = float(np.sqrt((parts[0] @ parts[0]) * (parts[1] @ parts[1])))
    alike = float(parts[0] @ parts[1]) / spread if spread else 0.0

    def combined(x: float, y: float) -> float:
        return max(x * x - 2 * alike * x * y + y * y, 0.0) ** 0.5

    return _moved(
        a.estimate - b.estimate,
        combined(a.estimate - a.low, b.high - b.estimate),
        combined(a.high - a.estimate, b.estimate - b.low),
    )


def bootstrap_statistic(
    statistic: Callable[..., float],
    *sizes: int,
    estimate: float,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float | None = None,
) -> Interval:
    """Percentile bootstrap interval of any statistic of one sample or several.

    The percentiles are as far out as a t interval of as many units as the smallest sample reaches:
    plain ones are too narrow for few units (Hesterberg 2015, arXiv 1411.5279).

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
    if len(known) < 2:
        return Interval(estimate)
    several = [n for n in sizes if n > 1]  # a sample of one unit is always drawn as it is
    if not several:
        return Interval(estimate)
    tail = _tail_of_t(min(several), level)
    return Interval(estimate, *map(float, np.quantile(known, [tail, 1 - tail])))


class RunningMean:
    """A mean and its interval as `bootstrap_mean` has it, in one pass, without keeping the units.

    Units are drawn with Poisson weights, so each is needed only once.

    Args:
        seed: Seed of the weights.
        draws: Number of resamples.
    """

    def __init__(self, seed: int | list[int], draws: int) -> None:
        self.n = 0
        self._first = 0.0
        self._generator = np.random.default_rng(seed)
        self._powers = np.zeros(3)
        self._drawn = np.zeros((3, draws))

    def add(self, value: float) -> None:
        """Take in one unit."""
        self._first = self._first if self.n else value
        self.n += 1
        # around the first value, so that squares of large numbers do not drown the spread
        powers = np.array([1.0, value - self._first, (value - self._first) ** 2])
        self._powers += powers
        weights = self._generator.poisson(1.0, self._drawn.shape[1])
        self._drawn += powers[:, None] * weights

    def interval(self, level: float | None = None) -> Interval:
        """The mean of all units so far."""
        mean, variance = map(float, _mean_of(self._powers))
        if self.n < 2:
            return Interval(self._first + mean)
        drawn = self._drawn[:, self._drawn[0] > 1]
        means, variances = _mean_of(drawn)
        low, high = _quantiles(means - mean, variances, variance, self.n, level)
        return _moved(self._first + mean, low * variance**0.5, high * variance**0.5)


def mean_over_seeds(values: ArrayLike, level: float | None = None) -> Interval:
    """Mean over independent repeats with its t interval; no interval for a single one."""
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean)
    half = float(reach(len(array) - 1, level) * array.std(ddof=1) / np.sqrt(len(array)))
    return Interval(mean, mean - half, mean + half)


@guarded(n=NOT_NEGATIVE)
def wilson(hits: float, n: float, level: float | None = None) -> Interval:
    """Wilson's interval of a share of independent answers; NaN where nothing was counted."""
    if n == 0:
        return Interval(_NAN)
    return Interval(hits / n, *_wilson(hits / n, n, float(reach(level=level))))


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


def _moved(estimate: float, low: float, high: float) -> Interval:
    return Interval(estimate, estimate - low, estimate + high)


def _wilson(share: float, n: float, far: float) -> tuple[float, float]:
    """The shares that lie `far` standard errors from the one that was seen."""
    middle = share + far * far / (2 * n)
    half = far * (share * (1 - share) / n + far * far / (4 * n * n)) ** 0.5
    ends = (middle - half) / (1 + far * far / n), (middle + half) / (1 + far * far / n)
    return (max(ends[0], 0.0) if share else 0.0), (min(ends[1], 1.0) if share < 1 else 1.0)


def _ratio(sums: ArrayLike, counts: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    top, bottom = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    if top.shape != bottom.shape or top.ndim != 1 or not len(top):
        raise ValueError(f"sums {top.shape} and counts {bottom.shape} must be equal and not empty")
    if bottom.sum() <= 0:
        raise ValueError("nothing was counted, so there is no ratio")
    return top, bottom


def _of_units(
    *ratios: tuple[np.ndarray, np.ndarray], seed: int, level: float | None
) -> tuple[float, float, float]:
    """A ratio, or the difference of two, and how far off the ends of its interval are."""
    counted = np.any([(top != 0) | (bottom != 0) for top, bottom in ratios], axis=0)
    kept = tuple((top[counted], bottom[counted]) for top, bottom in ratios)
    estimates = [float(top.sum() / bottom.sum()) for top, bottom in kept]
    estimate = estimates[0] - sum(estimates[1:])
    if counted.sum() < 2:
        return estimate, _NAN, _NAN
    low, high, variance = _reaches(kept, seed=seed, level=level)
    return estimate, low * variance**0.5, high * variance**0.5


def _reaches(
    ratios: tuple[tuple[np.ndarray, np.ndarray], ...],
    *,
    seed: int,
    level: float | None,
    share: bool = False,
) -> tuple[float, float, float]:
    """Standard errors from a ratio, or difference of two, to either end, and their square.

    Args:
        ratios: Sums and counts of units.
        seed: Seed of the resampling.
        level: Level of the interval.
        share: Whether the ratio is a share, whose variance is at least that of independent answers.
    """
    n, signs = len(ratios[0][0]), np.array([1.0, -1.0][: len(ratios)])
    rests = np.array([top - top.sum() / bottom.sum() * bottom for top, bottom in ratios])
    bottoms = np.array([bottom for _, bottom in ratios])
    off = signs @ (rests / bottoms.sum(1, keepdims=True))
    variance = float(off @ off) * n / (n - 1)
    drawn = _drawn(n, seed)
    totals = drawn @ bottoms.T
    drawn, totals = drawn[(totals > 0).all(1)], totals[(totals > 0).all(1)]
    errors = drawn @ rests.T / totals
    # the residuals of each resample, of its own ratio, as sums of products of those of the sample
    parts = np.concatenate([rests, bottoms])
    products = (drawn @ (parts[:, None] * parts).reshape(-1, n).T).reshape(-1, *[len(parts)] * 2)
    weights = np.concatenate([signs / totals, -signs * errors / totals], axis=1)
    variances = np.einsum("ri,rij,rj->r", weights, products, weights, optimize=True) * n / (n - 1)
    if share:
        shares = np.clip(ratios[0][0].sum() / bottoms.sum() + errors[:, 0], 0, 1)
        variances = np.maximum(variances, shares * (1 - shares) / totals[:, 0])
    return *_quantiles(errors @ signs, variances, variance, n, level), variance


def _quantiles(
    errors: np.ndarray, variances: np.ndarray, variance: float, n: int, level: float | None
) -> tuple[float, float]:
    """Standard errors to the lower and to the upper end, of errors of resamples."""
    least = float(reach(n - 1, level))
    if n < _FEW:
        return least, least
    tiny = 1e-12 * variance or 1.0
    high, low = np.quantile(errors / np.sqrt(np.maximum(variances, tiny)), tails(level))
    return float(np.clip(low, least, 2 * least)), float(np.clip(-high, least, 2 * least))


def _mean_of(powers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and its variance, of the number, the sum and the sum of squares of values."""
    n, total, squares = powers
    mean = total / n
    return mean, np.maximum(squares / n - mean**2, 0) / np.maximum(n - 1, 1)


def _drawn(n: int, seed: int) -> np.ndarray:
    """How often each of `n` units is in each resample, `[resamples, n]`; none of too few units."""
    if n < _FEW:
        return np.ones((1, n))
    return (_kept_draws if n <= 256 else _draws)(n, seed)


def _draws(n: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)


_kept_draws = lru_cache(maxsize=16)(_draws)


def _tail_of_t(n: int, level: float | None) -> float:
    """Share of resamples to leave out at either end, to reach as far as a t interval of `n`."""
    from scipy.stats import norm

    return float(norm.cdf(-float(reach(n - 1, level)) * (n / (n - 1)) ** 0.5))
