"""How far solutions displace the residual stream, and the factors at which that is a given share.

Displacement is the only measure of size that vectors and adapters have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from emlens._distributed import shared
from emlens.hooked import Condition, HookedModel, pools
from emlens.measures.solutions import times
from emlens.text import TokenBatch, TokenMask

SITE = "resid_post"
TOLERANCE = 0.01
"""Relative difference within which a displacement counts as the requested one."""
ROUNDS = 12
LARGEST_FACTOR = 256.0

K = TypeVar("K", bound=Hashable)

Point = tuple[str, float]
"""A solution and the factor on it."""

Points = list[tuple[float, float]]
"""`(factor, displacement)`, measured, by factor."""


@torch.no_grad()
def displacements(
    model: HookedModel,
    batches: Sequence[TokenBatch],
    conditions: Mapping[K, Condition],
    layer: int,
    tokens: TokenMask = "response",
) -> dict[K, float]:
    """Return how far each condition displaces the residual stream at one layer.

    The root of the mean squared displacement of `resid_post` over the counted tokens, as a share
    of the median norm of the residual there without any.

    Args:
        model: The model.
        batches: Tokens.
        conditions: What displaces it, by name.
        layer: Where it is read.
        tokens: Tokens that count.

    Raises:
        ValueError: If no token counts.
    """

    def read(batches: Sequence[TokenBatch]) -> tuple[np.ndarray, Tensor]:
        squares, sizes = np.zeros(len(conditions)), []
        for batch in batches:
            pool = pools.counted(batch.mask(tokens))
            with model.under([]):
                base = model.residuals(batch, layer, SITE, pool)[layer]
            sizes.append(base.norm(dim=-1).cpu())
            for i, condition in enumerate(conditions.values()):
                with model.under(condition):
                    moved = model.residuals(batch, layer, SITE, pool)[layer]
                squares[i] += float((moved - base).double().square().sum())
        return squares, torch.cat([torch.empty(0), *sizes])

    what = f"displacement of {SITE} of layer {layer} on {tokens} tokens"
    parts = shared(model, batches, read, what)
    norms = torch.cat([sizes for _, sizes in parts])
    if not len(norms):
        raise ValueError(f"the data have no {tokens} tokens, so no displacement can be measured")
    mean = sum(squares for squares, _ in parts) / len(norms)
    shares = np.sqrt(mean) / float(norms.median())
    return dict(zip(conditions, shares.tolist(), strict=True))


def factors_for(
    solutions: Mapping[str, Condition],
    targets: Sequence[float],
    measure: Callable[[Mapping[Point, Condition]], Mapping[Point, float]],
    known: Mapping[str, Points] | None = None,
) -> dict[str, list[tuple[float, float]]]:
    """Return the factor on each solution at which it displaces by each target, and how far it does.

    Displacements are measured at a few factors, bracketed and interpolated until each is within
    `TOLERANCE` of its target.

    Args:
        solutions: What is scaled, by name.
        targets: Displacements, not negative.
        measure: Measures the displacement of conditions.
        known: Points that were measured before, by solution.

    Returns:
        `(factor, displacement measured there)` per target, by solution.

    Raises:
        ValueError: If a displacement is out of reach.
    """
    points: dict[str, Points] = {
        name: sorted([(0.0, 0.0), *(known or {}).get(name, [])]) for name in solutions
    }
    for _ in range(ROUNDS):
        wanted: dict[tuple[str, float], float] = {}
        for name in solutions:
            for target in targets:
                if not _met(nearest(points[name], target), target):
                    wanted[name, next_factor(points[name], target)] = target
        if not wanted:
            break
        for (name, factor), target in wanted.items():
            if factor > LARGEST_FACTOR:
                far, reached = points[name][-1]
                raise ValueError(
                    f"{name!r} displaces the residual stream by {reached:.3g} of its median norm "
                    f"at {far:.3g} times its strength, but {target:.3g} was requested; give "
                    "smaller displacements"
                )
        scaled = {at: times(solutions[at[0]], at[1]) for at in sorted(wanted)}
        for (name, factor), displacement in measure(scaled).items():
            points[name] = sorted([*points[name], (factor, displacement)])
    return {name: [nearest(points[name], target) for target in targets] for name in solutions}


def _met(point: tuple[float, float], target: float) -> bool:
    return abs(point[1] - target) <= TOLERANCE * target


def nearest(points: Points, target: float) -> tuple[float, float]:
    """The measured point whose displacement is nearest to a target."""
    return min(points, key=lambda point: (abs(point[1] - target), point[0]))


def next_factor(points: Points, target: float) -> float:
    """The factor to measure next: between the first two points around the target, or beyond."""
    for (low, below), (high, above) in zip(points, points[1:], strict=False):
        if below <= target <= above:
            share = (target - below) / (above - below)
            # an end that is hit repeatedly would keep the bracket open on the other side
            return low + (high - low) * min(max(share, 0.05), 0.95)
    factor, displacement = points[-1]
    if factor == 0:
        return 1.0
    return factor * min(max(1.2 * target / displacement, 1.5), 4.0) if displacement else 4 * factor
