"""Gradient checkpointing: what a block computes inside is computed again for the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from emlens._door import guarded
from emlens.hooked.edit import Edit
from emlens.hooked.model import HookedModel

_AROUND = ("resid_pre", "resid_post")


@contextmanager
@guarded
def gradient_checkpointing(model: HookedModel, edits: Sequence[Edit] = ()) -> Iterator[None]:
    """Keep only what enters each block while a graph is built, in the model's own blocks.

    The gradient is the same; the backward pass may lie inside of the block or after it.

    Args:
        model: The model.
        edits: Edits that will be in force, besides those of an enclosing `model.edited`.

    Raises:
        ValueError: If an edit acts inside of a block: hooks are gone when it is computed again.
    """
    inside = {edit.site for edit in model.edits_in_force(edits) if edit.site not in _AROUND}
    if inside:
        raise ValueError(
            f"gradient checkpointing computes the inside of a block again without hooks, but an "
            f"edit acts at {', '.join(sorted(inside))}; edit at {' or '.join(_AROUND)}, or train "
            "with gradient_checkpointing=False"
        )
    blocks = list(model.module.get_submodule(model.architecture.blocks).children())
    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        # not by assignment: a bridge hands that on to the module inside of it
        block.__dict__["forward"] = partial(_checkpointed, block.forward)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            block.__dict__.pop("forward")
            if own is not None:
                block.__dict__["forward"] = own


def _checkpointed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
