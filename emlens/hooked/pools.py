"""What `model.residuals(pool=...)` brings back of a residual `[batch, pos, d_model]`."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from emlens.hooked.hook_plan import Pool

Mask = Bool[Tensor, "batch pos"]


def counted(mask: Mask) -> Pool:
    """The residuals of the counted tokens in fp32, `[tokens, d_model]`."""
    return lambda residual: residual[mask.to(residual.device)].float()


def counted_norms(mask: Mask) -> Pool:
    """The norms of the residuals of the counted tokens, `[tokens]`."""
    return lambda residual: residual[mask.to(residual.device)].float().norm(dim=-1)


def first_token(residual: Tensor) -> Tensor:
    """The residual of the first token, where a pass is run for something else."""
    return residual[:, :1]


def mean(mask: Mask) -> Pool:
    """The mean over the counted tokens of each row, `[batch, d_model]`."""

    def pool(residual: Tensor) -> Tensor:
        weight = mask.to(residual.device).float()
        total = torch.einsum("bpd,bp->bd", residual.float(), weight)
        return total / weight.sum(1, keepdim=True)

    return pool


def robust_mean(
    mask: Mask, winsorize: float | None, drop_massive: float | None, *, with_norms: bool
) -> Pool:
    """The mean over the counted tokens of each row, outliers clipped or left out.

    With norms, `[batch, d_model + pos]`: a remote model sends back one tensor.
    """
    weight = mask.float()
    even = weight / weight.sum(1, keepdim=True).clamp(min=1)

    def pool(residual: Tensor) -> Tensor:
        values = residual.float()
        norms = values.norm(dim=-1)
        share = even.to(values.device)
        if drop_massive is not None:
            where = mask.to(values.device)
            usual = norms.masked_fill(~where, torch.nan).nanmedian(dim=1, keepdim=True).values
            share = where.float() * (norms <= drop_massive * usual)
            share = share / share.sum(1, keepdim=True).clamp(min=1)
        if winsorize is not None:
            place = max(1, round(winsorize * values.shape[-1]))
            limit = values.abs().kthvalue(place, dim=-1, keepdim=True).values
            values = values.clamp(-limit, limit)
        means = torch.einsum("btd,bt->bd", values, share)
        return torch.cat([means, norms], dim=1) if with_norms else means

    return pool


def along(vector: Float[Tensor, " d_model"]) -> Pool:
    """The product of every token with a vector, `[batch, pos]`."""
    return lambda residual: residual.float() @ vector.to(residual.device)


def mean_along(mask: Mask, vectors: Float[Tensor, "k d_model"]) -> Pool:
    """The mean products of the counted tokens of each row with vectors, `[batch, k]`."""
    share = mask.float() / mask.sum(1, keepdim=True)

    def pool(residual: Tensor) -> Tensor:
        products = residual.float() @ vectors.to(residual.device).T
        return torch.einsum("btk,bt->bk", products, share.to(residual.device))

    return pool
