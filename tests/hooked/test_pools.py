"""What pools bring back, against plain loops over tokens."""

from __future__ import annotations

import torch

from emlens.hooked import pools

RESIDUAL = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
AXES = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
TOKENS = [[RESIDUAL[row, at] for at in range(4) if MASK[row, at]] for row in range(3)]


def test_counted_tokens_and_their_norms_come_in_order():
    flat = torch.stack([token for row in TOKENS for token in row])
    assert torch.equal(pools.counted(MASK)(RESIDUAL), flat)
    assert torch.allclose(pools.counted_norms(MASK)(RESIDUAL), (flat**2).sum(1).sqrt())


def test_means_are_over_the_counted_tokens_of_each_row():
    means = torch.stack([torch.stack(row).mean(0) for row in TOKENS])
    assert torch.allclose(pools.mean(MASK)(RESIDUAL), means, atol=1e-6)
    assert torch.allclose(pools.mean_along(MASK, AXES)(RESIDUAL), means @ AXES.T, atol=1e-6)


def test_every_token_has_its_product_with_a_vector():
    expected = torch.tensor([[float(token @ AXES[0]) for token in row] for row in RESIDUAL])
    assert torch.allclose(pools.along(AXES[0])(RESIDUAL), expected, atol=1e-6)
    assert torch.equal(pools.first_token(RESIDUAL), RESIDUAL[:, :1])
