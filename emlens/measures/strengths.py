"""How strongly each direction is added, at every place it is added at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from emlens.directions import Direction, residual_norm
from emlens.edits import Ablate, Add
from emlens.hooked import ConditionLike, HookedModel
from emlens.measures.grids import checked_grid
from emlens.text import Corpus

ABLATED = 1.0
"""What stands for the dose of an ablation, which has none."""


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
) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Per-document values by direction and point; what has one point has it everywhere."""
    return tuple(
        tuple(tuple(values[name, min(j, m - 1)].tolist()) for j in range(n))
        for name, m in points.items()
    )


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
