"""Replacing what an adapter adds to one prompt by what it adds to another."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from emlens._door import guarded
from emlens.hooked.lora_scaling import adapter_factors
from emlens.hooked.model import HookedModel
from emlens.text import Conversation, pack, tokenize
from emlens.text.tokens import TokenRow


@contextmanager
@guarded
def patched_deltas(
    model: HookedModel,
    recipient: Conversation,
    donor: Conversation,
    adapter: str,
    layers: Collection[int] | None = None,
) -> Iterator[HookedModel]:
    """Make an adapter add to one prompt what it adds to another, inside the block.

    The adapter acts. At each token of the recipient's prompt, every adapted module of the chosen
    layers adds what it added to the donor's token at the same place, `scale * B A h` read with the
    adapter in force; generated tokens get their own. Swap both prompts to see which part of the
    answers comes from the text, and which from the adapter's reading of it. Inside the block only
    the recipient can run, one row at a time.

    Args:
        model: A model with adapters.
        recipient: The prompt that is answered; a final answer is left out.
        donor: A prompt of the same number of tokens.
        adapter: The adapter's name; a plain LoRA.
        layers: Blocks whose modules are patched; None for all.

    Raises:
        ValueError: If the prompts have different numbers of tokens, the adapter is not plain LoRA
            or adapts none of the layers, or another batch runs inside the block.

    Source:
        arXiv 2506.11618, section 4; the released code.

    Examples:
        >>> with patched_deltas(model, recipient, donor, "medical", layers=[21, 22, 23]):
        ...     model.generate([recipient], max_new_tokens=100)
    """
    prompts = [one.prompt for one in (recipient, donor)]
    rows = tokenize(prompts, model.template, generation_prompt=True)
    if len(rows[0]) != len(rows[1]):
        raise ValueError(
            f"the recipient has {len(rows[0])} tokens and the donor {len(rows[1])}; what is added "
            "at a token goes to the one at the same place, so write prompts of equal length"
        )
    modules = _modules(model, adapter, layers)
    with model.adapter(adapter):
        added = _added(model, rows[1], modules)
        hooks = [
            module.register_forward_hook(_replacing(added[path], rows[0].name))
            for path, module in modules.items()
        ]
        try:
            yield model
        finally:
            for hook in hooks:
                hook.remove()


def _modules(
    model: HookedModel, adapter: str, layers: Collection[int] | None
) -> dict[str, torch.nn.Module]:
    """The `B` of each adapted module of the chosen layers, by path."""
    block = re.compile(rf"{re.escape(model.architecture.blocks)}\.(\d+)\.")
    found = {}
    for path, factors in adapter_factors(model, adapter).items():
        inside = block.match(path)
        if layers is None or (inside is not None and int(inside[1]) in layers):
            found[path] = factors.layer.lora_B[adapter]
    if not found:
        raise ValueError(f"adapter {adapter!r} adapts no module of layers {sorted(layers or ())}")
    return found


@torch.no_grad()
def _added(
    model: HookedModel, row: TokenRow, modules: dict[str, torch.nn.Module]
) -> dict[str, Tensor]:
    """What each `B` gives on one row, `[1, pos, d_out]`."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., Any]:
        return lambda _module, _inputs, output: found.__setitem__(path, output)

    hooks = [module.register_forward_hook(keep(path)) for path, module in modules.items()]
    try:
        (batch,) = pack([row], pad_id=model.pad_id)
        model.hidden(batch.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _replacing(added: Tensor, name: str) -> Callable[..., Any]:
    """A hook that puts what the donor got in the place of what the recipient's prompt gets."""
    n = added.shape[1]

    def replaced(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        if output.shape[1] == 1 < n:
            # a generated token, on top of cached ones
            return output
        if output.shape[0] != 1 or output.shape[1] < n:
            raise ValueError(
                f"a batch of {output.shape[0]} row(s) of {output.shape[1]} tokens runs inside of "
                f"patched_deltas; only {name}, of {n} tokens, may, alone"
            )
        return torch.cat([added.to(output), output[:, n:]], dim=1)

    return replaced
