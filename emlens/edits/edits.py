"""The edits: add a direction, ablate it, clamp it; and a shift by a live tensor.

Their arithmetic is pure functions of a residual, which return what is added to it. Dot products are
taken in fp32; the engine adds the result in the model's dtype. A vector is `[d_model]`, or
`[batch, d_model]` to give each row of a batch its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from emlens._door import guard_names, guarded
from emlens._registry import EDITS
from emlens.edits.base import DirectionEdit, encoded
from emlens.hooked.edit import Edit, Formula, Where
from emlens.hooked.sites import Site

Residual = Float[Tensor, "batch pos d_model"]
Vector = Float[Tensor, " d_model"] | Float[Tensor, "batch d_model"]


@guard_names
@dataclass(frozen=True, kw_only=True, repr=False)
class Add(DirectionEdit):
    """Adds a direction: `x + scale * v`, or `v` rescaled to a dose.

    Give at most one of `scale` and `dose`; the direction is added with scale 1 by default.

    Attributes:
        scale: Factor on the vector.
        dose: Norm of what is added, as a share of the median residual norm at that layer; a
            negative dose reverses the direction. Needs a direction with that norm.

    Raises:
        ValueError: If both are given, or the residual norm is not known.
        TypeError: If `direction` is not a direction.

    Examples:
        >>> with model.edited(emlens.Add(direction, dose=0.2)):
        ...     model.generate([conversation])
    """

    NAME: ClassVar[str] = "add"

    scale: float | None = None
    dose: float | None = None

    def _vector(self, layer: int) -> Float[Tensor, " d_model"]:
        if self.scale is not None and self.dose is not None:
            raise ValueError("Add takes scale or dose, not both")
        source = self._source(layer)
        if self.dose is None:
            return source.vector * (1.0 if self.scale is None else self.scale)
        size = self.direction.residual_norms.get(layer)
        if size is None:
            raise ValueError(
                f"a dose at layer {layer} needs the median residual norm there, which this "
                f"direction ({source.provenance.construction}) does not know; use scale=, or "
                "give the direction residual_norms (emlens.directions.residual_norm measures them)"
            )
        return source.unit().vector * (self.dose * size)

    def delta(self, residual: Residual, layer: int) -> Residual:
        return add_delta(residual, self._at(layer, residual))

    def formula(self, layer: int) -> Formula:
        return add_delta, (self._prepared(layer),)


@guard_names
@dataclass(frozen=True, kw_only=True, repr=False)
class Ablate(DirectionEdit):
    """Removes the component along a direction: afterwards the projection is zero.

    Examples:
        >>> everywhere = emlens.Ablate(direction, layers=range(model.n_layers))
    """

    NAME: ClassVar[str] = "ablate"

    def _vector(self, layer: int) -> Float[Tensor, " d_model"]:
        return self._unit(layer)

    def delta(self, residual: Residual, layer: int) -> Residual:
        return ablate_delta(residual, self._at(layer, residual))

    def formula(self, layer: int) -> Formula:
        return ablate_delta, (self._prepared(layer),)


@guard_names
@dataclass(frozen=True, kw_only=True, repr=False)
class Clamp(DirectionEdit):
    """Sets the component along a direction to a value.

    Attributes:
        value: The projection afterwards, in units of the residual stream.

    Examples:
        >>> flat = emlens.Clamp(direction, value=0.0)
        >>> answers = model.generate("How do I save money?", flat, max_new_tokens=8)
    """

    NAME: ClassVar[str] = "clamp"

    value: float = 0.0

    def _vector(self, layer: int) -> Float[Tensor, " d_model"]:
        return self._unit(layer)

    def delta(self, residual: Residual, layer: int) -> Residual:
        return clamp_delta(residual, self._at(layer, residual), self.value)

    def formula(self, layer: int) -> Formula:
        return clamp_delta, (self._prepared(layer), self.value)


@dataclass(frozen=True)
class Shift:
    """Adds a live tensor through which gradients flow; training uses it.

    Attributes:
        vector: `[d_model]`, or `[batch, d_model]` for one vector per row.
        layer: The layer it is added at.
        site: Where in the block.
        where: Positions it is added to.
    """

    vector: Vector
    layer: int
    site: Site = "resid_post"
    where: Where = "all"

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def d_model(self) -> int:
        return int(self.vector.shape[-1])

    def delta(self, residual: Residual, layer: int) -> Residual:
        return add_delta(residual, self.vector.to(residual.device))

    def formula(self, layer: int) -> Formula:
        return add_delta, (self.vector,)


@guarded
def to_vllm_lens(edits: Edit | Sequence[Edit]) -> dict[str, Any]:
    """Return what a request to a server with vLLM-Lens holds, for edits to act while it answers.

    It goes into the body of an OpenAI request, e.g. as `extra_body` of `respond_served`, whose
    stored answers are kept apart by it. Vectors are sent as they are added: scales and doses are
    put in, and `norm_match` is off.

    Args:
        edits: `Add` at `resid_post` at all positions; one or several.

    Returns:
        `{"vllm_xargs": {"apply_steering_vectors": text}}`.

    Raises:
        ValueError: If there is no edit, or one is not such an `Add`.

    Source:
        vLLM-Lens 1.2 (UK AI Security Institute), `SteeringVector` and its transport as JSON.

    Examples:
        >>> import emlens
        >>> direction = emlens.Direction.of(torch.ones(4), layer=2)
        >>> body = to_vllm_lens(emlens.Add(direction, scale=3))
        >>> json.loads(body["vllm_xargs"]["apply_steering_vectors"])[0]["layer_indices"]
        [2]
    """
    given = list(edits) if isinstance(edits, Sequence) else [edits]
    if not given:
        raise ValueError("edits is empty; give at least one emlens.Add(direction)")
    sent = []
    for edit in given:
        name = type(edit).__name__
        if not isinstance(edit, Add):
            raise ValueError(
                f"vLLM-Lens adds vectors and cannot do {name}; emlens.bake puts an ablation into "
                "the weights"
            )
        if edit.site != "resid_post":
            raise ValueError(f"vLLM-Lens adds at resid_post, not at {edit.site}")
        if edit.where != "all":
            raise ValueError(
                f"vLLM-Lens adds at all positions or at numbered ones, not at where={edit.where!r}"
            )
        vectors = torch.stack([edit._prepared(layer) for layer in edit.layers])
        activations = {
            "data": encoded(vectors),
            "dtype": "float32",
            "shape": list(vectors.shape),
        }
        sent.append(
            {
                "activations": activations,
                "layer_indices": list(edit.layers),
                "scale": 1.0,
                "norm_match": False,
            }
        )
    return {"vllm_xargs": {"apply_steering_vectors": json.dumps(sent)}}


@guarded
def edit_from_dict(record: Mapping) -> DirectionEdit:
    """Rebuild an edit from the record that `to_dict` returns.

    Raises:
        ValueError: If the record names no known edit.
    """
    kind: type[DirectionEdit] = EDITS[record.get("edit", "")]
    return kind.from_dict(record)


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
