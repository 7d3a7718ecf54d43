"""Where a path turns: the local cosine, and whether its peak is more than noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from emlens._stats import LEVEL, central

MIN_MOVE = 0.0035
"""Moves below this count as none; of arXiv 2506.11613, for a `B` of norm about 0.1.

The paper's code keeps a step where `A` or `B` moves by this much; here it is the move of what is
looked at, by default of `B`.
"""

RESAMPLES = 200
WIDTH = 9
"""Moves over which a path is smoothed to see what is noise."""

ENOUGH = 5
"""Values of a local cosine below which a peak means nothing."""

MIN_PROMINENCE = 0.02
"""Peaks that stand out by less are none: a turn by some 10 degrees more than beside it."""


@dataclass(frozen=True, slots=True)
class Transition:
    """Whether and where a path turns.

    Attributes:
        step: Median over lags of the steps at which the local cosine peaks; None if the peaks are
            not more than chance would give.
        low: Lower end of its interval, in steps; None if there is no step.
        high: Upper end.
        peaks: Step of the peak for each lag, found or not; NaN where a lag has no values.
        prominence: Mean over lags of the peak's height above both sides.
        p_value: Share of paths without a turn, but with this one's noise, whose peaks stand out
            as much; NaN where that cannot be told.
        reason: What was found, in words.
    """

    step: float | None
    low: float | None
    high: float | None
    peaks: tuple[float, ...]
    prominence: float
    p_value: float
    reason: str

    def __str__(self) -> str:
        if self.step is None:
            return f"no transition: {self.reason}"
        return f"step {self.step:g} [{self.low:g}, {self.high:g}], p = {self.p_value:.3f}"


def local_cosine(
    gram: Float[np.ndarray, "records records"],
    positions: Sequence[int],
    lag: int,
    min_move: float = 0.0,
) -> Float[np.ndarray, " records"]:
    """`cos(B[t-k] - B[t], B[t+k] - B[t])` at each record: -1 straight, 0 a right angle, 1 back.

    Args:
        gram: Inner products of the records.
        positions: Where each record is, in steps or records.
        lag: `k`, in the same unit.
        min_move: There is no value where both moves are shorter than this.

    Returns:
        `[records]`, NaN where there is no record at `t - k` or `t + k`, or no move.
    """
    at = {position: place for place, position in enumerate(positions)}
    found = np.full(len(positions), np.nan)
    triples = [
        (here, at[t - lag], at[t + lag])
        for t, here in at.items()
        if t - lag in at and t + lag in at
    ]
    if not triples:
        return found
    here, before, after = np.array(triples).T
    own = gram[here, here]
    back = gram[before, before] - 2 * gram[before, here] + own
    forth = gram[after, after] - 2 * gram[after, here] + own
    across = gram[before, after] - gram[before, here] - gram[after, here] + own
    # what is left of a difference of equal records is rounding
    nothing = 1e-12 * np.maximum(own, np.maximum(gram[before, before], gram[after, after]))
    moved = (back > nothing) & (forth > nothing) & (np.maximum(back, forth) >= min_move**2)
    values = across[moved] / np.sqrt(back[moved] * forth[moved])
    found[here[moved]] = np.clip(values, -1, 1)
    return found


def regular(positions: Sequence[int]) -> tuple[int, list[int]]:
    """The usual distance of records, and the places of the longest row of them at it."""
    if len(positions) < 2:
        return 1, list(range(len(positions)))
    gaps = Counter(b - a for a, b in zip(positions, positions[1:], strict=False))
    gap = max(gaps, key=lambda gap: (gap * gaps[gap], gap))
    at = {position: place for place, position in enumerate(positions)}
    best: list[int] = []
    for start in positions:
        if start - gap in at:
            continue
        row = []
        while start in at:
            row.append(at[start])
            start += gap
        best = max(best, row, key=len)
    return gap, best


def find_transition(
    gram: Float[np.ndarray, "records records"],
    positions: Sequence[int],
    lags: Sequence[int],
    steps: Sequence[int],
    *,
    min_move: float = 0.0,
    seed: int = 0,
) -> Transition:
    """Find the turn of a path, or say that there is none.

    The peak of the local cosine is a transition if it stands out above both sides (their medians)
    by `MIN_PROMINENCE`, and more than on 95% of 200 paths that turn evenly: a line in time fitted
    to the moves from record to record, and on it the noise of the path (what the mean over
    `WIDTH` moves leaves), shuffled. Lags at which a turn is not sharp enough do not show it.

    The interval holds the peaks of all lags, and the middle 95% of those found again with the
    noise shuffled on what fits the path better, two lines or the smoothed path. It is no finer
    than the distance of records. Only the longest row of equally spaced ones is looked at.

    Args:
        gram: Inner products of the records.
        positions: Where each record is, in steps or records.
        lags: `k`, in the same unit.
        steps: Steps of the records, in which the answer is.
        min_move: See `local_cosine`.
        seed: Seed of the shuffling.
    """
    gap, row = regular(positions)
    gram, at = gram[np.ix_(row, row)], np.asarray(steps, dtype=float)[row]
    kept = {lag: lag // gap for lag in lags if lag % gap == 0}
    curves = {k: local_cosine(gram, range(len(row)), k, min_move) for k in kept.values()}
    found = {k: int(np.nanargmax(c)) for k, c in curves.items() if np.isfinite(c).any()}
    peaks = tuple(float(at[found[kept[n]]]) if kept.get(n) in found else np.nan for n in lags)
    usable = [k for k in found if np.isfinite(curves[k]).sum() >= ENOUGH]
    if not usable:
        why = f"fewer than {ENOUGH} equally spaced records have a local cosine"
        return Transition(None, None, None, peaks, float("nan"), float("nan"), why)

    def measured(gram: np.ndarray) -> list[np.ndarray]:
        return [local_cosine(gram, range(len(row)), k, min_move) for k in usable]

    moves = _differences(gram)
    prominence = _prominence([curves[k] for k in usable])
    smooth, noise = _smooth(len(moves)), _noise(_smooth(len(moves)))
    null = [_prominence(measured(g)) for g in _shuffled(moves, _line(len(moves)), noise, seed)]
    p_value = (1 + sum(value >= prominence for value in null)) / (1 + len(null))
    why = f"the peaks stand out by {prominence:.3f}"
    if p_value > 1 - LEVEL or prominence < MIN_PROMINENCE:
        small = f", less than {MIN_PROMINENCE}" if prominence < MIN_PROMINENCE else ""
        chance = f", as they may by chance (p = {p_value:.2f})" if p_value > 1 - LEVEL else ""
        return Transition(None, None, None, peaks, prominence, p_value, why + small + chance)
    places = at[[found[k] for k in usable]]
    two = _two(len(moves), int(np.median([found[k] for k in usable])))
    fit = min(two, smooth, key=lambda fit: _size(moves, _noise(fit)))
    again = [
        at[np.nanargmax(curve)]
        for g in _shuffled(moves, fit, _noise(fit), seed)
        for curve in measured(g)
        if np.isfinite(curve).any()
    ]
    low, high = central(again)
    return Transition(
        step=float(np.median(places)),
        low=float(min(low, places.min())),
        high=float(max(high, places.max())),
        peaks=peaks,
        prominence=prominence,
        p_value=p_value,
        reason=why,
    )


def _prominence(curves: list[np.ndarray]) -> float:
    """Mean height of the peaks above the higher of the two sides' medians."""
    heights = []
    for curve in curves:
        values = curve[np.isfinite(curve)]
        place = int(np.argmax(values)) if len(values) else 0
        if place in (0, len(values) - 1) or not len(values):
            heights.append(0.0)
            continue
        sides = np.median(values[:place]), np.median(values[place + 1 :])
        heights.append(float(values[place] - max(sides)))
    return float(np.mean(heights))


def _differences(gram: np.ndarray) -> np.ndarray:
    """Inner products of the moves, from those of the records."""
    return gram[1:, 1:] - gram[1:, :-1] - gram[:-1, 1:] + gram[:-1, :-1]


def _line(n: int) -> Float[np.ndarray, "moves moves"]:
    """The projection on what rises or falls evenly with time."""
    basis, _ = np.linalg.qr(np.stack([np.ones(n), np.linspace(-1, 1, n)], axis=1))
    return basis @ basis.T


def _smooth(n: int) -> Float[np.ndarray, "moves moves"]:
    """The mean over the moves around each; windows are shifted at the ends."""
    width = min(WIDTH, n)
    starts = np.clip(np.arange(n) - width // 2, 0, n - width)[:, None]
    places = np.arange(n)[None]
    return ((places >= starts) & (places < starts + width)) / width


def _two(n: int, turn: int) -> Float[np.ndarray, "moves moves"]:
    """The mean of the moves before a record, and of those after."""
    after = np.arange(n) >= turn
    sides = np.stack([~after, after], axis=1).astype(float)
    return sides / sides.sum(0) @ sides.T


def _noise(fit: np.ndarray) -> Float[np.ndarray, "moves moves"]:
    """What a linear fit leaves of each move, brought to the noise's full size."""
    left = np.eye(len(fit)) - fit
    return left * np.sqrt(len(fit) / np.square(left).sum())


def _size(moves: np.ndarray, noise: np.ndarray) -> float:
    return float(np.einsum("ij,jk,ik->", noise, moves, noise, optimize=True))


def _shuffled(
    moves: np.ndarray, fit: np.ndarray, noise: np.ndarray, seed: int
) -> Iterator[Float[np.ndarray, "records records"]]:
    """Inner products of the records of paths whose moves are a fit and noise in another order."""
    n = len(moves)
    generator = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        path = np.zeros((n + 1, n))
        path[1:] = np.cumsum(fit + noise[generator.permutation(n)], axis=0)
        yield path @ moves @ path.T
