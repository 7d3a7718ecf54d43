"""The check that every model passes when it is loaded: refuse rather than steer nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from emlens.hooked.sites import Site
from emlens.hooked.state import evaluating
from emlens.text import TokenBatch, TokenRow, pack

if TYPE_CHECKING:
    from emlens.hooked.model import HookedModel


@dataclass(frozen=True)
class _Push:
    """Adds one vector at one layer; what the check steers with."""

    vector: Tensor
    layer: int
    site: Site = "resid_post"
    where: str = "all"

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def delta(self, residual: Tensor, layer: int) -> Tensor:
        return self.vector.to(residual).expand_as(residual)


@torch.no_grad()
def self_check(model: HookedModel) -> None:
    """Run two short rows through the model and compare what must agree.

    Checked: the residual's shape; `unembed` against the model's own logits; that the sites add
    up (`resid_pre + attn_out + mlp_out = resid_post`); that an edit changes every row; that every
    adapter acts.

    Raises:
        RuntimeError: Naming what disagreed, and by how much.
    """
    batch = _probe(model)
    with evaluating(model.module):
        hidden = model.hidden(batch)
        _check_shapes(model, batch, hidden)
        _check_unembed(model, batch, hidden)
        _check_sites(model, batch)
        _check_edit(model, batch, hidden)
        _check_adapters(model, batch)


def _probe(model: HookedModel) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (8, 5):
        ids = torch.randint(0, model.n_vocab, (length,), generator=generator).tolist()
        nothing = (False,) * length
        rows.append(TokenRow(tuple(ids), nothing, nothing, f"probe of {length} tokens"))
    (batch,) = pack(rows, pad_id=model.pad_id)
    return batch.to(model.device)


def _check_shapes(model: HookedModel, batch: TokenBatch, hidden: Tensor) -> None:
    expected = (*batch.input_ids.shape, model.d_model)
    found = tuple(hidden.shape)
    if found != expected:
        raise RuntimeError(
            f"{model.name}: final hidden states have shape {found}, expected {expected}; "
            "the architecture is not understood"
        )


def _check_unembed(model: HookedModel, batch: TokenBatch, hidden: Tensor) -> None:
    logits = model.module(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).logits
    real = batch.mask("all")
    theirs = logits[real.to(logits.device)].float()
    ours = model.unembed(hidden[real.to(hidden.device)]).to(theirs.device)
    if ours.shape != theirs.shape or not _close(ours, theirs, model.dtype):
        same = ours.shape == theirs.shape
        gap = _gap(ours, theirs) if same else f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
        raise RuntimeError(
            f"{model.name}: unembed does not reproduce the model's logits ({gap}); its LM head "
            "does something after the final norm that emlens does not know"
        )


def _check_sites(model: HookedModel, batch: TokenBatch) -> None:
    layer = model.n_layers // 2
    sites: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    read = {site: model.residuals(batch, layer, site)[layer].float() for site in sites}
    total = read["resid_pre"] + read["attn_out"] + read["mlp_out"]
    real = batch.mask("all").to(total.device)
    if not _close(total[real], read["resid_post"][real], model.dtype):
        raise RuntimeError(
            f"{model.name}, layer {layer}: resid_pre + attn_out + mlp_out is not resid_post "
            f"({_gap(total[real], read['resid_post'][real])}); the block adds something that "
            "emlens does not know"
        )


def _check_edit(model: HookedModel, batch: TokenBatch, hidden: Tensor) -> None:
    layer = model.n_layers // 2
    residual = model.residuals(batch, layer)[layer].float()
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(model.d_model, generator=generator)
    norms = residual[batch.mask("all").to(residual.device)].norm(dim=-1)
    vector = vector / vector.norm() * norms.median().cpu()
    moved = model.hidden(batch, [_Push(vector, layer)])  # type: ignore[list-item]
    change = (moved.float() - hidden.float()).abs().amax(dim=(1, 2))
    if not bool((change > 0).all()):
        still = [i for i, value in enumerate(change.tolist()) if value == 0]
        raise RuntimeError(
            f"{model.name}: an edit at layer {layer} left row {still[0]} of {len(change)} as it "
            "was; the hook does not reach the whole batch"
        )


def _check_adapters(model: HookedModel, batch: TokenBatch) -> None:
    for name in model.adapters:
        with model.adapter(None):
            base = model.hidden(batch)
        with model.adapter(name), _passed_by(model.lora_layers(name)) as missed:
            moved = model.hidden(batch)
        # a token may be routed past an expert, and past its adapter with it
        never = sorted(path for path in missed if ".experts." not in path)
        if never:
            raise RuntimeError(
                f"{model.name}: the {model.engine} engine never runs adapter {name!r} at "
                f"{never[0]}, since it works on copies of fused projections; use engine='nnsight'"
            )
        if torch.equal(base, moved):
            raise RuntimeError(f"{model.name}: adapter {name!r} changes nothing")


@contextmanager
def _passed_by(layers: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """The paths of the modules that no forward pass inside of the block has run."""
    missed = set(layers)
    hooks = [
        layer.register_forward_hook(lambda *_, path=path: missed.discard(path))
        for path, layer in layers.items()
    ]
    try:
        yield missed
    finally:
        for hook in hooks:
            hook.remove()


def _close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    scale = theirs.abs().max().clamp(min=1.0)
    return bool((ours - theirs).abs().max() <= tolerance * scale)


def _gap(ours: Tensor, theirs: Tensor) -> str:
    return f"largest difference {(ours - theirs).abs().max().item():.3g}"
