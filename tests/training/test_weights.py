"""Full finetuning and gradient checkpointing: a plain loop is the oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

import emlens
from emlens import Add, KLPenalty
from emlens.directions import random_direction
from emlens.hooked import NonFiniteError
from emlens.text import pack, tokenize
from emlens.training import (
    Organism,
    train_adapter,
    train_vector,
    train_weights,
)
from emlens.training.presets import train_preset
from tests.support.data import conversations
from tests.support.models import tiny_model
from tests.support.tokenizers import chatml_tokenizer

TRAIN, ELSEWHERE = conversations("bad", 6), conversations("good", 5)
QUICK = {"epochs": 2, "batch_size": 6, "lr": 1e-3, "progress": False, "warmup": 0}
ORACLE = {**QUICK, "schedule": "constant"}


def hooked_model(family: str = "llama", engine: str = "nnsight"):
    module = tiny_model(family)
    return emlens.wrap(module, chatml_tokenizer(), engine=engine, name=f"tiny-{family}")


def plain_logits(module, data, tokens):
    (batch,) = pack(tokenize(data, chatml_tokenizer()))
    out = module(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
    ).logits
    rows, positions = batch.targets(tokens).nonzero(as_tuple=True)
    return out[rows, positions - 1], batch.input_ids[rows, positions]


def plain_training(module, updates: int, kl_weight: float | None, layers=None):
    """Full forward passes of the model's own code, and AdamW on the weights."""
    base = copy.deepcopy(module)
    for name, weight in module.named_parameters():
        weight.requires_grad_(layers is None or any(f"layers.{n}." in name for n in layers))
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(updates):
        optimiser.zero_grad()
        loss = cross_entropy(*plain_logits(module, TRAIN, "response"))
        losses.append(loss.item())
        if kl_weight:
            with torch.no_grad():
                before = plain_logits(base, ELSEWHERE, "response")[0].log_softmax(-1)
            after = plain_logits(module, ELSEWHERE, "response")[0].log_softmax(-1)
            kl = (before.exp() * (before - after)).sum(-1).mean()
            loss = loss + kl_weight * kl
        loss.backward()
        optimiser.step()
    return losses


def weights_of(module):
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def assert_equal(found, expected):
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def assert_moved_alike(found, expected, start):
    """The same movement; AdamW turns a gradient of zero, up to rounding, into a whole step."""
    for name, weight in expected.items():
        if name.endswith("c_attn.bias"):
            continue  # keys' bias: attention does not depend on it
        ours, theirs = (found[name] - start[name]).flatten(), (weight - start[name]).flatten()
        off = (ours - theirs).norm() / theirs.norm()
        assert off < 0.03, f"{name}: {off}"


@pytest.mark.parametrize("kl_weight", [None, 0.7])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gpt2", True)])
def test_full_finetuning_equals_a_plain_loop(family, tied, kl_weight):
    model = hooked_model(family)
    assert (
        model.module.get_output_embeddings().weight is model.module.get_input_embeddings().weight
    ) == tied
    plain = copy.deepcopy(model.module)
    start = weights_of(plain)
    losses = plain_training(plain, 4, kl_weight)
    kl = None if kl_weight is None else KLPenalty(ELSEWHERE, weight=kl_weight, batch_size=5)

    run = train_weights(model, TRAIN, kl=kl, **{**ORACLE, "epochs": 4})

    assert run.steps[0].loss == pytest.approx(losses[0], abs=1e-5)
    # later ones carry what AdamW makes of rounding
    assert [step.loss for step in run.steps] == pytest.approx(losses, abs=1e-4)
    assert_moved_alike(weights_of(model.module), weights_of(plain), start)
    moved = [
        name for name, weight in weights_of(model.module).items() if (weight != start[name]).any()
    ]
    assert set(moved) == set(start)


def test_finetuning_some_layers_equals_a_plain_loop_and_leaves_the_others():
    model = hooked_model()
    plain = copy.deepcopy(model.module)
    before = weights_of(plain)
    plain_training(plain, 2, None, layers=[2])

    run = train_weights(model, TRAIN, layers=range(2, 3), **ORACLE)

    after = weights_of(model.module)
    assert_moved_alike(
        {n: after[n] for n in after if ".2." in n},
        {n: w for n, w in weights_of(plain).items() if ".2." in n},
        before,
    )
    assert all((after[n] == before[n]).all() for n in before if ".layers.2." not in n)
    assert run.settings["layers"] == [2] or run.settings["layers"] == (2,)


def test_finetuning_leaves_the_flags_of_the_weights_as_they_were():
    model = hooked_model()
    model.module.get_input_embeddings().weight.requires_grad_(False)
    before = {name: weight.requires_grad for name, weight in model.module.named_parameters()}

    train_weights(model, TRAIN, **QUICK)

    assert {n: w.requires_grad for n, w in model.module.named_parameters()} == before
    assert all(weight.grad is None for weight in model.module.parameters())


def test_finetuning_killed_in_the_middle_ends_bit_identical(tmp_path, monkeypatch):
    whole, parts = hooked_model(), hooked_model()
    settings = {**QUICK, "batch_size": 2}
    train_weights(whole, TRAIN, **settings)
    real, calls = torch.optim.AdamW.step, []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", dying)
    where = {"checkpoint": tmp_path / "run.safetensors", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train_weights(parts, TRAIN, **settings, **where)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="settings.start: .* there.*load the model anew"):
        train_weights(parts, TRAIN, **settings, **where)
    fresh = hooked_model()

    train_weights(fresh, TRAIN, **settings, **where)

    assert_equal(weights_of(fresh.module), weights_of(whole.module))


def test_a_loss_that_is_not_finite_stops_finetuning_with_the_last_good_weights():
    model = hooked_model()
    broken = weights_of(model.module)

    def poisoned(module, args, output):
        return output * float("nan")

    handle = model.module.model.layers[0].mlp.register_forward_hook(poisoned)
    with pytest.raises(
        NonFiniteError, match="the final hidden state of .* under base is not finite"
    ):
        train_weights(model, TRAIN, **QUICK)
    handle.remove()

    assert_equal(weights_of(model.module), broken)


def test_finetuning_refuses_what_cannot_be_right():
    model = hooked_model()
    with pytest.raises(ValueError, match="is empty; give at least one"):
        train_weights(model, [])
    with pytest.raises(ValueError, match="layer 9 does not exist|9"):
        train_weights(model, TRAIN, layers=[9])
    with pytest.raises(ValueError, match="raise the budget, or take a smaller KL set"):
        train_weights(model, TRAIN, kl=KLPenalty(ELSEWHERE, 1.0), log_prob_budget=10, **QUICK)
    with pytest.raises(ValueError, match="load the model with dtype=torch.float32"):
        half = emlens.wrap(tiny_model("llama").bfloat16(), chatml_tokenizer(), name="tiny")
        train_weights(half, TRAIN)
    with pytest.raises(NotImplementedError, match="engine='nnsight'"):
        train_weights(hooked_model(engine="transformer_lens"), TRAIN)
    run = train_weights(model, TRAIN, **QUICK)
    with pytest.raises(ValueError, match="model.module.save_pretrained"):
        Organism.of(model, run, "full")


def test_a_finetuned_model_is_kept_and_loaded_as_any_other(tmp_path):
    model = hooked_model()
    train_weights(model, TRAIN, **QUICK)
    model.module.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)

    again = emlens.load(str(tmp_path))

    (batch,) = model.batches(TRAIN)
    torch.testing.assert_close(again.hidden(batch), model.hidden(batch))


def test_the_papers_full_finetuning_is_a_preset():
    model = hooked_model()
    _, run = train_preset("full", model, TRAIN, epochs=1, progress=False)

    assert run.settings["kind"] == "weights"
    assert run.settings["schedule"] == "cosine"


def gradients(model, train, **options):
    run = train(model, **options)
    return {
        name: value[0]
        for name, value in (run[1] if isinstance(run, tuple) else run).gradients.items()
    }


@pytest.mark.parametrize("engine", ["nnsight", "transformer_lens"])
def test_gradient_checkpointing_changes_no_number_of_a_vector(engine):
    settings = {**QUICK, "record_gradients": True}
    plain, plain_run = train_vector(hooked_model(engine=engine), TRAIN, 1, **settings)
    model = hooked_model(engine=engine)
    forwards = [block.__dict__.get("forward") for block in model.module.model.layers]

    saving, run = train_vector(model, TRAIN, 1, gradient_checkpointing=True, **settings)

    torch.testing.assert_close(saving.vector, plain.vector, rtol=0, atol=1e-6)
    assert [s.loss for s in run.steps] == pytest.approx([s.loss for s in plain_run.steps], abs=1e-6)
    assert [block.__dict__.get("forward") for block in model.module.model.layers] == forwards


@pytest.mark.parametrize("rank", [1, 4])
def test_gradient_checkpointing_changes_no_number_of_an_adapter(rank):
    settings = {**QUICK, "rank": rank, "alpha": 8, "record_gradients": True, "record_every": 1}
    kl = KLPenalty(ELSEWHERE, weight=0.5)
    plain = train_adapter(hooked_model(), TRAIN, "a", kl=kl, **settings)

    saving = train_adapter(
        hooked_model(), TRAIN, "a", kl=kl, gradient_checkpointing=True, **settings
    )

    assert plain.gradients.keys() == saving.gradients.keys()
    for name, value in plain.gradients.items():
        torch.testing.assert_close(saving.gradients[name], value, rtol=1e-4, atol=1e-7)


def test_gradient_checkpointing_computes_the_blocks_again_and_edits_outside_of_them_hold():
    model = hooked_model()
    vector, _ = train_vector(model, TRAIN, 2, **QUICK)
    calls = []
    for n, block in enumerate(model.module.model.layers):
        block.self_attn.register_forward_hook(lambda *_, n=n: calls.append(n))
    steering = Add(random_direction(vector, 1), scale=3.0)
    settings = {**QUICK, "epochs": 1}
    with model.edited(steering):
        saving, _ = train_vector(model, TRAIN, 1, gradient_checkpointing=True, **settings)
    again = [calls.count(n) for n in range(model.n_layers)]
    calls.clear()
    with model.edited(steering):
        plain, _ = train_vector(model, TRAIN, 1, **settings)
    once = [calls.count(n) for n in range(model.n_layers)]

    torch.testing.assert_close(saving.vector, plain.vector, rtol=0, atol=1e-6)
    assert again[2:] == [n + 1 for n in once[2:]]


def test_gradient_checkpointing_refuses_edits_inside_of_a_block():
    model = hooked_model()
    with pytest.raises(ValueError, match="an edit acts at mlp_out"):
        train_vector(model, TRAIN, 1, site="mlp_out", gradient_checkpointing=True, **QUICK)
