"""Training in place: what the objective is, that every row is steered, and repeatability."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

import emlens
from emlens import Direction, KLPenalty, train_vector
from emlens.hooked.load import ENGINES
from emlens.hooked.losses import Targets
from emlens.hooked.sites import SITES
from emlens.text import pack, tokenize
from emlens.training import TrainingRun, TrainingStopped, VectorSettings, paper_kl_weight
from tests.support.data import conversations
from tests.support.models import tiny_model
from tests.support.tokenizers import chatml_tokenizer

TRAIN, ELSEWHERE = conversations("bad", 6), conversations("good", 5)
QUICK = {"epochs": 2, "batch_size": 3, "progress": False}


def plain_step(model, layer, vector, kl_weight, tokens="response"):
    """The objective and its gradient by a full forward pass with a hook, nothing shared."""
    weights = vector.clone().requires_grad_()

    def logits(data, added):
        (batch,) = pack(tokenize(data, model.tokenizer))
        block = model.module.get_submodule(model.architecture.blocks)[layer]
        hook = block.register_forward_hook(lambda _m, _i, out: out + weights * added)
        out = model.module(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        ).logits
        hook.remove()
        rows, positions = batch.targets(tokens).nonzero(as_tuple=True)
        return out[rows, positions - 1], batch.input_ids[rows, positions]

    predicted, ids = logits(TRAIN, 1.0)
    loss = cross_entropy(predicted, ids)
    base = logits(ELSEWHERE, 0.0)[0].detach().log_softmax(-1)
    edited = logits(ELSEWHERE, 1.0)[0].log_softmax(-1)
    kl = (base.exp() * (base - edited)).sum(-1).mean()
    (loss + kl_weight * kl).backward()
    return loss.item(), kl.item(), weights.grad


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tokens", ["response", "all"])
def test_loss_kl_and_gradient_equal_a_plain_loop(hooked, family, tokens):
    model = hooked(family)
    start = Direction.of(
        0.5 * torch.randn(model.d_model, generator=torch.Generator().manual_seed(0)), 1
    )
    _, run = train_vector(
        model,
        TRAIN,
        1,
        kl=KLPenalty(ELSEWHERE, weight=2.0, tokens=tokens, batch_size=5),
        initial=start,
        epochs=1,
        batch_size=6,
        tokens=tokens,
        alpha=1.0,
        progress=False,
    )
    loss, kl, gradient = plain_step(model, 1, start.vector, 2.0, tokens)
    model.module.zero_grad()
    step = run.steps[0]
    assert step.loss == pytest.approx(loss, abs=1e-5)
    assert step.kl == pytest.approx(kl, abs=1e-5)
    assert step.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-4)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_engines_take_the_same_step_of_a_vector(family, site):
    runs = {}
    for engine in ENGINES:
        model = emlens.wrap(tiny_model(family), chatml_tokenizer(), engine=engine, name="tiny")
        kl = KLPenalty(ELSEWHERE, weight=2.0, batch_size=5)
        options = {**QUICK, "epochs": 1, "batch_size": 6, "record_gradients": True}
        runs[engine] = train_vector(model, TRAIN, 1, site=site, kl=kl, **options)[1]
    one, other = (runs[engine] for engine in ENGINES)
    assert one.steps[0].loss == pytest.approx(other.steps[0].loss, abs=1e-5)
    assert one.steps[0].kl == pytest.approx(other.steps[0].kl, abs=1e-5)
    (gradient,), (expected,) = one.gradients.values(), other.gradients.values()
    assert float((gradient - expected).norm() / expected.norm()) < 1e-4


def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(hooked_llama):
    before = {k: v.clone() for k, v in hooked_llama.module.state_dict().items()}
    _, run = train_vector(hooked_llama, TRAIN, 1, epochs=8, batch_size=6, lr=0.1, progress=False)
    assert run.steps[-1].loss < run.steps[0].loss - 0.1
    assert all(torch.equal(before[k], v) for k, v in hooked_llama.module.state_dict().items())
    assert all(w.requires_grad and w.grad is None for w in hooked_llama.module.parameters())


def test_what_is_returned_is_what_was_really_added(hooked_llama):
    direction, run = train_vector(hooked_llama, TRAIN, 1, **QUICK, seed=1)
    rows = pack(tokenize(TRAIN, hooked_llama.tokenizer))
    sums, counts = emlens.hooked.response_losses(hooked_llama, rows, [emlens.Add(direction)])
    again, _ = train_vector(
        hooked_llama, TRAIN, 1, initial=direction, epochs=1, batch_size=6, progress=False
    )
    _, first = train_vector(
        hooked_llama, TRAIN, 1, initial=direction, epochs=1, batch_size=6, progress=False
    )
    assert first.steps[0].loss == pytest.approx(float(sums.sum() / counts.sum()), abs=1e-5)
    assert torch.equal(run.path[-1], direction.vector)
    assert not torch.equal(again.vector, direction.vector)


def test_a_dose_is_a_share_of_the_median_residual_norm(hooked_llama):
    expected = emlens.directions.residual_norm(hooked_llama, TRAIN, 2)[2]
    for budget in (0, 2**30):
        direction, run = train_vector(hooked_llama, TRAIN, 2, prefix_budget=budget, **QUICK)
        assert run.residual_norms[2] == pytest.approx(expected, rel=1e-5)
        assert direction.doses[2] == pytest.approx(direction.norm / expected, rel=1e-5)


def test_a_seed_repeats_bit_for_bit_and_another_differs(hooked_llama):
    kl = KLPenalty(ELSEWHERE, weight=1.0)
    first, again, other = (
        train_vector(hooked_llama, TRAIN, 1, kl=kl, seed=seed, **QUICK)[1] for seed in (4, 4, 5)
    )
    assert torch.equal(first.path, again.path)
    assert first.steps == again.steps
    assert not torch.equal(first.path, other.path)


def test_all_prefixes_together_stay_within_the_budget(hooked_llama, monkeypatch):
    from emlens.training import objective

    made = []
    plain = objective.PrefixCache
    monkeypatch.setattr(
        objective, "PrefixCache", lambda *a, **k: made.append(plain(*a, **k)) or made[-1]
    )
    kl, budget = KLPenalty(ELSEWHERE, weight=1.0), 12_000
    options = {"kl": kl, "validation": TRAIN, "prefix_budget": budget, **QUICK}
    train_vector(hooked_llama, TRAIN, 2, **options)
    assert len(made) == 3
    assert 0 < made[0].bytes <= sum(cache.bytes for cache in made) <= budget


@pytest.mark.parametrize("budget", [0, 5_000])
def test_prefixes_and_log_probabilities_beyond_the_budget_change_nothing(hooked_llama, budget):
    kl = KLPenalty(ELSEWHERE, weight=1.0)
    kept, _ = train_vector(hooked_llama, TRAIN, 2, kl=kl, **QUICK)
    recomputed, _ = train_vector(
        hooked_llama, TRAIN, 2, kl=kl, prefix_budget=budget, log_prob_budget=budget, **QUICK
    )
    assert torch.allclose(kept.vector, recomputed.vector, atol=1e-4)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", [0, 2])
def test_any_site_of_any_layer_can_be_trained(hooked, site, layer):
    for family in ("llama", "gemma2"):
        direction, run = train_vector(hooked(family), TRAIN, layer, site=site, lr=0.1, **QUICK)
        assert (direction.site, direction.layer) == (site, layer)
        assert direction.norm > 0
        assert min(step.loss for step in run.steps[1:]) < run.steps[0].loss


def test_every_row_is_steered_and_contributes_gradient(hooked_llama):
    """The gradient of a batch is the token-weighted mean of its rows' own gradients."""
    model, rows = hooked_llama, TRAIN[:3]
    start = Direction.of(torch.full((model.d_model,), 0.5), 1)
    options = {"initial": start, "alpha": 1.0, "epochs": 1, "progress": False}

    def of(data):
        _, run = train_vector(model, data, 1, record_gradients=True, batch_size=9, **options)
        return run.gradients["vector.1"][0], run.steps[0].loss

    (batch,) = pack(tokenize(rows, model.tokenizer), sort=False)
    shares = batch.targets("response").sum(1) / batch.targets("response").sum()
    alone = [of([row]) for row in rows]
    gradient, loss = of(rows)
    expected = sum(share * own for share, (own, _) in zip(shares, alone, strict=True))
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert loss == pytest.approx(
        sum(float(share) * own for share, (_, own) in zip(shares, alone, strict=True)), abs=1e-5
    )
    assert all(float(own.norm()) > 1e-3 for own, _ in alone)


def test_a_kl_penalty_lowers_the_kl_elsewhere(hooked_llama):
    settings = {"epochs": 12, "batch_size": 6, "lr": 0.1, "progress": False}
    general, _ = train_vector(hooked_llama, TRAIN, 1, **settings)
    kl = KLPenalty(ELSEWHERE, weight=5.0)
    narrow, _ = train_vector(hooked_llama, TRAIN, 1, kl=kl, **settings)

    def divergence(direction):
        (batch,) = pack(tokenize(ELSEWHERE, hooked_llama.tokenizer))
        targets = Targets.of(batch)
        base = targets.predictors(hooked_llama.hidden(batch))
        edited = targets.predictors(hooked_llama.hidden(batch, [emlens.Add(direction)]))
        return float(emlens.hooked.token_kl(hooked_llama, base, edited).mean())

    assert divergence(narrow) < 0.5 * divergence(general)


def test_training_inside_of_edited_keeps_those_edits_in_force(hooked_llama):
    other = emlens.Add(Direction.of(torch.ones(hooked_llama.d_model), 1))
    with hooked_llama.edited(other):
        _, inside = train_vector(hooked_llama, TRAIN, 1, **QUICK)
        rows = pack(tokenize(TRAIN, hooked_llama.tokenizer))
        sums, counts = emlens.hooked.response_losses(hooked_llama, rows)
        _, whole = train_vector(hooked_llama, TRAIN, 1, epochs=1, batch_size=6, progress=False)
    assert whole.steps[0].loss == pytest.approx(float(sums.sum() / counts.sum()), abs=1e-5)
    _, outside = train_vector(hooked_llama, TRAIN, 1, **QUICK)
    assert inside.steps[0].loss != outside.steps[0].loss


def test_a_loss_that_is_not_finite_stops_with_the_batch_and_keeps_the_run(
    hooked_llama, monkeypatch
):
    module = sys.modules["emlens.training.objective"]
    losses = []

    def breaks_at_the_third(*arguments):
        losses.append(1)
        return original(*arguments) * (float("nan") if len(losses) == 3 else 1.0)

    original = module.loss_sum
    monkeypatch.setattr(module, "loss_sum", breaks_at_the_third)
    with pytest.raises(TrainingStopped, match=r"update 2: loss nan, .* on the batch .*bad-\d") as e:
        train_vector(hooked_llama, TRAIN, 1, **QUICK)
    kept = e.value.run
    assert len(kept.steps) == 2
    assert kept.path_steps == (0, 1, 2)
    assert kept.path.isfinite().all()


def test_runs_can_be_kept(hooked_llama, tmp_path):
    _, run = train_vector(hooked_llama, TRAIN, 1, record_every=3, **QUICK)
    assert run.path_steps == (0, 3, 4)
    again = TrainingRun.load(run.save(tmp_path / "run.safetensors"))
    assert torch.equal(again.path, run.path)
    assert (again.steps, again.settings, again.provenance) == (
        run.steps,
        run.settings,
        run.provenance,
    )
    assert torch.equal(again.direction().vector, run.direction().vector)
    assert list(run.table()["step"]) == [0, 1, 2, 3]


def test_the_learning_rate_rises_and_falls():
    settings = VectorSettings(lr=1.0, warmup=4)
    rates = [settings.rate(step, 10) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[-1] == pytest.approx(1 / 6)
    assert VectorSettings(lr=1.0, warmup=0, schedule="constant").rate(7, 10) == 1.0


def test_the_papers_weight_on_qwen_is_six_point_six_nats():
    assert paper_kl_weight(1e6, 152_064) == pytest.approx(6.58, abs=0.01)
    assert paper_kl_weight(paper_kl_weight(3.0, 97), 97, to_paper=True) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: train_vector(m, [], 1), "is empty; give at least one"),
        (lambda m: train_vector(m, TRAIN, 8), "layer 8 is out of range"),
        (lambda m: train_vector(m, TRAIN, 1, site="x"), "unknown site 'x'"),
        (lambda m: train_vector(m, TRAIN, 1, lr=0), "lr must be above 0"),
        (lambda m: train_vector(m, TRAIN, 1, epochs=0), "epochs must be at least 1, not 0"),
        (lambda m: train_vector(m, TRAIN, 1, schedule="cosy"), "unknown schedule 'cosy'"),
        (lambda m: KLPenalty([], weight=1), "conversations is empty"),
        (lambda m: KLPenalty(TRAIN, weight=0), "weight must be above 0"),
        (
            lambda m: train_vector(m, TRAIN, 1, initial=Direction.of(torch.ones(3), 1)),
            "initial has width 3, but tiny-llama has d_model 32",
        ),
    ],
)
def test_bad_input_is_refused(hooked_llama, call, message):
    with pytest.raises(ValueError, match=message):
        call(hooked_llama)
