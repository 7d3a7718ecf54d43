"""What a call changes on the user's module while it runs, and puts back when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run without dropout; every submodule gets its own mode back, not that of the whole."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def frozen_weights(module: nn.Module) -> Iterator[None]:
    """Switch the gradients of all weights off."""
    flags = [(weight, weight.requires_grad) for weight in module.parameters()]
    for weight, _ in flags:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)


@contextmanager
def neutral_generation(module: PreTrainedModel) -> Iterator[None]:
    """Set aside the checkpoint's own generation defaults (penalties, top-k)."""
    from transformers import GenerationConfig

    before = module.generation_config
    module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        module.generation_config = before
