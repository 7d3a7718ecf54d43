"""An organism of any kind of adapter loads in PEFT and in emlens with the logits it had."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

import emlens
from emlens.hooked.attach import attach
from emlens.hooked.load import ENGINES, Engine
from emlens.training import Organism, train_adapter
from tests.support.adapters import CASES, TOKENS, batch_of, logits_of, peft_logits, saved
from tests.support.data import conversations
from tests.support.models import tiny_hooked, tiny_model
from tests.support.tokenizers import chatml_tokenizer


def small(tied):
    return tiny_model("llama", n_layers=2, tied=tied)


def hooked(module, engine: Engine = "nnsight"):
    return emlens.wrap(module, chatml_tokenizer(), engine=engine, name="tiny-llama")


@pytest.fixture(scope="module")
def run():
    """The record of some training of an adapter."""
    model = tiny_hooked("llama", n_layers=1)
    return train_adapter(model, conversations("bad", 3), "some", epochs=1, progress=False)


@pytest.mark.parametrize(
    ("kind", "settings", "tied"), CASES, ids=[f"{kind}-{tied}" for kind, _, tied in CASES]
)
def test_it_is_saved_whole_and_loads_everywhere(kind, settings, tied, run, tmp_path):
    theirs = saved(tmp_path / "peft", small(tied), **settings)
    batch = batch_of(TOKENS)
    real = batch.mask("all")
    expected = peft_logits(small(tied), theirs, batch)[real]
    module = small(tied)
    attach(module, {"bad": theirs}, "tiny-llama")
    organism = Organism.of(hooked(module), run, "bad")
    folder = organism.save(tmp_path / "organism")
    assert torch.equal(peft_logits(small(tied), folder, batch)[real], expected)
    reference = get_peft_model_state_dict(
        PeftModel.from_pretrained(small(tied), str(theirs)), save_embedding_layers=False
    )
    kept = load_file(folder / "adapter_model.safetensors")
    assert kept.keys() == reference.keys()
    assert all(torch.equal(kept[key], tensor) for key, tensor in reference.items())
    again = small(tied)
    attach(again, {"other": folder}, "tiny-llama")
    on = hooked(small(tied))
    assert Organism.load(folder).on(on) == "bad"
    for model, name in ((hooked(again), "other"), (on, "bad")):
        with model.adapter(name), torch.no_grad():
            found = model.unembed(model.hidden(batch)[real])
        assert torch.allclose(found, expected, atol=1e-4)
    with torch.no_grad():
        plain = on.unembed(on.hidden(batch)[real])
    assert torch.allclose(plain, logits_of(small(tied), batch)[real], atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_taken_from_either_engine(engine, run, tmp_path):
    settings = {"use_dora": True, "r": 2, "modules_to_save": ["lm_head", "norm"]}
    theirs = saved(tmp_path / "peft", small(False), **settings)
    module = small(False)
    attach(module, {"bad": theirs}, "tiny-llama")
    folder = Organism.of(hooked(module, engine), run, "bad").save(tmp_path / "organism")
    batch = batch_of(TOKENS)
    found = peft_logits(small(False), folder, batch)
    assert torch.equal(found, peft_logits(small(False), theirs, batch))


def test_emlens_load_takes_its_folder(run, tmp_path):
    theirs = saved(tmp_path / "peft", small(False), modules_to_save=["lm_head"])
    small(False).save_pretrained(tmp_path / "tiny-llama")
    chatml_tokenizer().save_pretrained(tmp_path / "tiny-llama")
    model = emlens.load(tmp_path / "tiny-llama", adapters={"bad": theirs})
    folder = Organism.of(model, run, "bad").save(tmp_path / "organism")
    model = emlens.load(tmp_path / "tiny-llama", adapters={"again": folder})
    batch = batch_of(TOKENS)
    with model.adapter("again"), torch.no_grad():
        found = model.unembed(model.hidden(batch)[batch.mask("all")])
    expected = peft_logits(small(False), theirs, batch)[batch.mask("all")]
    assert torch.allclose(found, expected, atol=1e-4)


def test_what_the_model_does_later_does_not_change_it(run, tmp_path):
    theirs = saved(tmp_path / "peft", small(False))
    module = small(False)
    attach(module, {"bad": theirs}, "tiny-llama")
    model = hooked(module)
    organism = Organism.of(model, run, "bad")
    assert organism.on(model) == "bad"
    with torch.no_grad():
        for tensor in model._adapters.parameters("bad").values():
            tensor.mul_(2)
    other = "the model has another adapter called 'bad'; remove it with"
    with pytest.raises(ValueError, match=other):
        organism.on(model)
    model.remove_adapter("bad")
    assert organism.on(model) == "bad"
    batch = batch_of(TOKENS)
    with model.adapter("bad"), torch.no_grad():
        found = model.unembed(model.hidden(batch)[batch.mask("all")])
    expected = peft_logits(small(False), theirs, batch)[batch.mask("all")]
    assert torch.allclose(found, expected, atol=1e-4)
    configs: Any = model.module.peft_config
    configs["bad"].lora_alpha = 1
    with pytest.raises(ValueError, match=other):
        organism.on(model)


def test_a_failed_save_keeps_the_organism_that_was_there(run, tmp_path, monkeypatch):
    theirs = saved(tmp_path / "peft", small(False))
    module = small(False)
    attach(module, {"bad": theirs}, "tiny-llama")
    organism = Organism.of(hooked(module), run, "bad")
    folder = organism.save(tmp_path / "organism")
    (folder / "notes.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as broken, pytest.raises(OSError, match="disk full"):
        broken.setattr(LoraConfig, "save_pretrained", _fails)
        organism.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert Organism.load(folder).name == "bad"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        organism.save(folder)
    assert {path.name for path in folder.iterdir()} == before.keys()
    assert not list(tmp_path.glob(".*"))


def _fails(*_, **__):
    raise OSError("disk full")
