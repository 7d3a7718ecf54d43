"""What acts on a model, told apart by content and not by name."""

from __future__ import annotations

import hashlib
import json

import torch

from emlens.hooked.edit import Edit
from emlens.hooked.model import HookedModel


def edit_identity(edit: Edit) -> str:
    """An edit in words, with a hash of its vectors where it can be written down."""
    to_dict = getattr(edit, "to_dict", None)
    if to_dict is None:
        return repr(edit)
    text = json.dumps(to_dict(), sort_keys=True)
    return f"{edit!r} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def adapter_identity(model: HookedModel, name: str | None) -> str | None:
    """An adapter's name with a hash of its weights; None for no adapter."""
    if name is None:
        return None
    found = hashlib.sha256()
    for path, weight in sorted(model.module.named_parameters()):
        if name in path.split("."):
            found.update(path.encode())
            if not weight.is_meta:
                kept = weight.detach().cpu().contiguous()
                found.update(kept.view(torch.uint8).numpy().tobytes())
    return f"{name} {found.hexdigest()[:16]}"
