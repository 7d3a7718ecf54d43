"""Vectors and adapters on one tiny model, for the measures that compare them."""

from __future__ import annotations

from pathlib import Path

import torch

import emlens
from emlens import Direction
from emlens.directions import Directions, Provenance
from emlens.hooked.attach import attach
from emlens.hooked.load import Engine
from tests.support.adapters import saved
from tests.support.models import tiny_model
from tests.support.tokenizers import chatml_tokenizer

ADAPTERS = {
    "one": {"layers_to_transform": [2]},
    "other": {"layers_to_transform": [2]},
    "many": {
        "r": 3,
        "use_rslora": True,
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "layers_to_transform": [0, 2],
        "lora_alpha": 2,
    },
}
"""PEFT's settings of each: two of one shape, and one with several modules and layers."""


def with_adapters(folder: Path, engine: Engine = "nnsight") -> emlens.HookedModel:
    """A tiny model with the adapters of `ADAPTERS`; none of them acts."""
    module = tiny_model("llama")
    folders = {
        name: saved(folder / name, module, seed=i, **settings)
        for i, (name, settings) in enumerate(ADAPTERS.items())
    }
    attach(module, folders, "tiny-llama")
    return emlens.wrap(module, chatml_tokenizer(), engine=engine, name="tiny-llama")


def direction(model, layer: int = 1, seed: int = 0, size: float = 3.0) -> Direction:
    """A random direction that knows the residual norm 10."""
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
    return Direction.of(size * vector / vector.norm(), layer, residual_norm=10.0)


def several(model, layers=(0, 2), size: float = 2.0) -> Directions:
    """A random direction at each of several layers."""
    vectors = {layer: direction(model, layer, seed=layer, size=size).vector for layer in layers}
    return Directions(vectors, "resid_post", Provenance("given"))
