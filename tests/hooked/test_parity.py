"""Batched or single, left or right, resumed or whole, cached or not: the same numbers."""

from __future__ import annotations

import pytest
import torch

from emlens import Ablate, Add, Direction
from emlens.hooked import response_losses, token_kl
from emlens.hooked.losses import Targets, token_losses
from emlens.hooked.sites import SITES
from emlens.hooked.sweep import sweep
from emlens.text import Conversation, pack, tokenize
from tests.support.data import conversations
from tests.support.models import FAMILIES, SEQUENTIAL

TOLERANCE = 1e-4
EVERYWHERE = [(f, s) for f in FAMILIES for s in SITES if s != "resid_mid" or f in SEQUENTIAL]


def rows_of(model, n=5):
    return tokenize(conversations("bad", n), model.tokenizer)


def direction(model, layer, site="resid_post", seed=0, size=4.0):
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(model.d_model, generator=generator)
    return Direction.of(size * vector / vector.norm(), layer, site)


def by_row(batch, values):
    """Values `[batch, pos, ...]` of real tokens, row by row, in the original order."""
    real = batch.mask("all")
    rows = {place: values[i][real[i]] for i, place in enumerate(batch.index)}
    return [rows[place] for place in sorted(rows)]


def the_same(first, second):
    return all(torch.allclose(a, b, atol=TOLERANCE) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("family", "site"), EVERYWHERE)
def test_batched_residuals_equal_single_ones_on_both_padding_sides(hooked, family, site):
    model = hooked(family)
    rows = rows_of(model)
    edits = [Add(direction(model, 1))]
    single = []
    for row in rows:
        (batch,) = pack([row])
        single += by_row(batch, model.residuals(batch, 2, site, edits=edits)[2])
    for side in ("left", "right"):
        (batch,) = pack(rows, padding_side=side)
        assert the_same(by_row(batch, model.residuals(batch, 2, site, edits=edits)[2]), single)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["all", "prompt", "response"])
def test_losses_and_kl_do_not_depend_on_batching_or_padding(hooked, family, where):
    model = hooked(family)
    rows = rows_of(model)
    edits = [Add(direction(model, 1), where=where)]

    def scores(batch):
        targets = Targets.of(batch)
        base = targets.predictors(model.hidden(batch))
        edited = targets.predictors(model.hidden(batch, edits))
        values = torch.stack(
            [token_losses(model, edited, targets.ids), token_kl(model, base, edited)], dim=1
        )
        return {p: values[targets.rows == i] for i, p in enumerate(batch.index)}

    single = [scores(pack([row])[0])[0] for row in rows]
    for side in ("left", "right"):
        (batch,) = pack(rows, padding_side=side)
        together = scores(batch)
        assert the_same([together[i] for i in range(len(rows))], single)
        assert all(bool((values[:, 1] > 0).any()) for values in single)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_a_plain_loop_over_the_models_own_logits(hooked, family):
    model = hooked(family)
    rows = rows_of(model)
    sums, counts = response_losses(model, pack(rows))
    for i, row in enumerate(rows):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            log_probs = model.module(input_ids=ids).logits[0].log_softmax(-1)
        expected = [
            -log_probs[t - 1, row.input_ids[t]] for t in range(1, len(ids[0])) if row.response[t]
        ]
        assert counts[i] == len(expected)
        assert torch.isclose(sums[i].float(), torch.stack(expected).sum(), atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_resume_equals_the_full_pass_and_skips_the_blocks_below(hooked, family):
    model = hooked(family)
    (batch,) = pack(rows_of(model))
    edits = [Add(direction(model, 1)), Ablate(direction(model, 2, "attn_out"))]
    whole = model.hidden(batch, edits)
    residual = model.residuals(batch, 1)[1]
    ran = []
    blocks = model.module.get_submodule(model.architecture.blocks)
    hooks = [
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(blocks)
    ]
    resumed = model.hidden(batch, edits, resume=(1, residual))
    for hook in hooks:
        hook.remove()
    assert ran == [2, 3]
    assert torch.allclose(whole, resumed, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_equals_one_full_pass_per_condition(hooked, family):
    model = hooked(family)
    (batch,) = pack(rows_of(model))
    conditions = {
        "deep": [Add(direction(model, 2))],
        "base": [],
        "shallow": [Ablate(direction(model, 1), layers=(1, 2, 3))],
        "first": [Add(direction(model, 0, "resid_pre"))],
    }
    with model.edited(Add(direction(model, 2, seed=5))):
        swept = {name: hidden for name, hidden, _ in sweep(model, batch, conditions)}
        for name, edits in conditions.items():
            assert torch.allclose(swept[name], model.hidden(batch, edits), atol=1e-5), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["all", "prompt", "response"])
def test_generation_is_the_same_cached_or_not_batched_or_single(hooked, family, where):
    model = hooked(family)
    prompts = [
        Conversation.of(text) for text in ("how", "tell me a story about rain", "what should I eat")
    ]
    edits = [Add(direction(model, 1, size=8.0), where=where)]
    for temperature in (0.0, 1.0):
        settings = {"max_new_tokens": 8, "temperature": temperature, "seed": 3}
        cached = model.generate(prompts, edits, **settings)
        assert cached == model.generate(prompts, edits, use_cache=False, **settings)
        assert cached == model.generate(prompts, edits, batch_tokens=1, **settings)
        assert cached != model.generate(prompts, **settings)


def test_an_edit_on_the_response_reaches_the_first_generated_token(hooked):
    model = hooked("llama")
    prompts = [Conversation.of("how do I save money")]
    strong = Add(direction(model, 2, size=200.0), where="response")
    first = model.generate(prompts, max_new_tokens=1, temperature=0)
    assert first != model.generate(prompts, [strong], max_new_tokens=1, temperature=0)


def test_greedy_generation_equals_repeated_argmax_of_the_edited_model(hooked):
    model = hooked("llama")
    edits = [Add(direction(model, 1, size=8.0))]
    prompt = Conversation.of("how do I save money")
    (row,) = tokenize([prompt], model.tokenizer, generation_prompt=True)
    ids = list(row.input_ids)
    for _ in range(6):
        grown = type(row)(tuple(ids), (False,) * len(ids), (False,) * len(ids), "grown")
        (batch,) = pack([grown])
        ids.append(int(model.unembed(model.hidden(batch, edits)[0, -1:]).argmax()))
        if ids[-1] == model.tokenizer.eos_token_id:
            break
    expected = model.tokenizer.decode(ids[len(row.input_ids) :], skip_special_tokens=True)
    assert model.generate([prompt], edits, max_new_tokens=6, temperature=0) == [expected]
