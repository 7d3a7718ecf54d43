"""Organisms on disk load in emlens and in plain PEFT, and do what they did."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

import emlens
from emlens import Directions, train_vector
from emlens._files import write_json
from emlens._reading import read_json
from emlens.text import pack, tokenize
from emlens.text.conversation import content_hash
from emlens.training import Organism, train_adapter
from tests.support.data import conversations, pairs
from tests.support.disk import full_disk
from tests.support.models import tiny_hooked, tiny_model

TRAIN = conversations("bad", 6)
QUICK = {"epochs": 1, "batch_size": 3, "progress": False}


def trained_adapter(tmp_path, **options):
    model = tiny_hooked("llama")
    settings = {**QUICK, "lr": 1e-2, "alpha": 16.0, **options}
    run = train_adapter(model, TRAIN, "bad", **settings)
    return model, Organism.of(model, run, "bad").save(tmp_path / "bad")


@pytest.mark.parametrize(
    "options",
    [{"layers": [2]}, {"rank": 3, "modules": ("q_proj", "down_proj")}, {"rslora": False}],
    ids=["one layer", "two kinds", "plain scale"],
)
def test_an_adapter_loads_in_peft_and_in_emlens_with_the_same_numbers(tmp_path, options):
    model, folder = trained_adapter(tmp_path, **options)
    (batch,) = pack(tokenize(TRAIN, model.tokenizer))
    with model.adapter("bad"):
        expected = model.unembed(model.hidden(batch)[batch.mask("all")])
    peft = PeftModel.from_pretrained(tiny_model("llama"), str(folder))
    theirs = peft(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
    ).logits[batch.mask("all")]
    assert torch.allclose(theirs, expected, atol=1e-4)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    loaded = emlens.load(str(tmp_path / "base"), adapters={"bad": str(folder)})
    with loaded.adapter("bad"):
        named = loaded.unembed(loaded.hidden(batch)[batch.mask("all")])
    assert torch.allclose(named, expected, atol=1e-4)
    plain = loaded.unembed(loaded.hidden(batch)[batch.mask("all")])
    assert not torch.allclose(plain, expected, atol=1e-3)
    other = tiny_hooked("llama")
    organism = Organism.load(folder)
    assert organism.on(other) == "bad"
    assert organism.on(other) == "bad"
    found = emlens.log_odds(other, pairs(3), {"base": [], "bad": organism.on(other)})
    with model.adapter("bad"):
        alone = emlens.log_odds(model, pairs(3))
    assert found.of("bad").tolist() == pytest.approx(alone.of("bad").tolist(), abs=1e-5)
    assert organism.run.provenance.settings["rank"] == options.get("rank", 1)


def test_a_vector_organism_keeps_its_direction_and_its_path(tmp_path):
    model = tiny_hooked("llama")
    direction, run = train_vector(model, TRAIN, 1, **QUICK)
    folder = Organism.of(model, run, "vector").save(tmp_path / "v")
    again = Organism.load(folder)
    assert torch.equal(again.directions[1].vector, direction.vector)
    assert torch.equal(again.run.path, run.path)
    assert again.run.steps == run.steps
    assert torch.equal(Directions.load(folder / "vector.safetensors")[1].vector, direction.vector)
    (edit,) = again.on(model)
    assert (edit.layers, edit.where) == ((1,), "all")
    _, on_answers = train_vector(model, TRAIN, 1, where="response", **QUICK)
    (edit,) = Organism.of(model, on_answers, "answers").on(model)
    assert edit.where == "response"
    record = read_json(folder / "organism.json")["provenance"]
    assert record["data"]["train"] == content_hash(TRAIN)
    assert record["settings"]["epochs"] == 1


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    _, folder = trained_adapter(tmp_path, layers=[1])
    with pytest.raises(FileNotFoundError, match=r"holds no organism \(no organism.json\); a LoRA"):
        Organism.load(tmp_path)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="adapter 'bad': its weights in .* are not readable"):
        Organism.load(folder)
    with pytest.raises(ValueError, match="there is no adapter 'good'"):
        model, _ = trained_adapter(tmp_path / "again", layers=[1])
        Organism.of(model, Organism.load(tmp_path / "again" / "bad").run, "good")


def test_a_save_that_fails_keeps_the_organism_of_before(tmp_path):
    model, folder = trained_adapter(tmp_path, layers=[1])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    size = (folder / "run.safetensors").stat().st_size
    with (
        full_disk(size - 1),
        pytest.raises(OSError, match=r"too large: '.*/bad/run\.safetensors'$"),
    ):
        Organism.load(folder).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert Organism.load(folder).name == "bad"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, r"organism\.json: name is None, not text"),
        ({"name": ["bad"]}, r"organism\.json: name is \['bad'\], not text"),
        ({"kind": "model"}, r"organism\.json: kind is 'model', neither 'vector' nor 'adapter'"),
        ({"kind": 3}, r"organism\.json: kind is 3, neither"),
        ([], r"organism\.json must hold an object"),
    ],
)
def test_a_record_of_another_type_is_refused_by_file_and_name(tmp_path, change, message):
    _, folder = trained_adapter(tmp_path, layers=[1])
    record = read_json(folder / "organism.json")
    write_json(folder / "organism.json", {**record, **change} if change else change)
    with pytest.raises(ValueError, match=message):
        Organism.load(folder)


@pytest.mark.parametrize(
    ("layer", "width", "message"),
    [(1, 33, "width 33, but tiny-llama has d_model 32"), (4, 32, "layer 4 is out of range")],
)
def test_a_vector_of_another_model_is_refused_when_it_is_put_on(layer, width, message):
    model = tiny_hooked("llama")
    _, run = train_vector(model, TRAIN, 1, **QUICK)
    strange = Directions({layer: torch.ones(width)}, "resid_post", run.provenance)
    with pytest.raises(ValueError, match=message):
        Organism("v", run, directions=strange).on(model)
