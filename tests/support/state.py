"""What a call could leave changed on objects that are the user's."""

from __future__ import annotations

from typing import Any

from torch import nn


def state_of(module: nn.Module, tokenizer: Any) -> dict:
    """Everything about the user's objects that a call could leave changed."""
    parts = dict(module.named_modules())
    return {
        "modules": {name: id(part) for name, part in parts.items()},
        "training": {name: part.training for name, part in parts.items()},
        "hooks": {
            name: (len(part._forward_hooks), len(part._forward_pre_hooks), "forward" in vars(part))
            for name, part in parts.items()
        },
        "weights": {
            name: (weight.data_ptr(), weight.requires_grad, weight._version)
            for name, weight in module.named_parameters()
        },
        "attention": module.config._attn_implementation,
        "generation": module.generation_config.to_dict(),
        "padding": (tokenizer.padding_side, tokenizer.pad_token),
    }
