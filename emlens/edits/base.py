"""What `Add`, `Ablate` and `Clamp` share: a direction, the layers, the site and the positions."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emlens._arguments import choice, number, shown
from emlens.directions import Direction, Directions, Evidence, Provenance
from emlens.hooked.edit import Where
from emlens.hooked.sites import Site, check_site, named_layers
from emlens.text.batches import sent

_MADE = "make one with Direction.of(vector, layer)"
_WHERE: tuple[Where, ...] = ("all", "prompt", "response")


@dataclass(frozen=True, kw_only=True)
class DirectionEdit:
    """An edit along a direction.

    Attributes:
        direction: The direction(s). A single layer's direction can act at other layers too.
        layers: Layers to act at; those of the direction by default.
        site: Site to act at; that of the direction by default.
        where: Positions to act on, see `emlens.hooked.Where`.
    """

    NAME: ClassVar[str] = ""

    direction: Directions = field(kw_only=False)
    layers: Sequence[int] = None  # type: ignore[assignment]
    site: Site = None  # type: ignore[assignment]
    where: Where = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.direction, Directions):
            several = isinstance(self.direction, (list, tuple, Mapping))
            how = "give each an edit of its own" if several else _MADE
            raise TypeError(
                f"direction of {type(self).__name__} must be a Direction or Directions, not "
                f"{shown(self.direction)}; {how}"
            )
        choice(_WHERE, "where", self.where)
        for name, value in self._settings().items():
            if value is not None:
                object.__setattr__(self, name, number(f"{name} of {type(self).__name__}", value))
        asked = self.direction.layers if self.layers is None else self.layers
        object.__setattr__(self, "layers", named_layers(asked))
        site = self.direction.site if self.site is None else self.site
        named = check_site(site, layers=self.layers)
        object.__setattr__(self, "site", named)
        vectors = {layer: self._vector(layer) for layer in self.layers}
        object.__setattr__(self, "_placed", {(layer, "cpu"): v for layer, v in vectors.items()})

    @property
    def d_model(self) -> int:
        return self.direction.d_model

    @property
    def origin(self) -> str | None:
        """Name of the model that the direction comes from, where known."""
        return self.direction.provenance.model

    def _vector(self, layer: int) -> Float[Tensor, " d_model"]:
        """The vector this edit works with at `layer`, prepared once."""
        raise NotImplementedError

    def _source(self, layer: int) -> Direction:
        if layer in self.direction:
            return self.direction[layer]
        if len(self.direction) == 1:
            return self.direction[self.direction.layers[0]]
        raise ValueError(
            f"{type(self).__name__} at layer {layer}: the directions have layers "
            f"{self.direction.layers}; pick one, e.g. directions[{self.direction.layers[-1]}]"
        )

    def _unit(self, layer: int) -> Float[Tensor, " d_model"]:
        return self._source(layer).unit().vector

    def _prepared(self, layer: int) -> Float[Tensor, " d_model"]:
        return self.__dict__["_placed"][layer, "cpu"]

    def _at(self, layer: int, residual: Tensor) -> Float[Tensor, " d_model"]:
        """The prepared vector on the residual's device; moved there once."""
        placed: dict[tuple[int, str], Tensor] = self.__dict__["_placed"]
        key = (layer, str(residual.device))
        if key not in placed:
            placed[key] = sent(placed[layer, "cpu"], residual.device)
        return placed[key]

    # -- keeping ------------------------------------------------------------------------------

    def to_dict(self) -> dict:
        """A JSON-ready record of the edit, vectors included; `edit_from_dict` reads it."""
        kept = self.direction
        return {
            "edit": self.NAME,
            "layers": list(self.layers),
            "site": self.site,
            "where": self.where,
            "direction": {
                "site": kept.site,
                "provenance": kept.provenance.to_dict(),
                "residual_norms": {str(k): v for k, v in kept.residual_norms.items()},
                "vectors": {str(k): encoded(v) for k, v in kept.vectors.items()},
            },
            **self._settings(),
        }

    def _settings(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in self.own_settings()}

    @classmethod
    def own_settings(cls) -> tuple[str, ...]:
        """Names of the numbers that this edit has beside what all edits share."""
        shared = {item.name for item in fields(DirectionEdit)}
        return tuple(item.name for item in fields(cls) if item.name not in shared)

    @classmethod
    def from_dict(cls, record: Mapping) -> Self:
        """Rebuild an edit of this class from `to_dict`."""
        kept = record["direction"]
        vectors = {int(layer): _decode(text) for layer, text in kept["vectors"].items()}
        norms = {int(layer): size for layer, size in kept["residual_norms"].items()}
        made = Provenance.from_dict(kept["provenance"])
        direction = Directions(vectors, kept["site"], made, Evidence(norms))
        rest = {k: v for k, v in record.items() if k not in ("edit", "direction", "layers")}
        return cls(direction=direction, layers=tuple(record["layers"]), **rest)

    def __repr__(self) -> str:
        settings = "".join(f", {k}={v}" for k, v in self._settings().items() if v is not None)
        return (
            f"{type(self).__name__}({self.direction.provenance.construction}, site={self.site}, "
            f"layers={_listed(self.layers)}, where={self.where}{settings})"
        )


def _listed(layers: Sequence[int]) -> str:
    """Layers, a long run of them as its ends."""
    first, last = layers[0], layers[-1]
    run = len(layers) > 3 and list(layers) == list(range(first, last + 1))
    return f"{first}..{last}" if run else repr(tuple(layers))


def encoded(vector: Tensor) -> str:
    """The numbers of a tensor in float32, little-endian, as base64."""
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").copy())
