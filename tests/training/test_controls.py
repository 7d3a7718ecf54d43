"""Random adapters, against the products of their matrices written out."""

from __future__ import annotations

import pytest
import torch

from emlens import log_odds
from emlens.training import random_adapter
from tests.support.data import pairs
from tests.support.solutions import with_adapters


@pytest.fixture
def model(tmp_path):
    return with_adapters(tmp_path)


def product(layer, name):
    a, b = (getattr(layer, f"lora_{part}")[name].weight.detach() for part in "AB")
    return layer.scaling[name] * b @ a


@pytest.mark.parametrize("like", ["one", "many"])
def test_a_random_adapter_has_the_a_and_the_norm_of_the_other_in_every_module(model, like):
    assert random_adapter(model, like, seed=3) == "random"
    layers, chance = model.lora_layers(like), model.lora_layers("random")
    assert layers.keys() == chance.keys()
    for path, layer in layers.items():
        assert torch.equal(layer.lora_A[like].weight, layer.lora_A["random"].weight)
        mine, theirs = product(layer, "random"), product(layer, like)
        assert mine.norm() == pytest.approx(float(theirs.norm()), rel=1e-5)
        cosine = float((mine * theirs).sum() / mine.norm() / theirs.norm())
        assert abs(cosine) < 0.9, path


def test_seeds_differ_and_repeat_and_the_other_adapter_stays(model):
    before = {n: w.clone() for n, w in model.adapter_weights("many").items()}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        random_adapter(model, "many", name, seed)
    assert all(torch.equal(before[n], w) for n, w in model.adapter_weights("many").items())
    a, b, c = (model.adapter_weights(name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a if "lora_B" in key)
    scores = log_odds(model, pairs(3), {"base": None, "many": "many", "a": "a", "b": "b"})
    assert (scores.of("a") == scores.of("b")).all()
    assert (scores.of("a") != scores.of("many")).all()
    with pytest.raises(ValueError, match="'a'"):
        random_adapter(model, "many", "a")
    with pytest.raises(ValueError, match="there is no adapter 'few'"):
        random_adapter(model, "few")
