"""The plain version of a hooked model: one unpadded row, torch hooks, module names by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Change = Callable[[Tensor], Tensor]

# blocks, what attention adds, what the MLP adds, final norm
_PLAIN = ("model.layers", "self_attn", "mlp", "model.norm")
_POST_NORM = (
    "model.layers",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    "model.norm",
)
NAMES = {
    "gemma2": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "olmo2": _POST_NORM,
    "gpt2": ("transformer.h", "attn", "mlp", "transformer.ln_f"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp", "gpt_neox.final_layer_norm"),
}


@dataclass
class Plain:
    """Reads and logits of one row.

    Attributes:
        sites: `{site: [layers, pos, d_model]}`, before the change.
        hidden: After the final norm, `[pos, d_model]`.
        logits: `[pos, vocab]`.
    """

    sites: dict[str, list[Tensor]] = field(default_factory=dict)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def run_plain(
    module: PreTrainedModel,
    family: str,
    ids: list[int],
    changes: Mapping[tuple[int, str], Change] | None = None,
) -> Plain:
    """Run one row through the model's own forward, adding `changes` at (layer, site)."""
    blocks_at, attention, mlp, norm = NAMES.get(family, _PLAIN)
    changes = changes or {}
    seen = Plain({name: [] for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")})
    entering: dict[int, Tensor] = {}

    def changed(i: int, name: str, value: Tensor, seen_as: Tensor | None = None) -> Tensor:
        change = changes.get((i, name))
        return value if change is None else value + change(value if seen_as is None else seen_as)

    def before(i: int):
        def hook(_module, args, kwargs):
            value = args[0] if args else kwargs["hidden_states"]
            seen.sites["resid_pre"].append(value[0])
            entering[i] = changed(i, "resid_pre", value)
            if args:
                return (entering[i], *args[1:]), kwargs
            return (), kwargs | {"hidden_states": entering[i]}

        return hook

    def after(i: int, name: str):
        def hook(_module, _args, output):
            value = output[0] if isinstance(output, tuple) else output
            seen.sites[name].append(value[0])
            value = changed(i, name, value)
            if name == "attn_out":
                value = changed(i, "resid_mid", value, entering[i] + value)
            return (value, *output[1:]) if isinstance(output, tuple) else value

        return hook

    def final(_module, _args, output):
        seen.hidden = output[0]

    with ExitStack() as stack:
        blocks = module.get_submodule(blocks_at)
        assert isinstance(blocks, nn.ModuleList)
        for i, block in enumerate(blocks):
            hook = block.register_forward_pre_hook(before(i), with_kwargs=True)
            stack.callback(hook.remove)
            for path, name in ((attention, "attn_out"), (mlp, "mlp_out")):
                part = block.get_submodule(path)
                stack.callback(part.register_forward_hook(after(i, name)).remove)
            stack.callback(block.register_forward_hook(after(i, "resid_post")).remove)
        stack.callback(module.get_submodule(norm).register_forward_hook(final).remove)
        seen.logits = module(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    pairs = zip(seen.sites["resid_pre"], seen.sites["attn_out"], strict=True)
    seen.sites["resid_mid"] = [a + b for a, b in pairs]
    return seen
