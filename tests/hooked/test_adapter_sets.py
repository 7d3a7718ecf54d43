"""Several adapters on one base: their names, those in force, and what each of them owns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

import emlens
from emlens.hooked.adapters import Adapters
from emlens.hooked.attach import attach, inject, remove
from emlens.hooked.load import ENGINES
from emlens.hooked.untouched import checksum
from tests.support.adapters import TOKENS, batch_of, logits_of, peft_model, rewrite, saved
from tests.support.models import tiny_model
from tests.support.tokenizers import chatml_tokenizer

PAIRS = {
    "two of LoRA": ({"r": 4}, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "other layers": ({"layers_to_transform": [1]}, {"layers_to_transform": [0]}),
    "DoRA and LoRA": ({"use_dora": True, "r": 2}, {"r": 2}),
    "LoRA and a head": ({}, {"modules_to_save": ["lm_head"], "target_modules": ["o_proj"]}),
    "a head and tokens": (
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": TOKENS, "target_modules": ["q_proj"]},
    ),
}


def small():
    return tiny_model("llama", n_layers=2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("pair", PAIRS)
def test_two_adapters_act_together_as_in_peft(engine, pair, tmp_path):
    folders = {
        name: saved(tmp_path / name, small(), seed=seed, **settings)
        for seed, (name, settings) in enumerate(zip("ab", PAIRS[pair], strict=True))
    }
    module = small()
    attach(module, folders, "tiny-llama")
    model = emlens.wrap(module, chatml_tokenizer(), engine=engine, name="tiny-llama")
    theirs = PeftModel.from_pretrained(small(), str(folders["a"]), adapter_name="a").eval()
    theirs.load_adapter(str(folders["b"]), adapter_name="b")
    batch = batch_of(TOKENS)
    real = batch.mask("all")
    adapters = model._adapters
    assert adapters.names == ("a", "b")
    for names in (["a", "b"], ["b", "a"], ["b"], "a", [], None, ("a", "a")):
        alone = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names or ()))
        with adapters.using(names), torch.no_grad():
            found = model.unembed(model.hidden(batch)[real])
            assert adapters.acting == alone
        if alone:
            tuner: Any = theirs.base_model
            tuner.set_adapter(list(alone))
            expected = logits_of(theirs, batch)[real]
        else:
            expected = logits_of(small(), batch)[real]
        assert torch.allclose(found, expected, atol=2e-4), names
        assert adapters.acting == ()


def test_adapters_that_replace_the_same_module_do_not_act_together(tmp_path):
    folders = {
        name: saved(tmp_path / name, small(), seed=seed, **settings)
        for seed, (name, settings) in enumerate(
            {
                "a": {"modules_to_save": ["lm_head"]},
                "b": {"modules_to_save": ["lm_head"]},
                "c": {"trainable_token_indices": TOKENS[:1]},
                "d": {"trainable_token_indices": TOKENS[1:]},
            }.items()
        )
    }
    module = small()
    attach(module, folders, "tiny-llama")
    adapters = Adapters(module)
    with pytest.raises(ValueError, match="adapters 'a' and 'b' both replace lm_head; only one"):
        adapters.using(["a", "b"]).__enter__()
    with pytest.raises(ValueError, match=r"'c' and 'd' both replace model\.embed_tokens; only one"):
        adapters.using(["c", "d"]).__enter__()
    assert adapters.acting == ()
    with pytest.raises(ValueError, match="there is no adapter 'e'; the adapters are a, b, c, d"):
        adapters.using(["a", "e"]).__enter__()


def test_a_module_is_not_replaced_where_another_adapter_works_inside_of_it(tmp_path):
    lora = saved(tmp_path / "a", small())
    whole = saved(tmp_path / "b", small(), modules_to_save=["mlp"], target_modules=["q_proj"])
    for folders, message in (
        ({"a": lora, "b": whole}, r"'b' replaces model\.layers\.0\.mlp as a whole .* works inside"),
        ({"b": whole, "a": lora}, r"replaces model\.layers\.0\.mlp as a whole|does not fit"),
    ):
        module = small()
        modules = dict(module.named_modules())
        with pytest.raises(ValueError, match=message):
            attach(module, folders, "tiny-llama")
        assert dict(module.named_modules()) == modules


def test_removing_one_of_two_lets_the_other_act_on_and_no_other_begin(tmp_path):
    folders = {
        "a": saved(tmp_path / "a", small(), seed=1, modules_to_save=["lm_head"]),
        "b": saved(tmp_path / "b", small(), seed=2),
    }
    module = small()
    attach(module, folders, "tiny-llama")
    adapters, batch = Adapters(module), batch_of(TOKENS)
    with adapters.using("b"):
        alone = logits_of(module, batch)
    with adapters.using(["a", "b"]):
        remove(module, "a")
        assert adapters.acting == ("b",)
        assert torch.equal(logits_of(module, batch), alone)
    assert adapters.acting == ()
    remove(module, "b")
    attach(module, folders, "tiny-llama")
    assert adapters.acting == ()
    with adapters.using("a"):
        remove(module, "a")
        assert adapters.acting == ()
        assert torch.equal(logits_of(module, batch), logits_of(small(), batch))


def test_a_refused_adapter_leaves_those_beside_it_as_they_are(tmp_path):
    several = {"modules_to_save": ["lm_head"], "trainable_token_indices": TOKENS}
    good = saved(tmp_path / "good", small(), seed=1, **several)
    bad = saved(tmp_path / "bad", small(), seed=2, **several)
    rewrite(bad, r=3)
    module, batch = small(), batch_of(TOKENS)
    attach(module, {"good": good}, "tiny-llama")
    adapters = Adapters(module)
    with adapters.using("good"):
        next(
            module.get_submodule("model.layers.0.mlp.down_proj.lora_A").parameters()
        ).requires_grad_()
        expected = logits_of(module, batch)
        flags = {path: weight.requires_grad for path, weight in module.named_parameters()}
        with pytest.raises(ValueError, match="adapter 'bad' does not fit tiny-llama: lora_A at"):
            attach(module, {"bad": bad}, "tiny-llama")
        assert adapters.names == adapters.acting == ("good",)
        assert torch.equal(logits_of(module, batch), expected)
        assert flags == {path: weight.requires_grad for path, weight in module.named_parameters()}
        rewrite(bad, r=1)
        attach(module, {"bad": bad}, "tiny-llama")
        assert adapters.names == ("good", "bad")
        assert adapters.acting == ("good",)
        assert torch.equal(logits_of(module, batch), expected)


def test_what_an_adapter_owns_does_not_have_its_name_in_it(tmp_path):
    folder = saved(tmp_path / "a", small(), use_dora=True, r=2, modules_to_save=["lm_head"])
    found = []
    for name in ("one", "a b"):
        module = small()
        attach(module, {name: folder}, "tiny-llama")
        adapters = Adapters(module)
        found.append((adapters.parameters(name), adapters.scalings(name)))
    (first, scales), (second, _) = found
    assert scales == {f"model.layers.{n}.mlp.down_proj": 8.0 for n in (0, 1)}
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    place = "model.layers.0.mlp.down_proj.lora_"
    assert {"lm_head.weight", f"{place}A.weight", f"{place}magnitude_vector"} < first.keys()


@pytest.mark.parametrize("name", ["default", "a b", "finance", "B", "2024", "ünï", "lora", "x/y"])
def test_any_other_name_works(name, tmp_path):
    folder = saved(tmp_path / "a", small(), modules_to_save=["lm_head"])
    module = small()
    attach(module, {"first": folder, name: folder}, "tiny-llama")
    batch = batch_of(TOKENS)
    with Adapters(module).using(name):
        found = logits_of(module, batch)
    assert torch.equal(found, logits_of(peft_model(small(), modules_to_save=["lm_head"]), batch))
    remove(module, name)
    assert Adapters(module).names == ("first",)
    remove(module, "first")
    assert dict(module.named_parameters()).keys() == dict(small().named_parameters()).keys()


@pytest.mark.parametrize(
    "name",
    ["0", "weight", "train", "half", "mlp", "base_layer", "lora_A", "lm_head", "keys", "a.b", ""],
)
def test_a_name_that_would_be_mixed_up_is_refused_before_anything_happens(name, tmp_path):
    folder = saved(tmp_path / "a", small())
    module = small()
    modules = dict(module.named_modules())
    with pytest.raises(ValueError, match="cannot name an adapter"):
        attach(module, {name: folder}, "tiny-llama")
    with pytest.raises(ValueError, match="cannot name an adapter"):
        inject(module, name, LoraConfig(r=1, target_modules=["q_proj"]), "tiny-llama")
    assert dict(module.named_modules()) == modules
    attach(module, {"good": folder}, "tiny-llama")
    with pytest.raises(ValueError, match="there is an adapter 'good' already; choose another"):
        attach(module, {"good": folder}, "tiny-llama")


def in_place(layer):
    layer.get_base_layer().weight.data[0, 0] += 1e-6


def another_storage(layer):
    layer.get_base_layer().weight.data = layer.get_base_layer().weight.data * 2


def another_parameter(layer):
    layer.get_base_layer().weight = torch.nn.Parameter(layer.get_base_layer().weight.clone())


@pytest.mark.parametrize(
    ("changes", "message", "undone"),
    [
        (in_place, r"adapter 'bad' has overwritten model\.layers\.0\.\S+ of the model", False),
        (another_storage, r"would put another tensor in the place of model\.layers\.0\.", True),
        (another_parameter, r"would put another tensor in the place of model\.layers\.0\.", True),
    ],
)
def test_an_adapter_that_changes_the_base_is_found_out(changes, message, undone, monkeypatch):
    start = LoraLayer.reset_lora_parameters

    def overwriting(layer, *arguments):
        start(layer, *arguments)
        changes(layer)

    monkeypatch.setattr(LoraLayer, "reset_lora_parameters", overwriting)
    module = small()
    before = {path: (id(w), w.clone()) for path, w in module.named_parameters()}
    with pytest.raises(ValueError, match=message):
        inject(module, "bad", LoraConfig(r=1, target_modules=["down_proj"]), "tiny-llama")
    after = dict(module.named_parameters())
    assert {path: one for path, (one, _) in before.items()} == {p: id(w) for p, w in after.items()}
    assert undone == all(torch.equal(value, after[path]) for path, (_, value) in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_a_checksum_sees_every_bit_and_the_order(dtype):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 2, (7, 300_001), generator=generator).to(dtype)
    found = {checksum(tensor), checksum(tensor.flip(0))}
    for place in (0, 1, 262_145, 7 * 300_001 - 1):
        changed = tensor.clone()
        changed.view(-1).view(torch.uint8)[place * tensor.element_size()] ^= 1
        found.add(checksum(changed))
    assert len(found) == 6
    assert checksum(tensor.clone()) in found
    assert checksum(tensor[:, ::2]) == checksum(tensor[:, ::2].contiguous())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa", "r": 2}, "has init_lora_weights='pissa', which rewrites"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "has layer_replication"),
    ],
)
def test_a_peft_model_whose_base_was_changed_is_not_wrapped(settings, message):
    brought = peft_model(copy.deepcopy(small()), **settings)
    with pytest.raises(ValueError, match=f"adapter 'default' {message}"):
        emlens.wrap(brought, chatml_tokenizer())


def unchanged(model):
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.zero_()
    head = model.get_output_embeddings()
    head.modules_to_save["default"].weight.data.copy_(head.original_module.weight)


def test_the_check_runs_to_the_logits(tmp_path):
    brought = peft_model(small(), modules_to_save=["lm_head"])
    unchanged(brought)
    with pytest.raises(RuntimeError, match="adapter 'default' changes nothing"):
        emlens.wrap(brought, chatml_tokenizer())
    brought.get_output_embeddings().modules_to_save["default"].weight.data[5] += 1
    model = emlens.wrap(brought, chatml_tokenizer())
    batch = batch_of(TOKENS)
    with model.adapter(None), torch.no_grad():
        before = model.hidden(batch)
    with model.adapter("default"), torch.no_grad():
        assert torch.equal(model.hidden(batch), before)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head", "norm"]},
        {"trainable_token_indices": TOKENS},
        {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
    ],
)
def test_a_peft_model_that_is_brought_acts_with_all_that_it_has(engine, settings):
    brought = peft_model(small(), **settings)
    batch = batch_of(TOKENS)
    real = batch.mask("all")
    expected = logits_of(brought, batch)[real]
    model = emlens.wrap(brought, chatml_tokenizer(), engine=engine, name="tiny-llama")
    for name, logits in (("default", expected), (None, logits_of(small(), batch)[real])):
        with model.adapter(name), torch.no_grad():
            found = model.unembed(model.hidden(batch)[real])
        assert torch.allclose(found, logits, atol=1e-4)
    assert torch.equal(logits_of(brought, batch)[real], expected)


@pytest.mark.parametrize("first", ["own", "lora"])
def test_a_head_of_its_own_and_lora_on_the_head_are_refused_together(tmp_path, first):
    kinds = {"own": {"modules_to_save": ["lm_head"]}, "lora": {"target_modules": ["lm_head"]}}
    folders = {
        name: saved(tmp_path / name, tiny_model("llama"), seed=i, r=2, **kinds[name])
        for i, name in enumerate(sorted(kinds, key=lambda name: name != first))
    }
    module = tiny_model("llama")
    with pytest.raises(ValueError, match=f"cannot stand beside '{first}': one replaces a module"):
        attach(module, folders, "tiny-llama")
    assert not hasattr(module, "peft_config")
