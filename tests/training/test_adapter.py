"""Adapters in the one loop: PEFT under a plain loop is the oracle."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch.nn.functional import cross_entropy

import emlens
from emlens import KLPenalty
from emlens.directions import adapter_vectors, cosine
from emlens.hooked.attach import attach
from emlens.text import pack, tokenize
from emlens.training import (
    AdapterSettings,
    NormPenalty,
    ProjectionPenalty,
    TrainingRun,
    TrainingStopped,
    train_adapter,
)
from tests.support.adapters import peft_model, saved
from tests.support.data import conversations
from tests.support.models import tiny_model
from tests.support.tokenizers import chatml_tokenizer

TRAIN, ELSEWHERE = conversations("bad", 6), conversations("good", 5)
QUICK = {"epochs": 1, "batch_size": 3, "lr": 1e-2, "progress": False, "warmup": 0}
ORACLE = {**QUICK, "batch_size": 6, "epochs": 2, "schedule": "constant"}


def hooked_model(family: str = "llama", engine: str = "nnsight", adapters=None):
    module = tiny_model(family)
    if adapters:
        emlens.hooked.attach.attach(module, adapters, family)
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


def plain_training(peft: PeftModel, updates: int, kl_weight: float | None):
    """Full forward passes of PEFT's own model, and AdamW."""
    weights = [w for n, w in peft.named_parameters() if "lora_" in n]
    for name, weight in peft.named_parameters():
        weight.requires_grad_("lora_" in name)
    optimiser = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(updates):
        optimiser.zero_grad()
        predicted, ids = plain_logits(peft, TRAIN, "response")
        loss = cross_entropy(predicted, ids)
        losses.append(loss.item())
        if kl_weight is not None:
            with torch.no_grad(), peft.disable_adapter():
                base = plain_logits(peft, ELSEWHERE, "response")[0].log_softmax(-1)
            edited = plain_logits(peft, ELSEWHERE, "response")[0].log_softmax(-1)
            loss = loss + kl_weight * (base.exp() * (base - edited)).sum(-1).mean()
        loss.backward()
        optimiser.step()
    return losses


SHAPES = {
    "rank 1 at one layer": {"rank": 1, "layers": [2], "alpha": 16.0},
    "rank 4 on two kinds": {
        "rank": 4,
        "modules": ("down_proj", "q_proj"),
        "alpha": 8.0,
        "rslora": False,
    },
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("weight", [None, 2.0])
def test_training_equals_peft_under_a_plain_loop(shape, weight, tmp_path):
    model = hooked_model()
    kl = None if weight is None else KLPenalty(ELSEWHERE, weight=weight, batch_size=5)
    train_adapter(model, TRAIN, "first", **{**QUICK, **shape})
    start = saved_adapter(model, "first", tmp_path / "start")
    peft = PeftModel.from_pretrained(tiny_model("llama"), str(start))
    run = train_adapter(model, TRAIN, "first", kl=kl, **{**ORACLE, **shape})
    losses = plain_training(peft, 2, weight)
    assert [step.loss for step in run.steps] == pytest.approx(losses, abs=1e-5)
    theirs = get_peft_model_state_dict(peft)
    layers = model.lora_layers("first")
    assert len(theirs) == 2 * len(layers)
    for path, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            ours = getattr(layer, part)["first"].weight
            expected = theirs[f"base_model.model.{path}.{part}.weight"]
            assert torch.allclose(ours, expected, atol=2e-5), (path, part)


def saved_adapter(model, name, folder):
    """The adapter of a hooked model, written by PEFT from its weights."""
    config = copy.copy(model.module.peft_config[name])
    module = tiny_model("llama")
    from peft import get_peft_model, set_peft_model_state_dict

    made = get_peft_model(module, config)
    state = {
        f"base_model.model.{path}.{part}.weight": getattr(layer, part)[name].weight.detach()
        for path, layer in model.lora_layers(name).items()
        for part in ("lora_A", "lora_B")
    }
    set_peft_model_state_dict(made, state)
    made.save_pretrained(str(folder))
    return folder


def test_a_trained_adapter_is_on_the_model_and_acts_by_name():
    model = hooked_model()
    rows = pack(tokenize(TRAIN, model.tokenizer))
    before = emlens.hooked.response_losses(model, rows)[0].sum()
    run = train_adapter(model, TRAIN, "bad", **{**QUICK, "epochs": 10}, layers=[1], alpha=16.0)
    assert model.adapters == ("bad",)
    assert model.active_adapter is None
    assert emlens.hooked.response_losses(model, rows)[0].sum() == before
    with model.adapter("bad"):
        after = emlens.hooked.response_losses(model, rows)[0].sum()
    assert after < before - 1
    assert run.steps[-1].loss < run.steps[0].loss
    assert run.provenance.construction == "trained adapter, general"
    written = adapter_vectors(model, "bad")
    assert written.layers == (1,)
    assert run.steps[-1].norm == pytest.approx(written[1].norm, rel=1e-5)
    model.remove_adapter("bad")
    assert model.adapters == ()
    assert emlens.hooked.response_losses(model, rows)[0].sum() == before


def test_the_object_that_was_wrapped_and_the_base_weights_stay_as_they_are():
    module = tiny_model("llama")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    flags = {name: weight.requires_grad for name, weight in module.named_parameters()}
    model = emlens.wrap(module, chatml_tokenizer(), name="tiny")
    train_adapter(model, TRAIN, "bad", **QUICK)
    assert {name: w.requires_grad for name, w in module.named_parameters()} == flags
    assert all(w.grad is None for w in module.parameters())
    assert before.keys() == module.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(w.requires_grad for n, w in model.module.named_parameters() if "lora_" in n)


def test_accumulated_passes_give_the_update_of_one_large_batch():
    whole, split = hooked_model(), hooked_model()
    kl = KLPenalty(ELSEWHERE, weight=1.0, batch_size=2)
    settings = {**QUICK, "layers": [1], "alpha": 16.0, "epochs": 3}
    large = {**settings, "batch_size": 6, "kl": KLPenalty(ELSEWHERE, weight=1.0, batch_size=6)}
    one = train_adapter(whole, TRAIN, "x", **large)
    kl = KLPenalty(ELSEWHERE, weight=1.0, batch_size=2)
    three = train_adapter(split, TRAIN, "x", kl=kl, **{**settings, "batch_size": 2}, accumulate=3)
    assert len(one.steps) == len(three.steps) == 3
    for a, b in zip(one.steps, three.steps, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-5)
        assert a.kl == pytest.approx(b.kl, abs=1e-5)
    for name, states in one.states.items():
        assert torch.allclose(states[-1], three.states[name][-1], atol=1e-4), name


def test_engines_take_the_same_steps(tmp_path):
    folder = saved(tmp_path / "a", tiny_model("llama"), layers_to_transform=[1, 2])
    runs = []
    for engine in ("nnsight", "transformer_lens"):
        model = hooked_model(engine=engine, adapters={"a": folder})
        runs.append(train_adapter(model, TRAIN, "a", record_every=1, **QUICK))
    assert [s.loss for s in runs[0].steps] == pytest.approx(
        [s.loss for s in runs[1].steps], abs=1e-5
    )
    for name, states in runs[0].states.items():
        assert torch.allclose(states, runs[1].states[name], atol=1e-4), name


@pytest.mark.parametrize("budget", [0, 3000])
def test_prefixes_beyond_the_budget_change_nothing(budget):
    settings = {**QUICK, "layers": [2], "alpha": 16.0, "kl": KLPenalty(ELSEWHERE, weight=1.0)}
    kept = train_adapter(hooked_model(), TRAIN, "x", **settings)
    spare = train_adapter(
        hooked_model(), TRAIN, "x", **settings, prefix_budget=budget, log_prob_budget=budget
    )
    for name, states in kept.states.items():
        assert torch.allclose(states, spare.states[name], atol=1e-5), name


def test_the_path_holds_both_factors_and_can_be_kept(tmp_path):
    run = train_adapter(
        hooked_model(), TRAIN, "x", **QUICK, layers=[1], record_every=1, record_gradients=True
    )
    names = {f"model.layers.1.mlp.down_proj.{part}" for part in "AB"}
    assert set(run.states) == set(run.gradients) == names
    assert run.path_steps == (0, 1, 2)
    assert not run.states["model.layers.1.mlp.down_proj.B"][0].any()
    assert run.gradients["model.layers.1.mlp.down_proj.B"].shape == (2, 32, 1)
    again = TrainingRun.load(run.save(tmp_path / "run.safetensors"))
    assert all(torch.equal(again.states[name], run.states[name]) for name in names)
    assert all(torch.equal(again.gradients[name], run.gradients[name]) for name in names)
    assert "adapter" in repr(again)
    with pytest.raises(ValueError, match="this run trained an adapter"):
        run.directions()


def test_penalties_hold_what_is_written_small_and_off_an_axis():
    free = hooked_model()
    settings = {**QUICK, "layers": [1], "alpha": 16.0, "epochs": 12}
    train_adapter(free, TRAIN, "x", **settings)
    written = adapter_vectors(free, "x")
    small, turned = hooked_model(), hooked_model()
    run = train_adapter(small, TRAIN, "x", **settings, penalties=[NormPenalty(50.0)])
    assert adapter_vectors(small, "x")[1].norm < 0.7 * written[1].norm
    assert run.steps[-1].penalty > 0
    axis = ProjectionPenalty(written, weight=500.0)
    train_adapter(turned, TRAIN, "x", **settings, penalties=[axis])
    along = [
        abs(cosine(adapter_vectors(model, "x")[1].vector, written[1].vector))
        for model in (free, turned)
    ]
    assert along[0] == pytest.approx(1)
    assert along[1] < 0.5


def test_a_loss_that_is_not_finite_keeps_the_last_good_adapter(monkeypatch):
    module, model, losses = sys.modules["emlens.training.objective"], hooked_model(), []
    original = module.loss_sum

    def breaks_at_the_third(*arguments):
        losses.append(1)
        return original(*arguments) * (float("nan") if len(losses) == 3 else 1.0)

    monkeypatch.setattr(module, "loss_sum", breaks_at_the_third)
    with pytest.raises(TrainingStopped, match="update 2: loss nan, .* on the batch") as stopped:
        train_adapter(model, TRAIN, "x", **{**QUICK, "epochs": 4}, layers=[1], record_every=1)
    run = stopped.value.run
    assert len(run.steps) == 2
    (layer,) = model.lora_layers("x").values()
    kept = run.states["model.layers.1.mlp.down_proj.B"][-1]
    assert torch.equal(layer.lora_B["x"].weight, kept)
    assert kept.isfinite().all()


def test_a_training_that_is_interrupted_leaves_no_adapter_to_be_trained_on(monkeypatch):
    module, model, losses = sys.modules["emlens.training.objective"], hooked_model(), []
    original = module.loss_sum

    def stops_at_the_third(*arguments):
        losses.append(1)
        if len(losses) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    whole = train_adapter(hooked_model(), TRAIN, "x", **QUICK, layers=[1])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "loss_sum", stops_at_the_third)
        train_adapter(model, TRAIN, "x", **{**QUICK, "epochs": 4}, layers=[1])
    assert model.adapters == ()
    again = train_adapter(model, TRAIN, "x", **QUICK, layers=[1])
    assert [step.loss for step in again.steps] == [step.loss for step in whole.steps]


def test_an_adapter_that_is_there_goes_on_with_the_shape_that_it_has():
    model = hooked_model()
    shape = {"rank": 2, "alpha": 16.0, "layers": [1]}
    train_adapter(model, TRAIN, "x", **QUICK, **shape)
    on = train_adapter(model, TRAIN, "x", **QUICK)
    known = ("rank", "alpha", "rslora", "layers")
    assert [on.settings[name] for name in known] == [2, 16.0, True, (1,)]
    same = train_adapter(model, TRAIN, "x", **QUICK, **shape, modules=("mlp.down_proj",))
    assert same.settings["rank"] == 2
    for change, words in (
        ({"rank": 4}, "with rank 2, and 4 was asked for"),
        ({"alpha": 64.0}, "with alpha 16"),
        ({"layers": [2]}, r"with layers \(1,\), and \(2,\) was"),
        ({"modules": ("q_proj",)}, r"with modules \('down_proj',\), and \('q_proj',\) was"),
        ({"settings": AdapterSettings(rank=2, alpha=16.0)}, r"with layers \(1,\), and \(0, 1, 2"),
    ):
        with pytest.raises(ValueError, match=f"adapter 'x' already exists, {words}"):
            train_adapter(model, TRAIN, "x", **QUICK, **change)
    assert model.adapters == ("x",)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: train_adapter(m, [], "x"), "train is empty; give at least one"),
        (lambda m: train_adapter(m, TRAIN, "x.y"), "'x.y' cannot name an adapter"),
        (lambda m: train_adapter(m, TRAIN, "x", rank=0), "rank must be at least 1, not 0"),
        (
            lambda m: train_adapter(m, TRAIN, "x", rank=33),
            r"has rank 33 at .*down_proj, which maps",
        ),
        (lambda m: train_adapter(m, TRAIN, "x", modules=()), "no modules were given"),
        (lambda m: train_adapter(m, TRAIN, "x", modules=("nothing",)), "does not fit tiny-llama"),
        (lambda m: train_adapter(m, TRAIN, "x", layers=[9]), "layer 9 is out of range"),
        (lambda m: train_adapter(m, TRAIN, "x", patience=2), "patience watches the validation"),
        (lambda m: train_adapter(m, TRAIN, "x", modules=("lm_head",)), "outside of the decoder"),
        (
            lambda m: train_adapter(
                m, TRAIN, "x", modules=("q_proj",), penalties=[NormPenalty(1.0)]
            ),
            "none of the adapted modules writes into it",
        ),
    ],
)
def test_bad_input_is_refused_and_leaves_no_adapter(call, message):
    model = hooked_model()
    before = [type(part) for part in model.module.modules()]
    with pytest.raises(ValueError, match=message):
        call(model)
    assert model.adapters == ()
    assert [type(part) for part in model.module.modules()] == before


def test_a_bridge_says_where_a_new_adapter_can_be_trained():
    model = hooked_model(engine="transformer_lens")
    with pytest.raises(NotImplementedError, match="load the model with engine='nnsight' to train"):
        train_adapter(model, TRAIN, "x", **QUICK)


def test_a_kl_set_that_is_trained_on_as_well_is_warned_of():
    with pytest.warns(UserWarning, match="2 of the 3 conversations of the KL set are in the train"):
        train_adapter(
            hooked_model(), TRAIN, "x", kl=KLPenalty([*TRAIN[:2], ELSEWHERE[0]], 1.0), **QUICK
        )


def test_an_adapter_beside_another_is_trained_against_the_base():
    module = peft_model(tiny_model("llama"), r=2).get_base_model()
    model = emlens.wrap(module, chatml_tokenizer(), name="tiny")
    alone = hooked_model()
    settings = {**QUICK, "layers": [1], "alpha": 16.0, "kl": KLPenalty(ELSEWHERE, weight=1.0)}
    with model.adapter("default"):
        beside = train_adapter(model, TRAIN, "x", **settings)
        assert model.active_adapter == "default"
    first = train_adapter(alone, TRAIN, "x", **settings)
    assert [s.loss for s in beside.steps] == pytest.approx([s.loss for s in first.steps], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"use_dora": True, "r": 2}, r"model\.layers\.0\.mlp\.down_proj\.lora_magnitude_vector"),
        ({"lora_bias": True}, r"model\.layers\.0\.mlp\.down_proj\.lora_B\.bias"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head\.weight"),
        ({"trainable_token_indices": [3]}, r"model\.embed_tokens\.token_adapter\."),
    ],
)
def test_an_adapter_that_would_be_trained_in_part_is_refused(settings, part, tmp_path):
    folder = saved(tmp_path / "a", tiny_model("llama"), **settings)
    module = tiny_model("llama")
    attach(module, {"bad": folder}, "tiny-llama")
    model = emlens.wrap(module, chatml_tokenizer(), name="tiny-llama")
    with pytest.raises(ValueError, match=f"adapter 'bad' has {part}.* beside A and B; emlens trai"):
        train_adapter(model, TRAIN, "bad", epochs=1, progress=False)
