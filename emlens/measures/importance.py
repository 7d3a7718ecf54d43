"""Importance of tokens for a change of predictions: gradients at what is added at each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.hooked import BaseLogProbs, Edit, HookedModel
from emlens.hooked.condition import ConditionLike, condition_of
from emlens.hooked.edit import Where
from emlens.hooked.lora_scaling import adapter_factors
from emlens.hooked.losses import Targets, kl_sum
from emlens.hooked.sites import Site
from emlens.text import TokenBatch, TokenMask


@dataclass(frozen=True)
class _Gated:
    """An edit with a factor on what it adds at each token."""

    edit: Edit
    gates: Float[Tensor, "batch pos"]

    @property
    def site(self) -> Site:
        return self.edit.site

    @property
    def layers(self) -> Sequence[int]:
        return self.edit.layers

    @property
    def where(self) -> Where:
        return self.edit.where

    def delta(
        self, residual: Float[Tensor, "batch pos d_model"], layer: int
    ) -> Float[Tensor, "batch pos d_model"]:
        added = self.edit.delta(residual, layer)
        return self.gates.to(added)[..., None] * added


@torch.enable_grad()
def slopes_by_token(
    model: HookedModel, batch: TokenBatch, condition: ConditionLike, tokens: TokenMask
) -> Float[Tensor, "batch pos"]:
    """Return the derivative of the summed KL at `tokens` by a factor on what each token gets.

    Args:
        model: The model.
        batch: One row.
        condition: Edits, an adapter, or both.
        tokens: Tokens whose predictions count.

    Raises:
        ValueError: If an adapter is not plain LoRA.
    """
    found = condition_of(model, condition)
    targets = Targets.of(batch, tokens).to(model.device)
    gates = torch.ones(batch.shape, device=model.device, requires_grad=True)
    gated = tuple(_Gated(edit, gates) for edit in found.edits)
    with model.frozen():
        with model.under([]), torch.no_grad():
            base = BaseLogProbs(model, targets.predictors(model.hidden(batch)))
        acting = replace(found, edits=gated)
        with model.under(acting), _gated_adapters(model, found.names, gates):
            states = targets.predictors(model.hidden(batch, grad=True))
            total = kl_sum(model, base, states)
            (slope,) = torch.autograd.grad(total, gates, allow_unused=True)
    return torch.zeros_like(gates) if slope is None else slope


@contextmanager
def _gated_adapters(
    model: HookedModel, names: Sequence[str], gates: Float[Tensor, "batch pos"]
) -> Iterator[None]:
    """Scale what plain LoRA adapters add by the factors, inside the block."""

    def scaled(_module, _inputs, output: Tensor) -> Tensor:
        return gates.to(output)[..., None] * output

    hooks = [
        factors.layer.lora_B[name].register_forward_hook(scaled)
        for name in names
        for factors in adapter_factors(model, name).values()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
