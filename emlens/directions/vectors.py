"""Vectors by layer and what is known about them: the base of `Directions`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Never

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emlens._arguments import shown, whole
from emlens._door import guarded
from emlens.directions.provenance import Provenance
from emlens.hooked.sites import Site, SiteName, check_site


@guarded
def cosine(first: Float[Tensor, " d_model"], second: Float[Tensor, " d_model"]) -> float:
    """Signed cosine between two vectors; NaN when one of them is zero.

    Raises:
        ValueError: If they are not two vectors of the same width.
    """
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"a cosine takes two vectors of one width, not shapes {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    a, b = first.double(), second.double()
    scale = a.norm() * b.norm()
    return float(a @ b / scale) if scale > 0 else float("nan")


class Tensors(Mapping[int, Tensor]):
    """Tensors by ascending layer, fp32 on the CPU; what is looked up is a copy."""

    def __init__(self, given: Mapping[int, Tensor]) -> None:
        plain = {whole("layer", layer): _plain(tensor) for layer, tensor in given.items()}
        self._held = {layer: plain[layer] for layer in sorted(plain)}

    def __getitem__(self, layer: int) -> Tensor:
        return self._held[layer].clone()

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return repr(self._held)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known about vectors beside their provenance, by layer; immutable.

    Attributes:
        residual_norms: Median norm of the residual at each layer; the unit of doses.
        standard_errors: Standard error of each coordinate, `[d_model]`.
        split_half: Cosine between the directions of two random halves of the data, averaged over
            several splits.
        means: Mean activation of the data, `[d_model]`.
        shuffled: The same construction with shuffled labels, `[draws, d_model]`: the directions
            that chance alone gives on this data.
        auroc: Area under the ROC curve of the projection on held-out conversations.
        measured: Further figures of the construction by layer, by their column in
            `Directions.table`.
    """

    residual_norms: Mapping[int, float] = field(default_factory=dict)
    standard_errors: Mapping[int, Float[Tensor, " d_model"]] = field(default_factory=dict)
    split_half: Mapping[int, float] = field(default_factory=dict)
    means: Mapping[int, Float[Tensor, " d_model"]] = field(default_factory=dict)
    shuffled: Mapping[int, Float[Tensor, "draws d_model"]] = field(default_factory=dict)
    auroc: Mapping[int, float] = field(default_factory=dict)
    measured: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("residual_norms", "split_half", "auroc"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        for name in ("standard_errors", "means", "shuffled"):
            given = getattr(self, name)
            object.__setattr__(self, name, given if isinstance(given, Tensors) else Tensors(given))
        measured = {name: MappingProxyType(dict(of)) for name, of in self.measured.items()}
        object.__setattr__(self, "measured", MappingProxyType(measured))

    def at(self, layers: Sequence[int]) -> Evidence:
        """What is known of some of the layers."""

        def kept(items: Mapping) -> dict:
            return {layer: items[layer] for layer in layers if layer in items}

        return Evidence(
            kept(self.residual_norms),
            kept(self.standard_errors),
            kept(self.split_half),
            kept(self.means),
            kept(self.shuffled),
            kept(self.auroc),
            {name: kept(of) for name, of in self.measured.items()},
        )

    def scaled(self, factor: float) -> Evidence:
        """What is known of the vectors times a factor."""
        errors, draws = self.standard_errors, self.shuffled
        return replace(
            self,
            standard_errors={layer: error * abs(factor) for layer, error in errors.items()},
            shuffled={layer: drawn * factor for layer, drawn in draws.items()},
            auroc={k: value if factor > 0 else 1 - value for k, value in self.auroc.items()},
            measured=self.measured if factor > 0 else {},
        )

    def check(self, vectors: Mapping[int, Tensor]) -> None:
        """Compare with the vectors that this is about.

        Raises:
            ValueError: If a layer has no vector, or another width, or a value is not finite.
        """
        for what, tensors, ndim in (
            ("standard errors", self.standard_errors, 1),
            ("means", self.means, 1),
            ("shuffled draws", self.shuffled, 2),
        ):
            for layer, value in tensors.items():
                if layer not in vectors:
                    raise ValueError(f"there are {what} of layer {layer}, but no vector")
                width = len(vectors[layer])
                if value.ndim != ndim or value.shape[-1] != width:
                    raise ValueError(
                        f"the {what} of layer {layer} have shape {tuple(value.shape)}; the vector "
                        f"has width {width}"
                    )
                _check_finite(value, f"of the {what}, layer {layer}")


class Vectors:
    """Vectors at one site, by layer, with their provenance and evidence: a record, immutable.

    Args:
        vectors: A vector `[d_model]` per layer.
        site: Where in the block.
        provenance: How they were made.
        evidence: What else is known about them.

    Raises:
        ValueError: If there are no vectors, a layer is negative, widths differ, or a value is not
            finite.
    """

    site: Site
    provenance: Provenance
    evidence: Evidence
    _vectors: Mapping[int, Float[Tensor, " d_model"]]

    def __init__(
        self,
        vectors: Mapping[int, Float[Tensor, " d_model"]],
        site: SiteName = "resid_post",
        provenance: Provenance | None = None,
        evidence: Evidence | None = None,
    ) -> None:
        own, known = checked_vectors(vectors), evidence or Evidence()
        provenance = provenance or Provenance("given")
        at = check_site(site, layers=own)
        known.check(own)
        vars(self).update(_vectors=own, site=at, provenance=provenance, evidence=known)

    def __setattr__(self, name: str, value: object) -> Never:
        raise AttributeError(f"{type(self).__name__} cannot be changed; make another")

    def __delattr__(self, name: str) -> Never:
        raise AttributeError(f"{type(self).__name__} cannot be changed; make another")

    @property
    def vectors(self) -> Mapping[int, Float[Tensor, " d_model"]]:
        """The vectors by layer; each that is looked up is a copy."""
        return self._vectors

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._vectors)

    @property
    def d_model(self) -> int:
        return len(next(iter(self._vectors.values())))

    @property
    def norms(self) -> dict[int, float]:
        """Norm of each vector, in units of the residual stream."""
        return {layer: float(vector.norm()) for layer, vector in self._vectors.items()}

    @property
    def doses(self) -> dict[int, float]:
        """Norm of each vector as a share of the median residual norm, where that is known."""
        norms = self.norms
        return {layer: norms[layer] / size for layer, size in self.residual_norms.items()}

    @property
    def residual_norms(self) -> Mapping[int, float]:
        return self.evidence.residual_norms

    @property
    def standard_errors(self) -> Mapping[int, Float[Tensor, " d_model"]]:
        return self.evidence.standard_errors

    @property
    def split_half(self) -> Mapping[int, float]:
        return self.evidence.split_half

    @property
    def means(self) -> Mapping[int, Float[Tensor, " d_model"]]:
        return self.evidence.means

    @property
    def shuffled(self) -> Mapping[int, Float[Tensor, "draws d_model"]]:
        return self.evidence.shuffled

    @property
    def auroc(self) -> Mapping[int, float]:
        return self.evidence.auroc

    @property
    def measured(self) -> Mapping[str, Mapping[int, float]]:
        return self.evidence.measured


def checked_vectors(vectors: Mapping[int, Tensor]) -> Tensors:
    """Vectors that are of one width, and finite.

    Raises:
        ValueError: If there are none, a layer is negative, shapes differ, or a value is not
            finite.
    """
    if not isinstance(vectors, Mapping):
        raise TypeError(f"directions are made of {{layer: vector}}, not of {shown(vectors)}")
    if not vectors:
        raise ValueError("directions need at least one layer")
    own = Tensors(vectors)
    first = next(iter(own))
    if first < 0:
        raise ValueError(f"layers are numbered from 0, so there is no layer {first}")
    shapes = {layer: tuple(vector.shape) for layer, vector in own.items()}
    if len(set(shapes.values())) != 1 or len(shapes[first]) != 1:
        raise ValueError(f"every layer needs one vector of the same width; got shapes {shapes}")
    if shapes[first] == (0,):
        raise ValueError(f"the vector of layer {first} has width 0")
    for layer, vector in own.items():
        _check_finite(vector, f"the vector of layer {layer}")
    return own


def nonzero(vector: Tensor, layer: int) -> Tensor:
    """The vector itself.

    Raises:
        ValueError: If it is zero.
    """
    if float(vector.norm()) == 0:
        raise ValueError(f"the vector of layer {layer} is zero: it has no direction")
    return vector


def _check_finite(value: Tensor, what: str) -> None:
    if bool(value.sum().isfinite()):
        return
    if bad := int((~torch.isfinite(value)).sum()):
        raise ValueError(f"{what} has {bad} value(s) that are not finite")


def _plain(vector: Any) -> Tensor:
    if isinstance(vector, np.ndarray) and vector.dtype.kind in "fiu":
        vector = torch.from_numpy(vector)
    if isinstance(vector, Tensor) and vector.is_complex():
        raise ValueError("a vector holds complex numbers; real ones are needed")
    if not isinstance(vector, Tensor):
        raise TypeError(f"a vector must be a tensor of real numbers, not {shown(vector)}")
    return vector.detach().to("cpu", torch.float32).clone()
