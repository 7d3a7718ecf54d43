"""A kind that is added to a registry in one place works wherever kinds are named."""

from __future__ import annotations

import sys

import pytest
import torch

from emlens import Ablate, influence
from emlens._registry import CONSTRUCTIONS, CONTROLS, EDITS, FORMATS, JUDGES
from emlens.cli.common import Call
from emlens.cli.judges import JudgeChoice
from emlens.directions import Direction, extract_all, read_directions, write_directions
from emlens.directions.fitted import MEAN_DIFF, Construction
from emlens.directions.formats.format import Format
from emlens.edits.edits import edit_from_dict
from emlens.evals.inspect.config import ModelConfig
from emlens.measures.controls import Asked, Control
from tests.support.data import conversations
from tests.support.models import tiny_hooked
from tests.support.profiles import corpus
from tests.support.solutions import direction

GOOD, BAD = conversations("good", 4), conversations("bad", 4)


@pytest.fixture(scope="module")
def model():
    return tiny_hooked("llama")


@pytest.mark.parametrize("registry", [CONSTRUCTIONS, CONTROLS, EDITS, FORMATS, JUDGES])
def test_every_kind_can_be_imported_and_an_unknown_one_is_told_of_all(registry):
    assert all(registry[name] is registry[name] for name in registry)
    with pytest.raises(ValueError, match="unknown .* 'melt'; choose '.*' or '.*'") as error:
        registry["melt"]
    assert str(registry) in str(error.value)


def test_a_new_construction_is_built_from_the_shared_pass(model, monkeypatch):
    turned = Construction(lambda *given: MEAN_DIFF.build(*given) * -1)
    monkeypatch.setitem(CONSTRUCTIONS._places, "turned", turned)
    found = extract_all(model, BAD, GOOD, constructions=["mean-diff", "turned"], layers=[1])
    assert torch.equal(found["turned"][1].vector, -found["mean-diff"][1].vector)
    with pytest.raises(ValueError, match="or 'turned'"):
        extract_all(model, BAD, GOOD, constructions=["bent"])


def test_a_new_format_is_written_by_its_suffix_found_in_a_folder_and_recognised(
    tmp_path, monkeypatch
):
    def write(directions, path, _):
        path.write_text("plain" + " ".join(map(str, directions[1].vector.tolist())))
        return path

    def read(path):
        vector = [float(word) for word in path.read_text().removeprefix("plain").split()]
        return Direction.of(torch.tensor(vector), 1)

    plain = Format("plain text", read, lambda _, head: head[:5] == b"plain", ".vec", write)
    monkeypatch.setitem(FORMATS._places, "plain", plain)
    one = Direction.of(torch.tensor([3.0, 4.0]), 1)
    path = write_directions(one, tmp_path / "one.vec")
    for source in (path, tmp_path):
        assert torch.equal(read_directions(source)[1].vector, one.vector)
    assert write_directions(one, tmp_path / "two", "plain").suffix == ".vec"
    (tmp_path / "x.npy").write_bytes(b"numbers and so on")
    with pytest.raises(ValueError, match="It reads .*, plain text"):
        read_directions(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"the formats to write are .*plain \(\.vec\)"):
        write_directions(one, tmp_path / "one.npy")


class Mute(Ablate):
    """An edit of a name of its own."""

    NAME = "mute"


def test_a_new_edit_is_read_from_a_record_and_named_in_a_file_of_a_model(
    tmp_path, model, monkeypatch
):
    monkeypatch.setitem(EDITS._places, "mute", Mute)
    again = edit_from_dict(Mute(direction(model)).to_dict())
    assert type(again) is Mute
    direction(model).save(tmp_path / "v.safetensors")
    path = tmp_path / "model.yaml"
    path.write_text("model: tiny\nedits:\n  - mute: v.safetensors\n")
    (edit,) = [ModelConfig.read(path)._edit(one, model) for one in ModelConfig.read(path).edits]
    assert type(edit) is Mute
    path.write_text("model: tiny\nedits:\n  - melt: v.safetensors\n")
    with pytest.raises(ValueError, match="must have one of add, ablate, clamp, mute"):
        ModelConfig.read(path)


def test_a_new_kind_of_controls_is_measured(model, monkeypatch):
    def turned(asked: Asked) -> list[Direction]:
        return [asked.like * -1] * asked.n

    monkeypatch.setitem(CONTROLS._places, "turned round", Control(turned))
    given = {"v": direction(model)}
    found = influence(model, corpus(4), given, doses=[0.2], controls={"turned round": 1})
    round_about = influence(model, corpus(4), given, doses=[-0.2], controls=0)
    assert found.groups == {"turned round": ("turned 0",)}
    assert found.divergence("turned 0", 0.2).estimate == pytest.approx(
        round_about.divergence("v", -0.2).estimate, rel=1e-5
    )


def test_a_new_judge_is_chosen_by_its_name_on_the_command_line(model, monkeypatch):
    monkeypatch.setitem(JUDGES._places, "echo", lambda one, **asked: lambda grader: (one, grader))
    call = Call("judge", "emlens judge", {}, sys.stdout)
    chosen = JudgeChoice("echo").ready(call, ["medical"])(model)
    assert chosen == (JudgeChoice("echo"), model)
    with pytest.raises(ValueError, match="unknown judge 'melt'; choose probe, local, echo"):
        JudgeChoice("melt").ready(call, ["medical"])
