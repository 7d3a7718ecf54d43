"""State of a screen of any size: running sums, the worst examples, a bounded sample."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from emlens._stats import Interval, RunningMean
from emlens.watch.screen_rows import Scored

SAMPLE = 100_000
"""Largest number of scores kept; beyond it, a random sample."""

DRAWS = 1000
"""Bootstrap resamples of the mean score, as running sums."""


class Reservoir:
    """The first `size` values in their order, then a random sample of all.

    Args:
        size: Values to keep.
        seed: Seed of the sample.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.values: list[float] = []
        self.seen = 0
        self._size = size
        self._generator = np.random.default_rng(seed)

    def add(self, value: float) -> None:
        self.seen += 1
        if len(self.values) < self._size:
            self.values.append(value)
            return
        place = int(self._generator.integers(self.seen))
        if place < self._size:
            self.values[place] = value


class Tally:
    """Running totals of scores, of a size that does not depend on their number.

    Args:
        keep: Worst examples to keep.
        seed: Seed of the bootstrap and of the samples.
        sample: Scores to keep.
    """

    def __init__(self, keep: int, seed: int, sample: int = SAMPLE) -> None:
        self.unscored = 0
        self.scores = Reservoir(sample, seed)
        self.references = Reservoir(sample, seed)
        self._keep = keep
        self._worst: list[tuple[float, int, Scored]] = []
        self._mean = RunningMean([seed, 6], DRAWS)

    @property
    def n(self) -> int:
        """Examples with a score."""
        return self._mean.n

    def add(self, scored: Sequence[Scored]) -> None:
        """Add the scores of some examples, in the order of the set."""
        for one in scored:
            if one.score is None or one.reference is None:
                self.unscored += 1
                self.scores.add(float("nan"))
                continue
            self.scores.add(one.score)
            self.references.add(one.reference)
            self._mean.add(one.score)
            entry = (one.score, -one.row, one)
            if len(self._worst) < self._keep:
                heapq.heappush(self._worst, entry)
            elif entry[:2] > self._worst[0][:2]:
                heapq.heapreplace(self._worst, entry)

    def mean(self) -> Interval:
        """Mean score over all examples, with its bootstrap interval."""
        return self._mean.interval()

    def above(self, threshold: float) -> int:
        """Number of scores above a threshold; estimated from the sample if not all are kept."""
        scores = np.array(self.scores.values)
        return round(float((scores > threshold).mean()) * self.scores.seen)

    def worst(self) -> list[dict]:
        """The worst examples, worst first."""
        return [
            dict(vars(one)) for _, _, one in sorted(self._worst, key=lambda e: e[:2], reverse=True)
        ]
