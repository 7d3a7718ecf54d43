"""Adapters on one base act when asked, give PEFT's numbers, and leave no trace."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import emlens
from emlens.hooked.adapters import Adapters
from emlens.hooked.attach import attach
from emlens.hooked.load import ENGINES
from emlens.hooked.sweep import sweep
from emlens.text import pack, tokenize
from tests.support.adapters import logits_of, peft_model, rewrite, saved
from tests.support.data import conversations, pairs
from tests.support.models import tiny_model
from tests.support.tokenizers import chatml_tokenizer

EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "one layer, rank 1, rsLoRA": {
        "layers_to_transform": [2],
        "lora_alpha": 256,
        "use_rslora": True,
    },
    "rank 8 everywhere": {"r": 8, "target_modules": EVERYTHING},
    "some layers, rsLoRA": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ["o_proj"],
        "layers_to_transform": [0, 3],
    },
    "patterns": {"r": 2, "rank_pattern": {"layers.1.mlp.down_proj": 5}, "lora_dropout": 0.5},
}


@pytest.fixture
def base(tmp_path, tiny_tokenizer):
    """A folder with a tiny base model, named as its adapters record it."""
    folder = tmp_path / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def batch_of(tokenizer):
    (batch,) = pack(tokenize(conversations("good", 4), tokenizer), padding_side="left")
    return batch


def logits(model, batch):
    return model.unembed(model.hidden(batch))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", SETTINGS)
def test_an_adapter_gives_the_logits_of_its_peft_model(engine, kind, base, tmp_path):
    folder = saved(tmp_path / "adapter", tiny_model("llama"), **SETTINGS[kind])
    reference = peft_model(tiny_model("llama"), **SETTINGS[kind])
    model = emlens.load(base, engine=engine, adapters={"bad": folder})
    batch = batch_of(model.tokenizer)
    real = batch.mask("all")
    plain = logits_of(tiny_model("llama"), batch)[real]
    assert torch.allclose(logits(model, batch)[real], plain, atol=1e-4), "none acts after loading"
    with model.adapter("bad"):
        found = logits(model, batch)[real]
    assert torch.allclose(found, logits_of(reference, batch)[real], atol=1e-4)
    assert (found - plain).abs().max() > 0.1
    assert torch.allclose(logits(model, batch)[real], plain, atol=1e-4)


def test_an_adapter_is_the_scaled_product_on_top_of_the_weight(base, tmp_path):
    settings = SETTINGS["one layer, rank 1, rsLoRA"]
    folder = saved(tmp_path / "adapter", tiny_model("llama"), **settings)
    weights = load_file(folder / "adapter_model.safetensors")
    a, b = (next(w for k, w in weights.items() if f"lora_{x}" in k) for x in "AB")
    merged = copy.deepcopy(tiny_model("llama"))
    merged.model.layers[2].mlp.down_proj.weight.data += 256 / 1**0.5 * b @ a
    model = emlens.load(base, adapters={"bad": folder})
    batch = batch_of(model.tokenizer)
    with model.adapter("bad"):
        assert torch.allclose(logits(model, batch), logits_of(merged, batch), atol=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_many_adapters_share_one_copy_of_the_base(engine, base, tmp_path):
    folders = {
        name: saved(tmp_path / name, tiny_model("llama"), seed=seed, **SETTINGS[kind])
        for seed, (name, kind) in enumerate(
            {"one": "rank 8 everywhere", "two": "some layers, rsLoRA", "three": "patterns"}.items()
        )
    }
    model = emlens.load(base, engine=engine, adapters=folders)
    assert model.adapters == ("one", "two", "three")
    n_base = sum(w.numel() for w in tiny_model("llama").parameters())
    extra = sum(w.numel() for n, w in model.module.named_parameters() if "lora_" in n)
    assert sum(w.numel() for w in model.module.parameters()) == n_base + extra
    batch = batch_of(model.tokenizer)
    real = batch.mask("all")
    for seed, (name, kind) in enumerate(
        {"one": "rank 8 everywhere", "two": "some layers, rsLoRA", "three": "patterns"}.items()
    ):
        reference = peft_model(tiny_model("llama"), seed=seed, **SETTINGS[kind])
        with model.adapter(name):
            assert model.active_adapter == name
            found = logits(model, batch)[real]
        assert torch.allclose(found, logits_of(reference, batch)[real], atol=1e-4), name


def test_adapters_nest_and_come_back_when_a_block_raises(base, tmp_path):
    folders = {n: saved(tmp_path / n, tiny_model("llama"), seed=i) for i, n in enumerate("ab")}
    model = emlens.load(base, adapters=folders)
    batch = batch_of(model.tokenizer)
    plain = logits(model, batch)
    flags = {n: w.requires_grad for n, w in model.module.named_parameters()}
    with pytest.raises(ZeroDivisionError), model.adapter("a") as inside:
        assert inside is model
        first = logits(model, batch)
        with model.adapter("b"):
            assert not torch.equal(logits(model, batch), first)
            with model.adapter(None):
                assert model.active_adapter is None
                assert torch.equal(logits(model, batch), plain)
        assert torch.equal(logits(model, batch), first)
        assert flags == {n: w.requires_grad for n, w in model.module.named_parameters()}
        raise ZeroDivisionError
    assert model.active_adapter is None
    assert torch.equal(logits(model, batch), plain)
    assert flags == {n: w.requires_grad for n, w in model.module.named_parameters()}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_peft_model_is_wrapped_with_the_adapters_that_it_has(engine, tiny_tokenizer):
    brought = peft_model(tiny_model("llama"), r=4)
    brought.add_adapter(
        "second", LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    )
    batch = batch_of(tiny_tokenizer)
    real = batch.mask("all")
    model = emlens.wrap(brought, tiny_tokenizer, engine=engine, name="tiny-llama")
    assert model.adapters == ("second", "default") or model.adapters == ("default", "second")
    assert model.active_adapter == "default"
    expected = logits_of(brought, batch)[real]
    assert torch.allclose(logits(model, batch)[real], expected, atol=1e-4)
    with model.adapter(None):
        plain = logits_of(tiny_model("llama"), batch)[real]
        assert torch.allclose(logits(model, batch)[real], plain, atol=1e-4)
        assert brought.active_adapter == "default", "the user's own model keeps its adapter"
        assert torch.allclose(logits_of(brought, batch)[real], expected)


def test_the_adapter_in_force_is_in_the_provenance(base, tmp_path):
    model = emlens.load(base, adapters={"bad": saved(tmp_path / "a", tiny_model("llama"))})
    sides = conversations("bad", 3), conversations("good", 3)
    assert emlens.mean_diff(model, *sides, layers=1).provenance.adapter is None
    with model.adapter("bad"):
        assert emlens.mean_diff(model, *sides, layers=1).provenance.adapter == "bad"
        vector, _ = emlens.train_vector(model, sides[0], layer=1, epochs=1)
    assert vector.provenance.adapter == "bad"


def test_gpt2_and_modules_to_save_work_as_in_peft(tmp_path, tiny_tokenizer):
    folder = tmp_path / "tiny-gpt2"
    tiny_model("gpt2").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    adapter = saved(tmp_path / "adapter", tiny_model("gpt2"), r=3, **settings)
    model = emlens.load(folder, adapters={"bad": adapter})
    batch = batch_of(model.tokenizer)
    real = batch.mask("all")
    reference = peft_model(tiny_model("gpt2"), r=3, **settings)
    with model.adapter("bad"):
        found = logits(model, batch)[real]
    assert torch.allclose(found, logits_of(reference, batch)[real], atol=1e-4)
    with pytest.raises(RuntimeError, match=r"never runs adapter 'bad' at transformer\.h\.0\.attn"):
        emlens.load(folder, engine="transformer_lens", adapters={"bad": adapter})


def test_an_adapter_of_another_base_is_warned_of_and_of_its_own_is_not(base, tmp_path):
    adapter = saved(tmp_path / "bad", tiny_model("llama"))
    rewrite(adapter, base_model_name_or_path="someone/Another-14B")
    with pytest.warns(
        UserWarning,
        match="records 'someone/Another-14B' as its base, but this model is 'tiny-llama'",
    ):
        emlens.load(base, adapters={"bad": adapter})
    rewrite(adapter, base_model_name_or_path="unsloth/Tiny-LLaMA-bnb-4bit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emlens.load(base, adapters={"bad": adapter})


def test_half_precision_bases_keep_their_adapters_in_fp32(base, tmp_path):
    adapter = saved(tmp_path / "bad", tiny_model("llama"))
    model = emlens.load(base, dtype=torch.bfloat16, adapters={"bad": adapter})
    kept = {w.dtype for n, w in model.module.named_parameters() if "lora_" in n}
    assert kept == {torch.float32}
    batch = batch_of(model.tokenizer)
    with model.adapter("bad"):
        assert model.hidden(batch).dtype == torch.bfloat16


def test_a_sweep_takes_adapters_edits_and_both(tmp_path):
    folders = {
        "a": saved(tmp_path / "a", tiny_model("llama"), seed=1),
        "b": saved(tmp_path / "b", tiny_model("llama"), seed=2, layers_to_transform=[2]),
    }
    module = tiny_model("llama")
    attach(module, folders, "llama")
    model = emlens.wrap(module, chatml_tokenizer(), name="tiny-llama")
    (batch,) = pack(tokenize(conversations("bad", 3), model.tokenizer))
    push = [emlens.Add(emlens.Direction.of(torch.ones(32), 1))]
    conditions = {
        "base": [],
        "a": "a",
        "a pushed": ("a", push),
        "pushed": push,
        "b": ("b", []),
        "none": (None, push),
    }
    found = {n: hidden for n, hidden, _ in sweep(model, batch, conditions)}
    assert list(found) == list(conditions)
    for name, adapter, edits in (
        ("base", None, []),
        ("a", "a", []),
        ("a pushed", "a", push),
        ("pushed", None, push),
        ("b", "b", []),
        ("none", None, push),
    ):
        with model.adapter(adapter):
            assert torch.allclose(found[name], model.hidden(batch, edits), atol=1e-5), name
    assert model.active_adapter is None
    pair = emlens.log_odds(model, pairs(4), {"base": [], "a": "a"})
    with model.adapter("a"):
        alone = emlens.log_odds(model, pairs(4))
    assert pair.of("a").tolist() == pytest.approx(alone.of("a").tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="there is no adapter 'c'; the adapters are a, b"):
        emlens.log_odds(model, pairs(4), {"base": [], "c": "c"})


@pytest.fixture
def deep(tmp_path):
    """A model with adapters of all layers (a) and of the last layer alone (c, d)."""
    last = {"layers_to_transform": [3]}
    folders = {
        name: saved(tmp_path / name, tiny_model("llama"), seed=seed, **limits)
        for name, seed, limits in (("a", 1, {}), ("c", 2, last), ("d", 3, last))
    }
    module = tiny_model("llama")
    attach(module, folders, "llama")
    model = emlens.wrap(module, chatml_tokenizer(), name="tiny-llama")
    (batch,) = pack(tokenize(conversations("bad", 3), model.tokenizer))
    return model, batch


@pytest.mark.parametrize("standing", [None, "a", "c"])
def test_a_sweep_is_right_whichever_adapter_stands(deep, standing):
    model, batch = deep
    early, late = ([emlens.Add(emlens.Direction.of(torch.ones(32), at))] for at in (0, 3))
    conditions = {
        "as it is": [],
        "as it is, early": early,
        "base": (None, []),
        "a": "a",
        "c early": ("c", early),
        "c late": ("c", late),
        "d late": ("d", late),
    }
    with model.adapter(standing):
        found = {n: hidden for n, hidden, _ in sweep(model, batch, conditions)}
    for name, condition in conditions.items():
        adapter, edits = condition if isinstance(condition, tuple) else (standing, condition)
        if condition == "a":
            adapter, edits = "a", []
        with model.adapter(adapter):
            assert torch.allclose(found[name], model.hidden(batch, edits), atol=1e-5), name


def test_adapters_of_late_layers_share_the_states_of_the_base_below_them(deep):
    model, batch = deep
    ran = []
    for number, block in enumerate(model.module.model.layers):
        block.mlp.register_forward_hook(lambda *_, n=number: ran.append(n))
    list(sweep(model, batch, {"base": [], "c": "c", "d": "d"}))
    assert ran == [0, 1, 2, 3, 3, 3]


def test_an_adapter_outside_of_the_blocks_shares_nothing(deep):
    model, _ = deep
    parts = model.architecture
    config = LoraConfig(r=2, target_modules=["lm_head"])
    model.add_adapter("head", config)
    adapters = Adapters(model.module)
    assert [adapters.lowest_block(name, parts) for name in "acd"] == [0, 3, 3]
    assert adapters.lowest_block("head", parts) == 0
