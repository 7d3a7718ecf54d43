"""The directions that a Fisher profile is asked to score, checked and put together by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emlens.directions import Directions

Scored = Directions | Mapping[str, Directions] | Mapping[int, Tensor | np.ndarray]
"""Directions, named directions, or arrays `[n, d_model]` (or `[d_model]`) by layer."""

HELD_OUT = "found on half"


@dataclass
class Group:
    """Vectors of one layer that the same documents count for.

    Attributes:
        layer: The layer.
        half: The half of the documents that counts; None for all.
        names: What they are called.
        constructions: How they were made.
        places: Their places among all.
        parts: The vectors.
    """

    layer: int
    half: int | None
    names: list[str] = field(default_factory=list)
    constructions: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    parts: list[Float[Tensor, "n d_model"]] = field(default_factory=list)

    @cached_property
    def vectors(self) -> Float[Tensor, "n d_model"]:
        """The vectors, one below the other."""
        return torch.cat(self.parts)

    @cached_property
    def norms(self) -> np.ndarray:
        """Their norms, `[n]`."""
        return self.vectors.double().norm(dim=1).numpy()


@dataclass(frozen=True)
class Expected:
    """What directions have to fit.

    Attributes:
        model: Name of the model.
        layers: Layers that are known.
        d_model: Width.
        corpora: Hashes of the corpora of the profile.
    """

    model: str
    layers: tuple[int, ...]
    d_model: int
    corpora: frozenset[str]


def grouped(directions: Scored, expected: Expected) -> list[Group]:
    """Return the vectors to score, by layer and by the documents that count.

    Raises:
        TypeError: If something is neither directions nor an array.
        ValueError: If there are none, or one is zero or not finite, has another width, layer or
            site, or comes from another model.
    """
    if isinstance(directions, Directions):
        directions = {directions.provenance.construction: directions}
    if not isinstance(directions, Mapping):
        raise TypeError(
            f"directions are a {type(directions).__name__}; pass directions, {{name: direction}} "
            "or {layer: array [n, d_model]}"
        )
    if not directions:
        raise ValueError("no directions were given; pass {name: direction}")
    groups: dict[tuple[int, int | None], Group] = {}
    n = 0
    for key, value in directions.items():
        parts = _of_directions if isinstance(value, Directions) else _of_array
        for layer, half, names, made, vectors in parts(key, value, expected):  # type: ignore[arg-type]
            _check_place(names[0], layer, vectors.shape[1], expected)
            group = groups.setdefault((layer, half), Group(layer, half))
            group.names += names
            group.constructions += [made] * len(names)
            group.parts.append(vectors)
            group.places += range(n, n + len(names))
            n += len(names)
    for group in groups.values():
        _check_values(group)
    return list(groups.values())


_Part = tuple[int, int | None, list[str], str, Tensor]


def _of_directions(name: object, value: Directions, expected: Expected) -> list[_Part]:
    made = value.provenance
    if made.model not in (None, expected.model):
        raise ValueError(
            f"{name!r} was made in {made.model!r}, but the profile belongs to {expected.model!r}; "
            "score it with a profile of its own model"
        )
    if value.site != "resid_post":
        raise ValueError(
            f"{name!r} is at {value.site}, but profiles cover resid_post; resid_pre of a layer "
            "is resid_post of the layer below"
        )
    found = made.settings.get(HELD_OUT)
    half = None
    # a document is in the same half of every profile that its corpus is part of
    if isinstance(found, Mapping) and expected.corpora & set(made.data.values()):
        half = 1 - int(found["half"])  # type: ignore[arg-type]
    return [
        (layer, half, [str(name)], made.construction, vector[None])
        for layer, vector in value.vectors.items()
    ]


def _of_array(name: object, value: Tensor | np.ndarray, expected: Expected) -> list[_Part]:
    if not isinstance(value, (Tensor, np.ndarray)):
        raise TypeError(f"{name!r} is a {type(value).__name__}; give a direction or an array")
    if isinstance(name, bool) or not isinstance(name, (int, np.integer)):
        raise TypeError(
            f"{name!r} is an array without a layer; pass {{layer: array}}, or make "
            "it a direction with Direction.of(vector, layer)"
        )
    vectors = torch.as_tensor(value).detach().cpu().float()
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(
            f"the array of layer {name} has shape {tuple(vectors.shape)}; it needs [n, d_model]"
        )
    names = [f"{i}" for i in range(len(vectors))]
    return [(int(name), None, names, "given", vectors)]


def _check_place(name: str, layer: int, width: int, expected: Expected) -> None:
    if layer not in expected.layers:
        have = ", ".join(map(str, expected.layers))
        raise ValueError(f"{name!r} is at layer {layer}; the profile has layers {have}")
    if width != expected.d_model:
        raise ValueError(
            f"{name!r} has width {width}, but the profile belongs to {expected.model!r} with "
            f"d_model {expected.d_model}"
        )


def _check_values(group: Group) -> None:
    bad = ~np.isfinite(group.norms)
    if bad.any():
        name = group.names[int(bad.argmax())]
        raise ValueError(f"direction {name!r} at layer {group.layer} is not finite")
    if (group.norms == 0).any():
        name = group.names[int(group.norms.argmin())]
        raise ValueError(f"direction {name!r} is zero: it has no influence to measure")
