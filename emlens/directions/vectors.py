"""Vectors of single layers: their cosine, and what they have to be."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emlens._arguments import shown, whole
from emlens._door import guarded


@guarded
def cosine(first: Float[Tensor, " d_model"], second: Float[Tensor, " d_model"]) -> float:
    """Signed cosine between two vectors; NaN when one of them is zero.

    Raises:
        ValueError: If they are not two vectors of one width.
    """
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"a cosine takes two vectors of one width, not shapes {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    a, b = first.double(), second.double()
    scale = a.norm() * b.norm()
    return float(a @ b / scale) if scale > 0 else float("nan")


def checked_vectors(vectors: Mapping[int, Tensor]) -> dict[int, Float[Tensor, " d_model"]]:
    """Copies in fp32 on the CPU, by ascending layer.

    Raises:
        ValueError: If there are none, a layer is negative, shapes differ, or a value is not
            finite.
    """
    if not isinstance(vectors, Mapping):
        raise TypeError(f"directions are made of {{layer: vector}}, not of {shown(vectors)}")
    if not vectors:
        raise ValueError("directions need at least one layer")
    given = {whole("layer", layer): vector for layer, vector in vectors.items()}
    plain = {layer: _plain(given[layer]) for layer in sorted(given)}
    if min(plain) < 0:
        raise ValueError(f"layers are numbered from 0, so there is no layer {min(plain)}")
    shapes = {layer: tuple(vector.shape) for layer, vector in plain.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 1:
        raise ValueError(f"every layer needs one vector of the same width; got shapes {shapes}")
    if shapes[min(plain)] == (0,):
        raise ValueError(f"the vector of layer {min(plain)} has width 0")
    for layer, vector in plain.items():
        _check_finite(vector, f"the vector of layer {layer}")
    return plain


def checked_evidence(
    items: Mapping[int, Tensor] | None, vectors: Mapping[int, Tensor], what: str, ndim: int = 1
) -> Mapping[int, Tensor]:
    """What is known of each vector, `[..., d_model]`, as fp32 copies on the CPU.

    Raises:
        ValueError: If it is of a layer without a vector, of another shape, or not finite.
    """
    found = {int(layer): _plain(value) for layer, value in (items or {}).items()}
    for layer, value in found.items():
        if layer not in vectors:
            raise ValueError(f"there are {what} of layer {layer}, but no vector")
        width = len(vectors[layer])
        if value.ndim != ndim or value.shape[-1] != width:
            raise ValueError(
                f"the {what} of layer {layer} have shape {tuple(value.shape)}; the vector has "
                f"width {width}"
            )
        _check_finite(value, f"of the {what}, layer {layer}")
    return MappingProxyType(found)


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
