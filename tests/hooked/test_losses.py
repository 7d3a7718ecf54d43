"""Losses and KL against closed forms and plain autograd."""

from __future__ import annotations

import pytest
import torch

from emlens.hooked import BaseLogProbs, losses, token_kl
from emlens.hooked.losses import kl_sum, loss_sum, token_losses
from emlens.hooked.losses import token_scores as both_scores


class LinearSoftmax:
    """A model that is nothing but an unembedding: KL and loss have closed forms."""

    def __init__(self, weight):
        self.weight = weight
        self.n_vocab = len(weight)

    def unembed(self, hidden):
        return (hidden @ self.weight.T).float()


@pytest.fixture
def model():
    generator = torch.Generator().manual_seed(0)
    return LinearSoftmax(torch.randn(11, 5, generator=generator))


@pytest.fixture(params=[1, 100, losses.CHUNK_BYTES], ids=["tiny chunks", "small", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", request.param)


def states(n=7, seed=1):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))


def test_kl_is_that_of_two_categorical_distributions(model, chunk):
    base, edited = states(), states(seed=2)
    p, q = (torch.distributions.Categorical(logits=h @ model.weight.T) for h in (base, edited))
    expected = torch.distributions.kl_divergence(p, q)
    assert torch.allclose(token_kl(model, base, edited), expected, atol=1e-6)
    held = BaseLogProbs(model, base, budget=10**9)
    assert held.held is not None
    assert torch.allclose(token_kl(model, held, edited), expected, atol=1e-6)


def test_kl_is_zero_for_the_same_states_and_of_two_biases_has_a_closed_form(model, chunk):
    assert torch.equal(token_kl(model, states(), states()), torch.zeros(7))
    two = LinearSoftmax(torch.eye(2))
    p = torch.tensor([[0.5, 0.5]])
    q = torch.tensor([[0.9, 0.1]])
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.9)) + 0.5 * torch.log(torch.tensor(0.5 / 0.1))
    assert torch.isclose(token_kl(two, p.log(), q.log())[0], expected)


def test_loss_is_the_negative_log_probability_of_the_target(model, chunk):
    hidden, ids = states(), torch.arange(7)
    expected = -(hidden @ model.weight.T).log_softmax(-1)[torch.arange(7), ids]
    assert torch.allclose(token_losses(model, hidden, ids), expected, atol=1e-6)
    loss, kl = both_scores(model, states(seed=2), hidden, ids)
    assert torch.allclose(loss, expected, atol=1e-6)
    assert torch.allclose(kl, token_kl(model, states(seed=2), hidden))


def test_chunked_sums_have_the_gradient_of_the_whole(model, chunk):
    ids, base = torch.arange(7), states(seed=2)
    log_base = (base @ model.weight.T).log_softmax(-1)
    ours = states().requires_grad_()
    loss = loss_sum(model, ours, ids) + 3 * kl_sum(model, BaseLogProbs(model, base), ours)
    loss.backward()
    plain = states().requires_grad_()
    log_probs = (plain @ model.weight.T).log_softmax(-1)
    whole = -log_probs[torch.arange(7), ids].sum()
    whole = whole + 3 * (log_base.exp() * (log_base - log_probs)).sum()
    whole.backward()
    assert torch.isclose(loss.float(), whole, rtol=1e-5)
    assert torch.allclose(ours.grad, plain.grad, atol=1e-5)


def test_the_gradient_of_the_kl_is_exactly_zero_at_the_base(model, chunk):
    same = states().requires_grad_()
    kl_sum(model, BaseLogProbs(model, states()), same).backward()
    assert torch.equal(same.grad, torch.zeros_like(same))


def test_log_probabilities_are_recomputed_beyond_the_budget_and_join(model):
    held = BaseLogProbs(model, states(3), budget=4 * 3 * 11)
    not_held = BaseLogProbs(model, states(4, 2), budget=4 * 4 * 11 - 1)
    assert held.held is not None
    assert not_held.held is None
    joined = BaseLogProbs.joined([held, not_held])
    expected = (torch.cat([states(3), states(4, 2)]) @ model.weight.T).log_softmax(-1)
    assert joined.held is None
    assert torch.allclose(joined(slice(0, 7)), expected, atol=1e-6)
    assert BaseLogProbs.joined([held, held]).held is not None


def test_kl_of_different_tokens_is_refused_with_both_shapes(model):
    with pytest.raises(ValueError, match=r"base has shape \(6, 5\), edited \(7, 5\)"):
        token_kl(model, states(6), states(7))
