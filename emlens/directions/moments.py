"""Streaming moments of residuals over conversations: fp64, mergeable, one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(slots=True)
class Moments:
    """Weighted first and second moments of per-conversation means, for every layer at once.

    Each conversation `c` contributes its mean residual `x_c` with a weight `w_c`: its number of
    counted tokens (token-weighted mean) or 1 (conversation-weighted). Tokens of one
    conversation are not independent, so the standard error is that of the ratio
    `sum w x / sum w` over conversations (linearised), not one over tokens.

    Attributes:
        n: Conversations.
        weight: Sum of `w`.
        weight2: Sum of `w^2`.
        total: Sum of `w x`, `[layers, d_model]`.
        total2: Sum of `w^2 x`, `[layers, d_model]`.
        square: Sum of `w^2 x^2`, `[layers, d_model]`.
    """

    n: int
    weight: float
    weight2: float
    total: Float[Tensor, "layers d_model"]
    total2: Float[Tensor, "layers d_model"]
    square: Float[Tensor, "layers d_model"]

    @classmethod
    def empty(cls, n_layers: int, d_model: int) -> Moments:
        """Moments of no data."""
        zero = torch.zeros(n_layers, d_model, dtype=torch.float64)
        return cls(0, 0.0, 0.0, zero, zero.clone(), zero.clone())

    def add(
        self, means: Float[Tensor, "layers batch d_model"], weights: Float[Tensor, " batch"]
    ) -> None:
        """Take in a batch of per-conversation means; rows of weight 0 do not count."""
        weights = weights.double().cpu()
        sums = sums_of(means.cpu(), weights[None])[:, 0]
        self.n += int((weights > 0).sum())
        self.weight += float(weights.sum())
        self.weight2 += float((weights**2).sum())
        self.total, self.total2, self.square = (
            before + more
            for before, more in zip((self.total, self.total2, self.square), sums, strict=True)
        )

    def to(self, device: torch.device | str) -> Moments:
        """The same sums on a device."""
        sums = (values.to(device) for values in (self.total, self.total2, self.square))
        return Moments(self.n, self.weight, self.weight2, *sums)

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of conversations together."""
        return Moments(
            self.n + other.n,
            self.weight + other.weight,
            self.weight2 + other.weight2,
            self.total + other.total,
            self.total2 + other.total2,
            self.square + other.square,
        )

    @property
    def mean(self) -> Float[Tensor, "layers d_model"]:
        """The weighted mean.

        Raises:
            ValueError: If there is no data.
        """
        if self.weight == 0:
            raise ValueError("no tokens were counted, so there is no mean")
        return self.total / self.weight

    @property
    def variance(self) -> Float[Tensor, "layers d_model"]:
        """Sampling variance of the mean, over conversations; infinite for fewer than two."""
        if self.n < 2:
            return torch.full_like(self.total, torch.inf)
        mean = self.mean
        spread = self.square - 2 * mean * self.total2 + mean**2 * self.weight2
        return spread.clamp(min=0) / self.weight**2 * self.n / (self.n - 1)


def sums_of(
    means: Float[Tensor, "layers batch d_model"], weights: Float[Tensor, "parts batch"]
) -> Float[Tensor, "3 parts layers d_model"]:
    """`total`, `total2` and `square` of parts of a batch; a row has weight 0 outside of its part.

    Computed where the means lie.
    """
    values = means.double()
    # a batch of products: one product would copy the means to bring their axes together
    layers = (len(values), -1, -1)
    linear = torch.cat([weights, weights**2]).expand(*layers) @ values
    square = (weights**2).expand(*layers) @ values**2
    return torch.stack([*linear.chunk(2, dim=1), square]).transpose(1, 2)
