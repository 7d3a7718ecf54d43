"""Grids of norms and doses that several directions share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from emlens.directions import Direction


def named(directions: Mapping[str, Direction]) -> None:
    """Check a mapping of named single-layer directions.

    Raises:
        ValueError: If it is empty, or a direction is zero.
        TypeError: If a value is not a `Direction`.
    """
    if not directions:
        raise ValueError("no directions were given; pass {name: direction}")
    for name, direction in directions.items():
        if not isinstance(direction, Direction):
            raise TypeError(
                f"{name!r} is a {type(direction).__name__}; give one layer, e.g. directions[15]"
            )
        if direction.norm == 0:
            raise ValueError(f"direction {name!r} is zero: it has no influence to measure")


def factors_to_norms(directions: Mapping[str, Direction], factors: Sequence[float]) -> list[float]:
    """Factors of the mean norm of the directions."""
    mean = float(np.mean([direction.norm for direction in directions.values()]))
    return [float(factor) * mean for factor in factors]


def residual_size(directions: Mapping[str, Direction]) -> float:
    """Median residual norm that the directions share, or NaN where it is unknown or differs."""
    sizes = {d.residual_norm for d in directions.values() if d.residual_norm is not None}
    places = {(d.layer, d.site) for d in directions.values()}
    return float(np.mean(list(sizes))) if sizes and len(places) == 1 else float("nan")


def dose_of(directions: Mapping[str, Direction], norm: float) -> float:
    """A norm as a share of the residual norm that the directions share."""
    return norm / residual_size(directions)
