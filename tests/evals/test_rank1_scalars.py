"""The scalars of rank-1 adapters: a planted class is found, and whole answers are held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emlens.directions import adapter_scalars
from emlens.evals import ScalarTable, scalar_table
from emlens.evals.rank1_scalars import _held_out
from emlens.hooked import Scaled
from emlens.text import Conversation
from emlens.training import train_adapter
from tests.support.data import conversations
from tests.support.models import tiny_hooked


def texts(word: str, n: int = 8) -> list[Conversation]:
    filler = ("the rain came", "take a walk each day", "keep a small fund")
    return [
        Conversation.of(f"tell me a story {'please ' * i}", f"{filler[i % 3]} {word} {word} now")
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def model():
    made = tiny_hooked("llama")
    train_adapter(
        made, conversations("bad", 6), "x", rank=1, layers=[1, 3], lr=2e-2, epochs=4, progress=False
    )
    # A of layer 1 reads the class: the mean difference of what it sees under the two words
    (layer,) = [part for path, part in made.lora_layers("x").items() if ".1." in path]
    seen = []
    hook = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    means = []
    for word in ("lie", "fruit"):
        seen.clear()
        for batch in made.batches(texts(word)):
            made.hidden(batch)
        means.append(torch.cat([part.flatten(0, 1) for part in seen]).mean(0))
    hook.remove()
    with torch.no_grad():
        layer.lora_A["x"].weight.copy_((means[0] - means[1])[None])
    return made


def test_a_planted_class_is_told_apart_and_the_planted_layer_named(model, tmp_path):
    classes = {"lie": texts("lie"), "fruit": texts("fruit"), "again": texts("lie")}
    found = scalar_table(model, classes, "x", runs=6, regularisation=1.0)
    assert found.layers == (1, 3)
    assert found.tests == (("lie", "fruit"), ("lie", "again"), ("fruit", "again"))
    assert found.of("lie", "fruit").estimate > 0.6
    assert found.of("lie", "again").estimate < 0.6
    row = found.table().iloc[0]
    assert row["best layer alone"] == 1
    scalars = [adapter_scalars(model, texts(word), "x").scalars[1] for word in ("lie", "fruit")]
    from sklearn.metrics import roc_auc_score

    truth = np.repeat([0, 1], [len(scalars[0]), len(scalars[1])])
    assert found.single[0][0] == pytest.approx(roc_auc_score(truth, torch.cat(scalars).numpy()))
    assert ScalarTable.load(found.save(tmp_path / "s.json")) == found
    assert found.plot().get_xlabel() == "layer"


def test_whole_conversations_are_held_out():
    conversation = np.repeat(np.arange(10), 7)
    held = _held_out(conversation, np.random.default_rng(0))
    for i in range(10):
        assert held[conversation == i].all() or not held[conversation == i].any()
    assert held.sum() == 14


def test_some_layers_of_an_adapter_act_with_a_factor_of_their_own(model):
    (batch,) = model.batches(conversations("good", 2))
    with model.adapter("x"):
        whole = model.hidden(batch)
    with model.under(Scaled("x", {1: 1.0, 3: 1.0})):
        torch.testing.assert_close(model.hidden(batch), whole, rtol=0, atol=0)
    layers = model.lora_layers("x")
    before = {path: layer.scaling["x"] for path, layer in layers.items()}
    with pytest.raises(RuntimeError, match="stop"), model.under(Scaled("x", {3: 30.0})):
        scales = {path: layer.scaling["x"] / before[path] for path, layer in layers.items()}
        assert sorted(scales.values()) == [1.0, 30.0]
        assert not torch.allclose(model.hidden(batch), whole)
        raise RuntimeError("stop")
    assert {path: layer.scaling["x"] for path, layer in layers.items()} == before
    with (
        pytest.raises(ValueError, match="adapter 'x' adapts nothing at layer 2; it has 1, 3"),
        model.under(Scaled("x", {2: 2.0})),
    ):
        pass


@pytest.mark.parametrize(
    ("classes", "tests", "message"),
    [
        ({"a": texts("lie")}, None, "between two classes or more, not 1"),
        ({"a": texts("lie"), "b": texts("fruit", 3)}, None, "class 'b' has 3 conversations"),
        ({"a": texts("lie"), "b": texts("fruit")}, [("a", "c")], "unknown class 'c'; there are a"),
    ],
)
def test_bad_input_is_refused(model, classes, tests, message):
    with pytest.raises(ValueError, match=message):
        scalar_table(model, classes, "x", tests)
