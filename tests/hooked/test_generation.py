"""Sampling: what the row sampler draws."""

from __future__ import annotations

import pytest
import torch

from emlens import Conversation
from emlens.hooked.generation import RowSampler, Sampling


def draws(logits, n=4000, **settings):
    """Token drawn from the same logits in `n` rows, each with its own stream."""
    sampler = RowSampler(Sampling(1, **settings), range(n))
    scores = sampler(torch.zeros(n, 1), torch.tensor(logits).log().expand(n, -1))
    assert ((scores == 0).sum(-1) == 1).all(), "one token per row stays possible"
    return scores.argmax(-1)


def shares(tokens, n_vocab):
    return torch.bincount(tokens, minlength=n_vocab) / len(tokens)


def test_tokens_are_drawn_with_their_probabilities():
    expected = torch.tensor([0.5, 0.3, 0.15, 0.05])
    found = shares(draws([0.5, 0.3, 0.15, 0.05]), 4)
    assert (found - expected).abs().max() < 0.03


def test_temperature_sharpens_and_top_p_cuts_the_tail():
    sharp = shares(draws([0.5, 0.3, 0.2], temperature=0.5), 3)
    assert (sharp - torch.tensor([0.25, 0.09, 0.04]) / 0.38).abs().max() < 0.03
    cut = shares(draws([0.2, 0.5, 0.3], top_p=0.7), 3)
    assert cut[0] == 0
    assert abs(cut[1] - 0.5 / 0.8) < 0.03
    assert (draws([0.2, 0.5, 0.3], top_p=0.1) == 1).all()


def test_a_row_draws_the_same_whatever_its_neighbours_are():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    together = RowSampler(Sampling(1, seed=7), [3, 9, 4, 0, 1])(logits, logits).argmax(-1)
    alone = RowSampler(Sampling(1, seed=7), [4])(logits[2:3], logits[2:3]).argmax(-1)
    assert together[2] == alone[0]


def test_seeds_change_answers_and_repeat_them(hooked_llama):
    prompts = [Conversation.of("how do I save money")] * 2
    first = hooked_llama.generate(prompts, max_new_tokens=12, seed=1)
    assert first == hooked_llama.generate(prompts, max_new_tokens=12, seed=1)
    assert first != hooked_llama.generate(prompts, max_new_tokens=12, seed=2)
    assert first[0] != first[1], "each answer has a stream of its own"


def test_the_checkpoints_own_generation_defaults_do_not_creep_in(hooked_llama):
    prompts = [Conversation.of("how do I save money")]
    plain = hooked_llama.generate(prompts, max_new_tokens=12, temperature=0)
    config = hooked_llama.module.generation_config
    config.repetition_penalty, config.top_k = 50.0, 1
    try:
        assert plain == hooked_llama.generate(prompts, max_new_tokens=12, temperature=0)
        assert hooked_llama.module.generation_config is config
    finally:
        config.repetition_penalty, config.top_k = 1.0, 50


def test_a_list_of_no_questions_is_refused(hooked_llama):
    with pytest.raises(ValueError, match="conversations is empty; give at least one"):
        hooked_llama.generate([])
