"""Measurements under several conditions on the same units: the base of most results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import pandas as pd

from emlens._results import Result
from emlens._stats import Interval, mean_over_seeds
from emlens.measures.doses import checked_grid, place_on


class Measured(Result):
    """Values of some conditions on units that they share; differences are paired unit by unit.

    `NAMED` is the singular of the field that holds the names of the conditions.
    """

    NAMED: ClassVar[str] = "condition"

    @property
    def _names(self) -> tuple[str, ...]:
        return getattr(self, f"{self.NAMED}s")

    def _index(self, name: str) -> int:
        if name not in self._names:
            raise KeyError(f"no {self.NAMED} {name!r}; there are {', '.join(self._names)}")
        return self._names.index(name)

    def _acting(self, name: str) -> str:
        """The adapters and edits that acted under a condition, in words."""
        return getattr(self, "acting", {}).get(name, "")

    def _interval(self, values: np.ndarray) -> Interval:
        """Mean of the values of all units, `[units]`, with its interval."""
        raise NotImplementedError


class OnGrid(Measured):
    """Values of some directions at every point of a grid, `[directions, points, units]`.

    Attributes:
        directions: Names of what was measured.
        constructions: How each was made.
    """

    NAMED = "direction"
    POINT: ClassVar[str] = "norm"
    AXES = {"constructions": "directions"}

    directions: tuple[str, ...]
    constructions: dict[str, str]

    @property
    def grid(self) -> Sequence[float]:
        """The values that identify points, `[points]`."""
        raise NotImplementedError

    def difference(self, first: str, second: str, at: float) -> Interval:
        """Difference of two directions, `first - second`, at one point, paired by unit."""
        place = self._place(at)
        return self._interval(self._units(first)[place] - self._units(second)[place])

    def _at(self, direction: str, at: float) -> Interval:
        return self._interval(self._units(direction)[self._place(at)])

    def _units(self, direction: str) -> np.ndarray:
        """Values of one direction, `[points, units]`."""
        raise NotImplementedError

    def _place(self, at: float) -> int:
        return place_on(self.grid, at, self.POINT)

    def _curves(self, column: str, *ends: str) -> dict[str, tuple[np.ndarray, ...]]:
        """What is drawn of each direction: where its points lie, and columns of the table."""
        return {
            str(name): (
                self._across(str(name)),
                *(part[one].to_numpy() for one in (column, *ends)),
            )
            for name, part in self.table().groupby("direction", sort=False)
        }

    def _gaps(self) -> dict[str, tuple[np.ndarray, ...]]:
        """Difference of each direction from the first at every point, paired by unit."""
        first, *others = self.directions
        found = {}
        for name in others:
            each = [self.difference(name, first, at) for at in self.grid]
            ends = np.array([(one.estimate, one.low, one.high) for one in each]).T
            found[name] = (self._across(name), *ends)
        return found

    def _across(self, direction: str) -> np.ndarray:
        """Where the points of a direction lie along the axis of a figure, `[points]`."""
        return np.asarray(self.grid)


class UnderNoise(OnGrid):
    """Share of the gain of solutions that is lost to noise, in percent; units are noise seeds.

    Attributes:
        epsilons: Noise levels, `[m]`.
        seeds: Noise seeds, the same for every solution.
        base_loss: Loss of the model without any solution, nats per token.
        losses: Loss of each solution without noise, nats per token.
    """

    POINT = "epsilon"
    AXES = {"losses": "directions"}

    epsilons: tuple[float, ...]
    seeds: tuple[int, ...]
    base_loss: float
    losses: dict[str, float]

    def _verify(self) -> None:
        checked_grid(self.epsilons, "epsilons")

    @property
    def grid(self) -> tuple[float, ...]:
        """The noise levels, `[m]`."""
        return self.epsilons

    def gain(self, direction: str) -> float:
        """How much a solution without noise lowers the loss, nats per token."""
        self._index(direction)
        return self.base_loss - self.losses[direction]

    def _whole(self, direction: str) -> float:
        """The gain that can be lost; NaN if there is none."""
        gain = self.gain(direction)
        return gain if gain > 0 else float("nan")

    def _interval(self, values: np.ndarray) -> Interval:
        return mean_over_seeds(values, self.level)

    def _table(self, column: str, more: Mapping[str, np.ndarray] | None = None) -> pd.DataFrame:
        """One row per solution and noise level, with more columns, `[directions, m]` each."""
        rows = []
        for i, name in enumerate(self.directions):
            for place, epsilon in enumerate(self.epsilons):
                rows.append(
                    {
                        "direction": name,
                        "epsilon": epsilon,
                        **self._at(name, epsilon).columns(column),
                        **{key: float(of[i, place]) for key, of in (more or {}).items()},
                        "seeds": len(self.seeds),
                        "gain lost at 100% [nats/token]": self.gain(name),
                        "acting": self._acting(name),
                    }
                )
        return pd.DataFrame(rows)
