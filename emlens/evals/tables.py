"""What the tables of evaluation share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from emlens._stats import Interval
from emlens.directions import Direction, Directions
from emlens.evals.behaviour import Effect

ORGANISM = "organism"
NO_EFFECT = "the organism's effect is not clear of zero"
NOT_SCORED = "nothing that both could be scored on shows the effect"
"""Why a share of an effect is left blank."""


def single_layer(directions: Directions, layer: int | None) -> Direction:
    """The direction of a layer, the middle one by default.

    Raises:
        ValueError: If there is none at that layer.
    """
    layers = directions.layers
    wanted = layers[len(layers) // 2] if layer is None else layer
    if wanted not in directions:
        raise ValueError(f"there is no direction at layer {wanted}; the layers are {layers}")
    return directions[wanted]


def averaged(effect: Effect, name: str, members: Sequence[str]) -> Effect:
    """Replace some conditions by their mean, prompt by prompt, at the place of the first."""
    if not members:
        return effect
    names, places = effect.conditions, [effect.conditions.index(member) for member in members]
    mean = np.mean([effect.of(member) for member in members], axis=0)
    coherent = float(np.mean([effect.coherent[i] for i in places]))

    def replaced(values: Iterable, new: object) -> tuple:
        kept = [(i, value) for i, value in enumerate(values) if i not in places[1:]]
        return tuple(new if i == places[0] else value for i, value in kept)

    return replace(
        effect,
        conditions=replaced(names, name),
        values=np.stack(replaced(effect.values, mean)),
        coherent=replaced(effect.coherent, coherent),
        acting=effect.acting | {name: effect.acting.get(members[0], "")},
    )


def triple(interval: Interval) -> tuple[float, float, float]:
    """Estimate and ends, as results keep them."""
    return interval.estimate, interval.low, interval.high
