"""Divergence on conversations, against full passes of the bare model with plain hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emlens import Add
from emlens.measures import divergence
from emlens.text import tokenize
from tests.support.data import conversations
from tests.support.solutions import direction, with_adapters

SETS = {"good": conversations("good", 4), "bad": conversations("bad", 3)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_adapters(tmp_path_factory.mktemp("adapters"))


def logs(model, row):
    with torch.no_grad():
        return model.module(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)


def test_divergence_equals_a_plain_loop_with_hooks(model):
    x = direction(model, layer=1)
    found = divergence(model, SETS, {"x": Add(x), "one": "one"}, token_budget=60)
    everything = [item for items in SETS.values() for item in items]
    sums, counts = np.zeros((2, 7)), np.zeros(7)
    for i, item in enumerate(everything):
        (row,) = tokenize([item], model.template)
        (batch,) = model.batches([item])
        at = batch.targets("response")[0].nonzero()[:, 0] - 1
        with model.under(None):
            base = logs(model, row)
            hook = model.module.model.layers[1].register_forward_hook(
                lambda _m, _i, out: out + x.vector
            )
            steered = logs(model, row)
            hook.remove()
        with model.under("one"):
            adapted = logs(model, row)
        for j, other in enumerate((steered, adapted)):
            sums[j, i] = float((base.exp() * (base - other)).sum(-1)[at].sum())
        counts[i] = len(at)
    assert np.allclose(found.kl, sums, atol=1e-4)
    assert np.array_equal(found.counts, counts)
    assert found.sets == ("good",) * 4 + ("bad",) * 3
    mean = found.mean("x", ["bad"]).estimate
    assert mean == pytest.approx(sums[0, 4:].sum() / counts[4:].sum(), abs=1e-5)
    gap = found.difference("x", "one").estimate
    assert gap == pytest.approx((sums[0] - sums[1]).sum() / counts.sum(), abs=1e-5)
    assert (found.table()["tokens"] == [counts[:4].sum(), counts[4:].sum()] * 2).all()


def test_the_base_is_what_acts_around_the_call(model):
    with model.adapter("one"):
        inside = divergence(model, SETS["bad"], {"same": "one", "base": None})
    outside = divergence(model, SETS["bad"], {"base": None, "one": "one"})
    assert inside.mean("same").estimate == pytest.approx(0, abs=1e-6)
    assert inside.mean("base").estimate > 0
    assert outside.mean("base").estimate == pytest.approx(0, abs=1e-6)
    assert inside.against == "adapter one" and outside.against == "base"


def test_what_has_nothing_to_measure_is_refused(model):
    with pytest.raises(ValueError, match="no conditions were given"):
        divergence(model, SETS, {})
    with pytest.raises(ValueError, match="there are no conversations in 'none'|'none'.* is empty"):
        divergence(model, {"none": []}, {"one": "one"})
    with pytest.raises(ValueError, match="no conversation in 'good' has thinking tokens"):
        divergence(model, SETS, {"one": "one"}, tokens="thinking")
    found = divergence(model, SETS, {"one": "one"})
    with pytest.raises(KeyError, match=r"the sets are \['bad', 'good'\]"):
        found.mean("one", ["ugly"])
    with pytest.raises(KeyError, match="no condition 'two'; there are one"):
        found.mean("two")
