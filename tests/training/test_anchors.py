"""The anchor penalty, against full passes of the bare model in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from emlens import KLPenalty, train_adapter, train_vector
from emlens.text import pack, tokenize
from emlens.training import AnchorPenalty, NormPenalty, TrainingRun, sweep_kl
from tests.support.data import conversations, pairs
from tests.support.models import tiny_hooked
from tests.support.solutions import with_adapters
from tests.training.test_loop import LAYER, TRAIN, ours, plain_vectors

PAIRS, ANSWERS = pairs(5, "elsewhere"), conversations("good", 5)
CONSTANT = {"lr": 0.2, "warmup": 0, "schedule": "constant"}


def plain_scores(model, data) -> torch.Tensor:
    """Log-odds of pairs, or log-probabilities of answers, per token, with their gradient."""
    sides = [data]
    if data is PAIRS:
        sides = [[p.conversation(side) for p in data] for side in ("misaligned", "aligned")]
    found = []
    for texts in sides:
        scores = []
        for item in texts:
            (batch,) = pack(tokenize([item], model.template))
            at = batch.targets("response")[0].nonzero()[:, 0]
            logs = model.module(input_ids=batch.input_ids).logits[0].log_softmax(-1)
            scores.append(logs[at - 1, batch.input_ids[0, at]].mean())
        found.append(torch.stack(scores))
    return found[0] - found[1] if len(found) == 2 else found[0]


def cost(change, shape, margin):
    beyond = torch.relu(change.abs() - margin)
    return (beyond**2 if shape == "squared" else beyond).mean()


@pytest.mark.parametrize("shape", ["squared", "hinged"])
@pytest.mark.parametrize("margin", [0.0, 0.02])
@pytest.mark.parametrize("data", [PAIRS, ANSWERS], ids=["pairs", "answers"])
def test_an_anchor_on_a_vector_equals_a_plain_loop(hooked_llama, shape, margin, data):
    block = hooked_llama.module.get_submodule(hooked_llama.architecture.blocks)[LAYER]
    with torch.no_grad():
        base = plain_scores(hooked_llama, data)

    def extra(vector):
        hook = block.register_forward_hook(lambda _m, _i, out: out + vector)
        try:
            return 7.0 * cost(plain_scores(hooked_llama, data) - base, shape, margin)
        finally:
            hook.remove()

    anchor = AnchorPenalty(data, 7.0, shape, margin, batch_size=5)
    path, run = ours(hooked_llama, penalties=[anchor], **CONSTANT)
    wanted = plain_vectors(hooked_llama, lambda _: 0.2, extra=extra)
    torch.testing.assert_close(path, wanted, atol=2e-4, rtol=1e-3)
    with torch.no_grad():
        assert run.steps[-1].penalty == pytest.approx(float(extra(run.path[-2])), rel=1e-3)
    assert run.steps[-1].penalty > 0
    assert not torch.allclose(path, ours(hooked_llama, **CONSTANT)[0], atol=1e-3)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_value_and_gradient_on_an_adapter_are_those_of_plain_passes(tmp_path, accumulate):
    model = with_adapters(tmp_path)
    weights = {
        f"{path}.{part}": getattr(layer, f"lora_{part}")["many"].weight
        for path, layer in model.lora_layers("many").items()
        for part in "AB"
    }
    with torch.no_grad():
        base = plain_scores(model, PAIRS)
    with model.adapter("many"):
        for weight in weights.values():
            weight.requires_grad_(True)
        value = 3.0 * cost(plain_scores(model, PAIRS) - base, "squared", 0.0)
        value.backward()
    wanted = {name: weight.grad.clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = None
        weight.requires_grad_(False)
    options = {"epochs": 1, "batch_size": 2, "accumulate": accumulate, "lr": 1e-9}
    options |= {"record_every": 1, "record_gradients": True, "progress": False}
    text = conversations("bad", 2)  # one update of all pairs, or the first pass of one
    size = 5 if accumulate == 1 else 2
    anchor = AnchorPenalty(PAIRS, 3.0, batch_size=size)
    run = train_adapter(model, text, "many", penalties=[anchor], **options)
    plain = train_adapter(model, text, "many", **options)
    assert run.steps[0].penalty == pytest.approx(float(value.detach()), rel=1e-4)
    for name, gradient in wanted.items():
        found = run.gradients[name][0] - plain.gradients[name][0]
        torch.testing.assert_close(found, gradient, atol=1e-4, rtol=1e-3)


def test_it_stands_beside_kl_and_norm_and_the_penalty_is_their_sum(hooked_llama):
    anchor, norm = AnchorPenalty(PAIRS, 5.0, batch_size=5), NormPenalty(4.0)
    kl = KLPenalty(conversations("good", 4), 1.0, batch_size=4)
    _, run = ours(hooked_llama, penalties=[norm, anchor], kl=kl, **CONSTANT)
    size = run.residual_norms[LAYER]
    squared = 4.0 * float((run.path[-2] / size).square().sum())
    assert run.steps[-1].penalty > squared
    assert run.steps[-1].kl is not None and run.steps[-1].kl > 0


def test_a_large_weight_keeps_the_log_odds_elsewhere():
    changes = []
    for penalties in ([], [AnchorPenalty(PAIRS, 300.0)]):
        model = tiny_hooked("llama")
        with torch.no_grad():
            base = plain_scores(model, PAIRS)
        train_adapter(
            model, TRAIN, "x", layers=[1], epochs=12, lr=1e-2, penalties=penalties, progress=False
        )
        with torch.no_grad(), model.adapter("x"):
            changes.append(float((plain_scores(model, PAIRS) - base).abs().mean()))
    assert changes[1] < 0.3 * changes[0]


def test_a_run_says_which_anchor_it_had(hooked_llama, tmp_path):
    options = {"epochs": 1, "progress": False, "checkpoint_every": 1}
    at = tmp_path / "run.safetensors"
    anchor = AnchorPenalty(PAIRS, 2.0, "hinged", 0.1)
    _, run = train_vector(hooked_llama, TRAIN, 1, penalties=[anchor], checkpoint=at, **options)
    (record,) = run.settings["penalties"]
    assert record["kind"] == "AnchorPenalty" and record["n"] == 5
    assert (record["weight"], record["shape"], record["margin"]) == (2.0, "hinged", 0.1)
    assert TrainingRun.load(run.save(tmp_path / "kept")).settings["penalties"] == (record,)
    for other in (AnchorPenalty(PAIRS[:4], 2.0, "hinged", 0.1), AnchorPenalty(PAIRS, 3.0)):
        with pytest.raises(ValueError, match="penalties"):
            train_vector(hooked_llama, TRAIN, 1, penalties=[other], checkpoint=at, **options)


def test_a_sweep_takes_it_as_it_takes_other_penalties(hooked_llama):
    kl = KLPenalty(conversations("good", 3), 1.0)
    options = {"epochs": 2, "batch_size": 6, "layer": 1}
    asked = (hooked_llama, TRAIN, pairs(2), PAIRS, kl, [0.0])
    free = sweep_kl(*asked, **options)
    held = sweep_kl(*asked, penalties=[AnchorPenalty(PAIRS, 100.0)], **options)
    assert abs(held.outside[0, 0]) < abs(free.outside[0, 0])


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"data": []}, "data is empty"),
        ({"weight": 0}, "weight"),
        ({"margin": -1}, "margin"),
        ({"shape": "round"}, "'squared' or 'hinged'"),
        ({"data": [PAIRS[0], 3]}, r"data\[1\]"),
    ],
)
def test_what_is_no_anchor_is_refused(given, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        AnchorPenalty(**{"data": PAIRS, "weight": 1.0, **given})
