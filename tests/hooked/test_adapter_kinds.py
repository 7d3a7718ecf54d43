"""Every kind of adapter gives PEFT's own logits, or is refused by name; the base stays itself."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict

import emlens
from emlens.hooked.adapters import Adapters
from emlens.hooked.attach import attach, inject, remove
from emlens.hooked.load import ENGINES
from tests.support.adapters import CASES, TOKENS, batch_of, logits_of, peft_logits, saved
from tests.support.models import tiny_model
from tests.support.tokenizers import chatml_tokenizer

EACH = pytest.mark.parametrize(
    ("kind", "settings", "tied"), CASES, ids=[f"{kind}-{tied}" for kind, _, tied in CASES]
)


def small(tied=False):
    return tiny_model("llama", n_layers=2, tied=tied)


def content(module):
    """Every tensor by its path, with its object, its place and a copy of its values."""
    tensors = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    return {path: (id(t), t.data_ptr(), t.detach().clone()) for path, t in tensors}


def same(before, after):
    return list(before) == list(after) and all(
        (one, place) == (other, there) and torch.equal(value, now)
        for (one, place, value), (other, there, now) in zip(
            before.values(), after.values(), strict=True
        )
    )


@pytest.mark.parametrize("engine", ENGINES)
@EACH
def test_an_adapter_of_each_kind_gives_the_logits_of_plain_peft(
    engine, kind, settings, tied, tmp_path
):
    folder = saved(tmp_path / "a", small(tied), **settings)
    module = small(tied)
    attach(module, {"bad": folder}, "tiny-llama")
    model = emlens.wrap(module, chatml_tokenizer(), engine=engine, name="tiny-llama")
    batch = batch_of(TOKENS)
    real = batch.mask("all")
    theirs = PeftModel.from_pretrained(small(tied), str(folder)).eval()
    plain = logits_of(small(tied), batch)[real]
    with model.adapter("bad"), torch.no_grad():
        found = model.unembed(model.hidden(batch)[real])
    assert torch.allclose(found, logits_of(theirs, batch)[real], atol=2e-4)
    assert (found - plain).abs().max() > 0.1
    with torch.no_grad():
        assert torch.allclose(model.unembed(model.hidden(batch)[real]), plain, atol=2e-5)
    own = model._adapters.parameters("bad")
    reference = get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert own.keys() == {key.removeprefix("base_model.model.") for key in reference}
    for key, tensor in reference.items():
        assert torch.equal(own[key.removeprefix("base_model.model.")], tensor)
    model.remove_adapter("bad")
    assert model.adapters == ()
    with torch.no_grad():
        assert torch.allclose(model.unembed(model.hidden(batch)[real]), plain, atol=2e-5)


@EACH
def test_a_removed_adapter_leaves_the_base_as_it_was(kind, settings, tied, tmp_path):
    folder = saved(tmp_path / "a", small(tied), **settings)
    module = small(tied)
    flags = {path: weight.requires_grad for path, weight in module.named_parameters()}
    before, modules = content(module), dict(module.named_modules(remove_duplicate=False))
    batch = batch_of(TOKENS)
    found = []
    for name in ("bad", "good", "bad"):
        attach(module, {name: folder}, "tiny-llama")
        with Adapters(module).using(name):
            found.append(logits_of(module, batch))
        remove(module, name)
        assert same(before, content(module))
        after = dict(module.named_modules(remove_duplicate=False))
        assert list(after) == list(modules)
        assert all(after[path] is part for path, part in modules.items())
        assert flags == {path: weight.requires_grad for path, weight in module.named_parameters()}
        assert not hasattr(module, "peft_config")
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


REFUSED = {
    "PiSSA": (
        {"init_lora_weights": "pissa", "r": 2},
        "adapter 'bad' has init_lora_weights='pissa', which rewrites the weights of the base that "
        "all conditions share; convert it to plain LoRA with PEFT's save_pretrained",
    ),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_4", "r": 2}, "'pissa_niter_4', which rewr"),
    "OLoRA": ({"init_lora_weights": "olora", "r": 2}, "'olora', which rewrites the weights"),
    "repeated layers": (
        {"layer_replication": [[0, 2], [1, 2]]},
        "adapter 'bad' has layer_replication, which emlens does not run: it repeats blocks of the "
        r"base; merge it into a model of its own with PEFT's merge_and_unload\(\)",
    ),
    "aLoRA": (
        {"alora_invocation_tokens": TOKENS, "task_type": "CAUSAL_LM"},
        "has alora_invocation_tokens, which emlens does not run: it acts only after certain tokens",
    ),
    "a block of its own": (
        {"modules_to_save": ["layers.1"], "target_modules": ["lm_head"]},
        r"replaces model.layers.1 as a whole \(modules_to_save\), which holds decoder blocks",
    ),
    "a body of its own": (
        {"modules_to_save": ["model"], "target_modules": ["lm_head"]},
        r"replaces model as a whole \(modules_to_save\), which holds decoder blocks",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_emlens_cannot_run_is_refused_and_the_base_untouched(kind, tmp_path):
    settings, message = REFUSED[kind]
    bad = saved(tmp_path / "bad", small(), **settings)
    good = saved(tmp_path / "good", small())
    module = small()
    before, modules = content(module), dict(module.named_modules())
    with pytest.raises(ValueError, match=message):
        attach(module, {"good": good, "bad": bad}, "tiny-llama")
    assert same(before, content(module))
    assert list(dict(module.named_modules()).items()) == list(modules.items())
    assert not hasattr(module, "peft_config")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("kasa_config", {"beta": 1e-4}),
        ("arrow_config", {"top_k": 2}),
        ("monteclora_config", {"num_samples": 2}),
        ("velora_config", {}),
        ("use_qalora", True),
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"]}),
        ("megatron_config", {"a": 1}),
    ],
)
def test_other_variants_of_lora_are_refused_by_name(option, value):
    config = LoraConfig(r=1, target_modules=["q_proj"], **{option: value})
    with pytest.raises(ValueError, match=f"adapter 'bad' has {option}"):
        inject(small(), "bad", config, "tiny-llama")


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq", "eva", "something new"])
def test_starts_that_change_the_base_or_need_data_are_refused(start):
    config = LoraConfig(r=1, target_modules=["q_proj"])
    config.init_lora_weights = start
    with pytest.raises(ValueError, match=f"adapter 'bad' has init_lora_weights='{start}'"):
        inject(small(), "bad", config, "tiny-llama")


@pytest.mark.parametrize(("family", "bias"), [("qwen2", "all"), ("gpt2", "lora_only")])
def test_biases_of_the_base_are_not_replaced(family, bias, tmp_path):
    targets = ["v_proj"] if family == "qwen2" else ["c_attn"]
    folder = saved(tmp_path / "a", tiny_model(family), bias=bias, target_modules=targets)
    module = tiny_model(family)
    before = content(module)
    with pytest.raises(ValueError, match=f"has bias='{bias}', which replaces biases of the base"):
        attach(module, {"bad": folder}, "tiny")
    assert same(before, content(module))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lora_alpha", 0, "adapter 'bad' has lora_alpha 0; it has to be a finite number other"),
        ("lora_alpha", float("inf"), "has lora_alpha inf"),
        ("lora_alpha", float("nan"), "has lora_alpha nan"),
        ("lora_alpha", "8", "has lora_alpha '8'"),
        ("alpha_pattern", {"layers.1.mlp.down_proj": 0.0}, r"has lora_alpha 0\.0"),
        ("r", 0, "adapter 'bad' has rank 0; a rank is a whole number from 1"),
        ("r", 2.5, r"has rank 2\.5"),
        ("r", 33, r"has rank 33 at model\.layers\.0\.mlp\.down_proj, which maps 64 dim.* to 32"),
        ("r", 10**9, r"has rank 1000000000 at model\.layers\.0\.mlp\.down_proj"),
        ("rank_pattern", {"layers.1.mlp.down_proj": 10**9}, r"at model\.layers\.1\.mlp\.down_proj"),
        ("rank_pattern", {"nothing": 10**9}, "1000000000; no module of the model allows more than"),
    ],
)
def test_senseless_numbers_are_refused_before_anything_is_allocated(
    field, value, message, monkeypatch
):
    def built(*_, **__):
        raise AssertionError("something was built")

    monkeypatch.setattr("emlens.hooked.attach.inject_adapter_in_model", built)
    config = LoraConfig(r=1, target_modules=["down_proj"])
    setattr(config, field, value)
    module = small()
    with pytest.raises(ValueError, match=message):
        inject(module, "bad", config, "tiny-llama")
    config.target_modules = "all-linear"
    if field == "r":
        with pytest.raises(ValueError, match="adapter 'bad' has rank"):
            inject(module, "bad", LoraConfig(r=10**9, target_modules="all-linear"), "tiny-llama")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_adapted_as_in_peft(engine, family, tmp_path):
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = {"target_modules": [], "target_parameters": targets, "r": 2}
    folder = saved(tmp_path / "a", tiny_model(family), **settings)
    module = tiny_model(family)
    before = content(module)
    attach(module, {"bad": folder}, "tiny")
    model = emlens.wrap(module, chatml_tokenizer(), engine=engine, name="tiny")
    batch = batch_of(TOKENS)
    real = batch.mask("all")
    with model.adapter("bad"), torch.no_grad():
        found = model.unembed(model.hidden(batch)[real])
    assert torch.allclose(found, peft_logits(tiny_model(family), folder, batch)[real], atol=1e-4)
    with torch.no_grad():
        plain = model.unembed(model.hidden(batch)[real])
    assert torch.allclose(plain, logits_of(tiny_model(family), batch)[real], atol=1e-4)
    remove(module, "bad")
    after = content(module)
    assert same(before, {path: after[path] for path in before})
