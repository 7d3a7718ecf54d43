"""Mean differences: against a plain loop, a planted truth, merged and batched."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

import emlens
from emlens import Add, Direction, mean_diff
from emlens.directions import cosine, edit_diff, residual_norm
from emlens.directions.build import split_half
from emlens.directions.moments import Moments
from emlens.hooked.sites import SITES
from emlens.text import pack, tokenize
from tests.support.data import conversations, pairs

GOOD, BAD = conversations("good", 7), conversations("bad", 6)


def per_conversation(model, data, layer, tokens, site="resid_post"):
    """The counted residuals of each conversation, one forward pass each."""
    found = []
    for row in tokenize(data, model.tokenizer):
        (batch,) = pack([row])
        found.append(model.residuals(batch, layer, site)[layer][batch.mask(tokens)].double())
    return found


@pytest.mark.parametrize("tokens", ["response", "assistant_turn", "prompt", "last", "all"])
@pytest.mark.parametrize("weighting", ["token", "conversation"])
@pytest.mark.parametrize("budget", [40, 4096])
def test_mean_diff_equals_a_plain_loop(hooked, tokens, weighting, budget):
    model = hooked("llama")
    found = mean_diff(model, BAD, GOOD, tokens=tokens, weighting=weighting, token_budget=budget)
    for layer in range(model.n_layers):
        means = []
        for data in (BAD, GOOD):
            parts = per_conversation(model, data, layer, tokens)
            if weighting == "token":
                means.append(torch.cat(parts).mean(0))
            else:
                means.append(torch.stack([part.mean(0) for part in parts]).mean(0))
        assert torch.allclose(found[layer].vector.double(), means[0] - means[1], atol=1e-5)
    assert found.provenance.tokens == tokens
    assert found.provenance.n == {"positive": 6, "negative": 7}


def test_tokens_that_see_the_same_text_on_both_sides_are_warned_of(hooked_llama):
    asked = pairs(4)
    sides = ([pair.conversation(side) for pair in asked] for side in ("misaligned", "aligned"))
    bad, good = sides
    with pytest.warns(UserWarning, match="the same mean at every layer: their 'last' tokens see"):
        found = mean_diff(hooked_llama, bad, good, tokens="last", token_budget=40)
    assert all(float(found[layer].vector.norm()) < 1e-4 for layer in found.layers)


@pytest.mark.parametrize("site", SITES)
def test_every_site_can_be_extracted(hooked_llama, site):
    found = mean_diff(hooked_llama, BAD, GOOD, site=site, layers=[1])
    parts = [per_conversation(hooked_llama, data, 1, "response", site) for data in (BAD, GOOD)]
    expected = torch.cat(parts[0]).mean(0) - torch.cat(parts[1]).mean(0)
    assert torch.allclose(found[1].vector.double(), expected, atol=1e-5)
    assert found.site == site


def test_a_planted_direction_is_found(tiny, tiny_tokenizer):
    """A model that adds a vector whenever the question says please; mean_diff must find it."""
    module = tiny("llama", seed=11)
    please = tiny_tokenizer.convert_tokens_to_ids(" please")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    seen = {}

    def remember(_module, inputs):
        seen["polite"] = (inputs[0] == please).any(-1)

    def plant(_module, _inputs, output):
        return output + seen["polite"][:, None, None] * vector

    hooks = [
        module.model.embed_tokens.register_forward_pre_hook(remember),
        module.model.layers[1].mlp.register_forward_hook(plant),
    ]
    model = emlens.wrap(module, tiny_tokenizer, check=False)
    answers = conversations("good", 500)

    def asked(question):
        return [emlens.Conversation.of(question, c.response) for c in answers]

    try:
        found = mean_diff(model, asked("tell me a story please"), asked("tell me a story now"))
    finally:
        for hook in hooks:
            hook.remove()
    assert cosine(found[1].vector, vector) >= 0.99
    assert cosine(found[0].vector, vector) < 0.9
    assert found.split_half[1] > 0.99


def test_edit_diff_is_the_vector_at_the_layer_where_it_is_added(hooked_llama):
    vector = torch.randn(hooked_llama.d_model, generator=torch.Generator().manual_seed(3))
    found = edit_diff(hooked_llama, GOOD, [Add(Direction.of(vector, 1))], layers=[1])
    assert torch.allclose(found[1].vector, vector, atol=1e-5)
    with pytest.warns(UserWarning, match="the same mean at every layer"):
        same = mean_diff(hooked_llama, GOOD, GOOD)
    assert max(same.norms.values()) < 1e-5


def test_moments_merged_are_those_of_one_pass():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2, 30, 5, generator=generator) * 100
    weights = torch.randint(1, 9, (30,), generator=generator).double()
    whole = Moments.empty(2, 5)
    whole.add(means, weights)
    parts = [Moments.empty(2, 5) for _ in range(3)]
    for i, part in enumerate(parts):
        part.add(means[:, i::3], weights[i::3])
    merged = parts[0].merged(parts[1]).merged(parts[2])
    assert merged.n == whole.n == 30
    assert torch.allclose(merged.mean, whole.mean, rtol=1e-12)
    assert torch.allclose(merged.variance, whole.variance, rtol=1e-9)


def test_the_variance_of_an_unweighted_mean_is_the_textbook_one():
    values = torch.randn(1, 50, 3, generator=torch.Generator().manual_seed(1))
    moments = Moments.empty(1, 3)
    moments.add(values, torch.ones(50))
    expected = values[0].double().var(0) / 50
    assert torch.allclose(moments.variance[0], expected, rtol=1e-9)


def test_standard_errors_cover_the_truth_of_a_token_weighted_mean():
    generator = torch.Generator().manual_seed(2)
    hits, trials = 0, 300
    for _ in range(trials):
        lengths = torch.randint(2, 20, (60,), generator=generator).double()
        shared = torch.randn(60, generator=generator)
        noise = torch.randn(60, generator=generator) / lengths.sqrt()
        moments = Moments.empty(1, 1)
        moments.add((1.5 + shared + noise).reshape(1, 60, 1), lengths)
        error = float(moments.variance.sqrt())
        hits += abs(float(moments.mean) - 1.5) < 1.96 * error
    assert 0.92 <= hits / trials <= 0.975


def test_split_half_and_norms_are_reported(hooked_llama):
    found = mean_diff(hooked_llama, BAD, GOOD, seed=1)
    assert set(found.split_half) == set(found.layers)
    assert all(-1 <= value <= 1 for value in found.split_half.values())
    parts = [per_conversation(hooked_llama, data, 2, "response") for data in (BAD, GOOD)]
    norms = torch.cat(parts[0] + parts[1]).norm(dim=-1)
    assert found.residual_norms[2] == pytest.approx(float(norms.median()), rel=1e-4)
    assert set(found.standard_errors) == set(found.layers)


def test_split_half_is_the_mean_cosine_of_a_plain_loop_over_splits():
    generator = torch.Generator().manual_seed(5)
    sides = []
    # a mean that both sides share, a thousand times as large as what differs
    for n, shift in ((37, 1.0), (6, -1.0)):
        rows = torch.randn(2, n, 7, generator=generator).double() + shift * torch.ones(7) + 1000.0
        weights = torch.randint(1, 9, (n,), generator=generator).double()
        sides.append([(rows[:, i::8], weights[i::8]) for i in range(8)])
    parts = [[Moments.empty(2, 7) for _ in side] for side in sides]
    for made, side in zip(parts, sides, strict=True):
        for part, (rows, weights) in zip(made, side, strict=True):
            part.add(rows, weights)

    def mean(side, chosen):
        rows = torch.cat([side[i][0] for i in chosen], dim=1)
        weights = torch.cat([side[i][1] for i in chosen])
        return (rows * weights[:, None]).sum(1) / weights.sum()

    cosines = []
    for half in combinations(range(8), 4):
        rest = [i for i in range(8) if i not in half]
        filled = all(any(len(side[i][1]) for i in h) for side in sides for h in (half, rest))
        if 0 in half and filled:
            a, b = (mean(sides[0], chosen) - mean(sides[1], chosen) for chosen in (half, rest))
            cosines.append(torch.cosine_similarity(a, b, dim=1))
    assert split_half(*parts) == pytest.approx(torch.stack(cosines).mean(0).tolist(), abs=1e-10)


def test_moments_are_plain_weighted_sums():
    generator = torch.Generator().manual_seed(6)
    means = torch.randn(3, 9, 4, generator=generator) * 1000
    weights = torch.randint(0, 9, (9,), generator=generator).double()
    found, w, x = Moments.empty(3, 4), weights[None, :, None], means.double()
    found.add(means, weights)
    assert torch.allclose(found.total, (w * x).sum(1), rtol=1e-10, atol=0)
    assert torch.allclose(found.total2, (w**2 * x).sum(1), rtol=1e-10, atol=0)
    assert torch.allclose(found.square, (w * x).square().sum(1), rtol=1e-10, atol=0)
    assert (found.weight, found.weight2) == (float(weights.sum()), float((weights**2).sum()))
    assert found.n == int((weights > 0).sum())


def test_the_same_seed_gives_the_same_halves(hooked_llama):
    first, again, other = (mean_diff(hooked_llama, BAD, GOOD, seed=s) for s in (1, 1, 2))
    assert first.split_half == again.split_half
    assert first.split_half != other.split_half
    assert all(torch.equal(first[i].vector, again[i].vector) for i in first)


def test_residual_norm_is_the_median_over_counted_tokens(hooked_llama):
    norms = torch.cat(per_conversation(hooked_llama, GOOD, 1, "all")).norm(dim=-1)
    found = residual_norm(hooked_llama, GOOD, 1)[1]
    assert found == pytest.approx(float(norms.median()), rel=1e-4)


def test_edit_diff_leaves_out_layers_that_do_not_move(hooked_llama):
    vector = torch.ones(hooked_llama.d_model)
    found = edit_diff(hooked_llama, GOOD, [Add(Direction.of(vector, 2))])
    assert found.layers == (2, 3)
    with pytest.raises(ValueError, match=r"the condition moves none of the layers \(0,\)"):
        edit_diff(hooked_llama, GOOD, [Add(Direction.of(vector, 2))], layers=0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], GOOD), {}, "positive is empty; give at least one conversation"),
        ((BAD, []), {}, "negative is empty"),
        ((BAD, GOOD), {"weighting": "letter"}, "unknown weighting 'letter'"),
        ((BAD, GOOD), {"layers": [9]}, "layer 9 is out of range"),
        ((BAD, GOOD), {"site": "nowhere"}, "unknown site 'nowhere'"),
    ],
)
def test_bad_input_is_refused(hooked_llama, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        mean_diff(hooked_llama, *arguments, **options)


def test_an_activation_that_is_not_finite_names_its_conversation(hooked_llama):
    huge = Add(Direction.of(torch.full((hooked_llama.d_model,), 3e38), 1))
    with pytest.raises(
        ValueError,
        match=r"the residual of (good|bad)-\d at layer 1 \(resid_post\) under base, .* not finite",
    ):
        mean_diff(hooked_llama, BAD, GOOD, edits=[huge, huge])


def test_the_effects_of_two_edits_are_of_two_conditions(hooked_llama):
    first, second = (
        edit_diff(hooked_llama, GOOD, Add(Direction.of(torch.eye(32)[i], 1))) for i in (0, 1)
    )
    assert first.provenance.condition != second.provenance.condition
    assert first.provenance.identity == second.provenance.identity == hooked_llama.identity
