"""The arithmetic of edits: pure functions of a residual that return what is added to it.

Dot products are taken in fp32; the engine adds the result in the model's dtype. A vector is
`[d_model]`, or `[batch, d_model]` to give each row of a batch its own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Residual = Float[Tensor, "batch pos d_model"]
Vector = Float[Tensor, " d_model"] | Float[Tensor, "batch d_model"]


def add_delta(residual: Residual, vector: Vector) -> Residual:
    """The same displacement at every position."""
    return _spread(vector).expand_as(residual)


def ablate_delta(residual: Residual, unit: Vector) -> Residual:
    """Minus the component along `unit`: afterwards the projection is zero.

    `x - (x . u) u`, arXiv 2506.11618, section 3.3.
    """
    return -_projection(residual, unit) * _spread(unit)


def clamp_delta(residual: Residual, unit: Vector, value: float) -> Residual:
    """What sets the component along `unit` to `value`, in units of the residual stream."""
    return (value - _projection(residual, unit)) * _spread(unit)


def _projection(residual: Tensor, unit: Tensor) -> Tensor:
    return torch.sum(residual.float() * _spread(unit), dim=-1, keepdim=True)


def _spread(vector: Tensor) -> Tensor:
    return vector.float() if vector.dim() == 1 else vector.float().unsqueeze(1)
