"""Objects of the libraries steering-vectors and repeng, as directions and back."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from emlens._door import guarded
from emlens.directions.direction import Directions
from emlens.directions.provenance import Provenance
from emlens.hooked.architecture import norms_what_it_adds
from emlens.hooked.sites import Site

_SITES: dict[str, Site] = {
    "decoder_block": "resid_post",
    "mlp": "mlp_out",
    "self_attn": "attn_out",
}


@guarded
def from_steering_vectors(obj: Any, *, n_layers: int | None = None) -> Directions:
    """Return the directions in a `SteeringVector` of the library steering-vectors.

    Layer `i` of its `"decoder_block"` is added to the output of block `i` (from 0): emlens'
    `resid_post`. `"mlp"` is `mlp_out` and `"self_attn"` is `attn_out`, except where a block norms
    what these modules give before it adds it (Gemma 2 and 3, OLMo 2): there the library hooks the
    module, emlens the norm.

    Args:
        obj: Anything with its `layer_activations` and `layer_type`. float64 is rounded to fp32.
        n_layers: Layers of the model, for an object whose layers are counted from the end.

    Raises:
        TypeError: If it is no such object.
        ValueError: If its layer type is no site, a layer is negative and `n_layers` is not
            given, or the vectors are of several widths or not finite.
    """
    layers, kind = _fields(obj, "layer_activations", "layer_type")
    if kind not in _SITES:
        raise ValueError(
            f"SteeringVector of layer type {kind!r} acts on what a module reads, which is no site "
            f"of the residual stream; emlens takes {', '.join(_SITES)}"
        )
    numbered = {}
    for layer, vector in layers.items():
        if layer < 0 and n_layers is None:
            raise ValueError(
                f"SteeringVector has layer {layer}, counted from the end; say how many the model "
                "has with n_layers="
            )
        place = layer + n_layers if layer < 0 and n_layers is not None else layer
        if place < 0 or place in numbered or (n_layers is not None and place >= n_layers):
            raise ValueError(
                f"SteeringVector has layers {sorted(layers)}: layer {layer} is not one of "
                f"{n_layers}, or occurs twice"
            )
        numbered[int(place)] = vector
    return _directions(numbered, _SITES[kind], "SteeringVector", {"layer_type": kind})


@guarded
def to_steering_vectors(directions: Directions) -> Any:
    """Return the directions as a `SteeringVector`; needs the library steering-vectors.

    It holds the vectors and the site, but not the provenance; for the layer convention see
    `from_steering_vectors`.

    Raises:
        ModuleNotFoundError: If steering-vectors is not installed.
        ValueError: If it does not act at the site: at `resid_pre` and `resid_mid`, and at
            `attn_out` and `mlp_out` of a model whose blocks norm what they add.
    """
    kinds = {site: kind for kind, site in _SITES.items()}
    if directions.site not in kinds:
        raise ValueError(
            f"SteeringVector cannot act at {directions.site}; it acts at {', '.join(kinds)}"
        )
    base = directions.provenance.model or ""
    if directions.site != "resid_post" and norms_what_it_adds(base):
        raise ValueError(
            f"SteeringVector adds to what a module gives, which the blocks of {base} norm before "
            f"they add it: there it would not act at {directions.site}"
        )
    vectors = {layer: vector.clone() for layer, vector in directions.vectors.items()}
    return _imported("steering_vectors", "steering-vectors").SteeringVector(
        layer_activations=vectors, layer_type=kinds[directions.site]
    )


@guarded
def from_repeng(obj: Any) -> Directions:
    """Return the directions in a `ControlVector` of the library repeng.

    Its layer `i` is added to the output of block `i` (from 0): emlens' `resid_post`. It was read
    there too, except the last layer, which repeng reads after the final norm.

    Args:
        obj: Anything with its `model_type` and `directions`. float64 is rounded to fp32. The model
            type is kept as `model_hint` in `provenance.settings`.

    Raises:
        TypeError: If it is no such object.
        ValueError: If a layer is negative (repeng applies none such), or the vectors are of
            several widths or not finite.
    """
    layers, kind = _fields(obj, "directions", "model_type")
    if any(layer < 0 for layer in layers):
        raise ValueError(
            f"ControlVector has layers {sorted(layers)}; repeng applies those from 0 on only, so "
            "number the layers from the start"
        )
    return _directions(layers, "resid_post", "ControlVector", {"model_hint": kind})


@guarded
def to_repeng(directions: Directions, model_type: str | None = None) -> Any:
    """Return the directions as a `ControlVector`; needs the library repeng.

    It holds the vectors, at `resid_post`, but not the provenance. repeng's `set_control` needs
    every layer that its `ControlModel` controls: create it with `directions.layers`.

    Args:
        directions: The directions.
        model_type: `model.config.model_type` of the model; by default the one it was read with.

    Raises:
        ModuleNotFoundError: If repeng is not installed.
        ValueError: If the site is another, or no model type is known.
    """
    if directions.site != "resid_post":
        raise ValueError(
            f"ControlVector acts at resid_post, the output of a block; these directions are at "
            f"{directions.site} and would act elsewhere"
        )
    kind = model_type or directions.provenance.settings.get("model_hint")
    if not kind:
        raise ValueError("ControlVector needs a model type; give model.config.model_type")
    vectors = {layer: vector.numpy().copy() for layer, vector in directions.vectors.items()}
    return _imported("repeng", "repeng").ControlVector(model_type=kind, directions=vectors)


def _fields(obj: Any, layers: str, other: str) -> tuple[Mapping[int, Any], Any]:
    found = getattr(obj, layers, None)
    if not isinstance(found, Mapping) or not hasattr(obj, other):
        raise TypeError(
            f"expected an object with {layers} (a dict by layer) and {other}, found "
            f"{type(obj).__name__}"
        )
    return found, getattr(obj, other)


def _directions(
    layers: Mapping[int, Any], site: Site, library: str, settings: dict[str, object]
) -> Directions:
    vectors = {layer: _vector(vector, layer, library) for layer, vector in layers.items()}
    try:
        return Directions(vectors, site, Provenance(construction=library, settings=settings))
    except ValueError as error:
        raise ValueError(f"{library}: {error}") from error


def _vector(value: Any, layer: int, library: str) -> Tensor:
    # torch warns of arrays that are not writable, as repeng's from a file are
    vector = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
    if vector.ndim == 0 or vector.numel() != vector.shape[-1]:
        raise ValueError(
            f"{library} has shape {list(vector.shape)} at layer {layer}; one vector is needed"
        )
    return vector.reshape(-1)


def _imported(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this needs the library {package} ({error}); pip install {package}"
        ) from error
