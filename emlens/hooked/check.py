"""The check that every model passes when it is loaded: refuse rather than steer nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emlens.hooked.adapters import available
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
        _check_adapters(model)


def _probe(model: HookedModel, tokens: Sequence[int] = ()) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (8, 5):
        ids = torch.randint(0, model.n_vocab, (length,), generator=generator).tolist()
        ids[: len(tokens)] = tokens[:length]
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


def _check_adapters(model: HookedModel) -> None:
    """Compare each adapter with the base, from the embedding through the head."""
    adapters = model._adapters
    for name in adapters.names:
        parts = {path: part for path, part in adapters.parts() if name in available(part)}
        batch = _probe(model, _changed_tokens(parts.values(), name))
        real = batch.mask("all")
        with model.adapter(None):
            hidden = model.hidden(batch)
            base = hidden, model.unembed(hidden[real.to(hidden.device)])
        with model.adapter(name), _passed_by(parts) as missed:
            hidden = model.hidden(batch)
            moved = hidden, model.unembed(hidden[real.to(hidden.device)])
        # a token may be routed past an expert, and past its adapter with it
        never = sorted(path for path in missed if ".experts." not in path)
        if never:
            raise RuntimeError(
                f"{model.name}: the {model.engine} engine never runs adapter {name!r} at "
                f"{never[0]}, since it has modules of its own there; use engine='nnsight'"
            )
        if all(torch.equal(before, after) for before, after in zip(base, moved, strict=True)):
            raise RuntimeError(f"{model.name}: adapter {name!r} changes nothing")
        with model.adapter(name):
            _check_unembed(model, batch, hidden)


def _changed_tokens(parts: Iterable[Any], name: str) -> list[int]:
    """A few tokens that an adapter has rows of its own for, which a random text may not have."""
    found: list[int] = []
    for part in parts:
        tokens = getattr(part, "token_adapter", None)
        if tokens is not None:
            found += list(tokens.token_indices[name])[:4]
        elif isinstance(getattr(part, "original_module", None), nn.Embedding):
            changed = part.modules_to_save[name].weight != part.original_module.weight
            found += changed.any(1).nonzero()[:4, 0].tolist()
    return found


@contextmanager
def _passed_by(layers: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """The paths of the modules that no forward pass inside of the block has run."""
    missed = set(layers)
    hooks = [
        layer.register_forward_pre_hook(lambda *_, path=path: missed.discard(path))
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
