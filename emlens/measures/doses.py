"""Doses: how strongly directions and solutions are applied, and the grids that several share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from jaxtyping import Float

from emlens._arguments import shown
from emlens.directions import Direction, residual_norm
from emlens.edits import Ablate, Add
from emlens.hooked import Condition, HookedModel
from emlens.hooked.condition import ConditionLike
from emlens.measures.displacement import SITE, displacements, factors_for
from emlens.measures.solutions import at_norm, directions_of, kind_of, times
from emlens.text import Corpus, TokenBatch, TokenMask

ROUNDING = 0.01
"""Relative difference within which a value identifies a point of a grid."""

ABLATED = 1.0
"""Placeholder for the dose of an ablation, which has none."""


@dataclass(frozen=True)
class Grid:
    """The strengths at which solutions are scored, `[m]` of each.

    Attributes:
        points: Each solution at each point; None stands for strength zero.
        norms: The common norms, where these are matched.
        doses: The same as shares of the median residual norm.
        levels: The common factors or displacements, where these are matched.
        factors: Factor on each solution, where norms are not matched.
        displacements: What was measured at each point, where that is matched.
        place: Where it was measured.
    """

    points: dict[str, list[Condition | None]]
    norms: tuple[float, ...] = ()
    doses: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()
    factors: dict[str, tuple[float, ...]] = field(default_factory=dict)
    displacements: dict[str, tuple[float, ...]] = field(default_factory=dict)
    place: str = ""


def norm_grid(
    solutions: Mapping[str, Condition],
    own: Mapping[str, float],
    norms: Sequence[float] | None,
    factors: Sequence[float],
) -> Grid:
    """All solutions at the same norms: those given, or factors of the mean of their own.

    Raises:
        ValueError: If a norm is negative or not finite, or vectors and adapters are mixed.
    """
    one_kind(solutions)
    mean = float(np.mean(list(own.values())))
    given = [float(factor) * mean for factor in factors] if norms is None else norms
    grid = checked_grid(given, "norms")
    points = {
        name: [at_norm(one, norm, own[name]) if norm > 0 else None for norm in grid]
        for name, one in solutions.items()
    }
    size = residual_size(solutions)
    return Grid(points, norms=tuple(grid), doses=tuple(norm / size for norm in grid))


def own_grid(solutions: Mapping[str, Condition], factors: Sequence[float]) -> Grid:
    """Each solution at factors of its own norm.

    Raises:
        ValueError: If a factor is negative or not finite.
    """
    grid = checked_grid(factors, "factors")
    return Grid(
        {n: [times(one, f) if f > 0 else None for f in grid] for n, one in solutions.items()},
        levels=tuple(grid),
        factors={name: tuple(grid) for name in solutions},
    )


def displaced_grid(
    model: HookedModel,
    batches: Sequence[TokenBatch],
    solutions: Mapping[str, Condition],
    targets: Sequence[float] | None,
    factors: Sequence[float],
    layer: int,
    tokens: TokenMask,
) -> Grid:
    """Each solution at the strengths at which it displaces the residual stream alike.

    Args:
        model: The model.
        batches: Tokens that the displacement is measured on.
        solutions: What displaces it.
        targets: Displacements; by default `factors` times the geometric mean of those of the
            unscaled solutions.
        factors: See `targets`.
        layer: Where it is measured.
        tokens: Tokens that count.

    Raises:
        ValueError: If a displacement is negative, not finite or out of reach, or a solution
            displaces nothing at that layer.
    """
    measure = partial(displacements, model, batches, layer=layer, tokens=tokens)
    own = measure(solutions)
    for name, displaced in own.items():
        if displaced == 0:
            raise ValueError(
                f"{name!r} displaces nothing at {SITE} of layer {layer}; measure it at a layer "
                "above those that it acts at"
            )
    # geometric, so that one solution with a large displacement does not set the grid for all
    mean = float(np.exp(np.mean(np.log(list(own.values())))))
    given = [float(factor) * mean for factor in factors] if targets is None else targets
    grid = checked_grid(given, "displacements")
    known = {name: [(1.0, displaced)] for name, displaced in own.items()}
    found = factors_for(solutions, grid, measure, known)
    return Grid(
        {
            name: [times(one, factor) if factor > 0 else None for factor, _ in found[name]]
            for name, one in solutions.items()
        },
        levels=tuple(grid),
        factors={name: tuple(factor for factor, _ in at) for name, at in found.items()},
        displacements={name: tuple(moved for _, moved in at) for name, at in found.items()},
        place=f"{SITE} of layer {layer}",
    )


def named(directions: Mapping[str, Direction]) -> None:
    """Check a mapping of named single-layer directions.

    Raises:
        ValueError: If it is empty, or a direction is zero.
        TypeError: If a value is not a `Direction`.
    """
    if not isinstance(directions, Mapping):
        raise TypeError(f"directions must be named, {{name: direction}}, not {shown(directions)}")
    if not directions:
        raise ValueError("no directions were given; pass {name: direction}")
    for name, direction in directions.items():
        if not isinstance(direction, Direction):
            raise TypeError(
                f"{name!r} is a {type(direction).__name__}; give one layer, e.g. directions[15]"
            )
        if direction.norm == 0:
            raise ValueError(f"direction {name!r} is zero: it has no influence to measure")


def checked_grid(values: Sequence[float], what: str) -> list[float]:
    """Return the values of a grid, checked.

    Args:
        values: Norms, factors or displacements.
        what: Name of the values in errors.

    Raises:
        ValueError: If there are none, or one is negative or not finite.
    """
    grid = [float(value) for value in values]
    if not grid:
        raise ValueError(f"no {what} were given; give at least one")
    if not np.isfinite(grid).all():
        raise ValueError(f"{what} must be finite; got {grid}")
    if min(grid) < 0:
        raise ValueError(f"{what} must not be negative; got {min(grid):g}")
    return grid


def place_on(grid: Sequence[float], value: float, what: str) -> int:
    """Return the index of a value on a grid that was measured, up to rounding.

    Raises:
        ValueError: If it was not measured.
    """
    place = int(np.argmin(np.abs(np.asarray(grid) - value)))
    if not np.isclose(grid[place], value, rtol=ROUNDING, atol=1e-9):
        listed = ", ".join(f"{known:.4g}" for known in grid)
        raise ValueError(f"nothing was measured at {what} {value:g}; there is {listed}")
    return place


def one_kind(solutions: Mapping[str, Condition]) -> None:
    """Reject a common grid of norms for vectors and adapters.

    Raises:
        ValueError: If both are given.
    """
    kinds = {kind_of(solution): name for name, solution in solutions.items()}
    if len(kinds) > 1:
        raise ValueError(
            f"{kinds['vector']!r} is a vector and {kinds['adapter']!r} an adapter: their norms "
            "have different units (residual stream, weights) and no common grid; use "
            'match="displacement", which applies to both, or match="own"'
        )


def residual_size(solutions: Mapping[str, Condition]) -> float:
    """Median residual norm that single-layer vectors share; NaN if they have none in common."""
    vectors = [directions_of(one) for one in solutions.values() if kind_of(one) == "vector"]
    directions = [one for one in vectors if isinstance(one, Direction)]
    sizes = {d.residual_norm for d in directions if d.residual_norm is not None}
    places = {(d.layer, d.site) for d in directions}
    if not sizes or len(places) != 1 or len(directions) != len(solutions):
        return float("nan")
    return float(np.mean(list(sizes)))


def strengths(
    every: Mapping[str, Direction],
    sizes: Mapping[tuple[str, int], float],
    doses: Sequence[float],
    norms: Sequence[float] | None,
    edit: str,
) -> dict[str, list[float]]:
    """Signed norm of what is added, by direction."""
    if edit == "ablate":
        return {name: [float("nan")] for name in every}
    if norms is not None:
        return dict.fromkeys(every, checked_grid(norms, "norms"))
    return {name: [float(x) * sizes[d.site, d.layer] for x in doses] for name, d in every.items()}


def doses_of(
    doses: Sequence[float],
    norms: Sequence[float] | None,
    edit: str,
    sizes: Mapping[tuple[str, int], float],
) -> tuple[float, ...]:
    if edit == "ablate":
        return (ABLATED,)
    if norms is None:
        return tuple(float(dose) for dose in doses)
    size = next(iter(sizes.values())) if len(sizes) == 1 else float("nan")
    return tuple(float(norm) / size for norm in norms)


def added(
    every: Mapping[str, Direction], grid: Mapping[str, Sequence[float]], edit: str
) -> dict[tuple[str, int], ConditionLike]:
    """Every direction at every point of the grid, by name and place."""
    return {
        (name, j): [Ablate(x)] if edit == "ablate" else [Add(x.scaled_to(norm))]
        for name, x in every.items()
        for j, norm in enumerate(grid[name])
    }


def gathered(
    values: Mapping[tuple[str, int], np.ndarray], points: Mapping[str, int], n: int
) -> Float[np.ndarray, "directions points documents"]:
    """Per-document values by direction and point; a single point is repeated everywhere."""
    return np.array([[values[name, min(j, m - 1)] for j in range(n)] for name, m in points.items()])


def sizes_of(
    model: HookedModel,
    corpus: Corpus,
    directions: Mapping[str, Direction],
    max_tokens: int,
    token_budget: int,
) -> dict[tuple[str, int], float]:
    """Median residual norm on the corpus at every place a direction is added."""
    places: dict = {}
    for direction in directions.values():
        places.setdefault(direction.site, set()).add(direction.layer)
    return {
        (site, layer): size
        for site, layers in places.items()
        for layer, size in residual_norm(
            model,
            corpus,
            layers,
            site=site,
            max_tokens=max_tokens,
            token_budget=token_budget,
        ).items()
    }
