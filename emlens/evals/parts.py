"""What the tables of evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from emlens._stats import Interval
from emlens.directions import Direction, Directions
from emlens.evals.behaviour import Effect

BASE, ORGANISM = "base", "organism"
NO_EFFECT = "the organism's effect is not clear of zero"
NOT_SCORED = "nothing that both could be scored on shows the effect"
"""Why a share of an effect is left blank."""


def one_of(directions: Directions, layer: int | None) -> Direction:
    """The direction of a layer, the middle one by default.

    Raises:
        ValueError: If there is none at that layer.
    """
    if isinstance(directions, Direction) and layer in (None, directions.layer):
        return directions
    layers = directions.layers
    wanted = layers[len(layers) // 2] if layer is None else layer
    if wanted not in directions:
        raise ValueError(f"there is no direction at layer {wanted}; the layers are {layers}")
    return directions[wanted]


def averaged(effect: Effect, name: str, members: Sequence[str]) -> Effect:
    """Replace some conditions by their mean, prompt by prompt."""
    if not members:
        return effect
    places = [effect.conditions.index(member) for member in members]
    kept = [i for i in range(len(effect.conditions)) if i not in places]
    mean = np.mean([effect.of(member) for member in members], axis=0)
    return replace(
        effect,
        conditions=(*(effect.conditions[i] for i in kept), name),
        values=(*(effect.values[i] for i in kept), tuple(mean.tolist())),
        coherent=(
            *(effect.coherent[i] for i in kept),
            float(np.mean([effect.coherent[i] for i in places])),
        ),
    )


def triple(interval: Interval) -> tuple[float, float, float]:
    """Estimate and ends, as results keep them."""
    return interval.estimate, interval.low, interval.high
