"""Noise on the weights: its size, that it is taken back, and the gain it costs."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import FillBetweenPolyCollection

from emlens import Add
from emlens.hooked import response_losses
from emlens.hooked.attach import attach
from emlens.hooked.load import ENGINES
from emlens.hooked.lora_scaling import block_matrices, noisy_weights
from emlens.measures import WeightNoise, weight_noise
from tests.support.adapters import saved
from tests.support.data import conversations
from tests.support.models import tiny_hooked, tiny_model
from tests.support.solutions import direction, with_adapters

DATA = conversations("bad", 4)


@pytest.fixture(scope="module", params=ENGINES)
def both(request, tmp_path_factory):
    """The model with adapters, on each engine."""
    return with_adapters(tmp_path_factory.mktemp("adapters"), request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_adapters(tmp_path_factory.mktemp("adapters"))


def mean_loss(model, edits=()):
    sums, counts = response_losses(model, model.batches(DATA), edits)
    return float(sums.numpy().sum() / counts.numpy().sum())


def test_noise_on_the_weights_has_its_share_and_is_taken_back(both):
    before = {path: w.detach().clone() for path, w in block_matrices(both).items()}
    everything = [weight.detach().clone() for weight in both.module.parameters()]
    with noisy_weights(both, 0.1, seed=2):
        shares = [
            float((w.detach() - before[path]).norm() / before[path].norm())
            for path, w in block_matrices(both).items()
        ]
        changed = sum(
            not torch.equal(old, new)
            for old, new in zip(everything, both.module.parameters(), strict=True)
        )
    assert shares == pytest.approx([0.1] * len(before), rel=1e-4)
    assert changed == len(before) == 7 * both.n_layers
    for old, new in zip(everything, both.module.parameters(), strict=True):
        assert torch.equal(old, new)


def test_weights_are_put_back_also_after_an_error(model):
    before = [weight.detach().clone() for weight in model.module.parameters()]
    with pytest.raises(RuntimeError, match="inside"), noisy_weights(model, 0.5):
        raise RuntimeError("inside")
    for old, new in zip(before, model.module.parameters(), strict=True):
        assert torch.equal(old, new)


def test_weight_noise_is_the_gain_lost_against_the_equally_noisy_base(both):
    x = {"v": -direction(both), "a": "many"}
    found = weight_noise(both, DATA, x, epsilons=(0.0, 0.05), seeds=2)
    base, own = mean_loss(both), mean_loss(both, [Add(x["v"])])
    assert (found.base_loss, found.losses["v"]) == (base, own)
    for place, seed in enumerate((0, 1)):
        with noisy_weights(both, 0.05, seed):
            noisy_base, noisy = mean_loss(both), mean_loss(both, [Add(x["v"])])
            with both.adapter("many"):
                of_adapter = mean_loss(both)
        assert found.base[1][place] == noisy_base
        assert found.disturbed[0][1][place] == noisy
        assert found.disturbed[1][1][place] == of_adapter
        left = (noisy_base - noisy) / (base - own)
        assert found.lost("v")[1, place] == pytest.approx(100 * (1 - left))
    for name in x:
        assert found.gain(name) > 0
        assert np.allclose(found.lost(name)[0], 0)


def test_weight_noise_survives_being_saved_and_shows_itself(model, tmp_path):
    found = weight_noise(model, DATA, {"a": "many"}, epsilons=(0.1,), seeds=2)
    assert WeightNoise.load(found.save(tmp_path / "noise.json")) == found
    assert "<table" in found._repr_html_()
    assert found.plot().get_ylabel() == "gain lost [%]"
    assert found.difference("a", "a", 0.1).estimate == 0
    assert found.table()["gain lost [%]"][0] == pytest.approx(found.lost("a").mean())


def test_weights_that_are_quantised_or_offloaded_are_refused(tmp_path):
    model = with_adapters(tmp_path)
    block = model.module.get_submodule(model.architecture.blocks)[1]
    block.mlp.up_proj.weight = torch.nn.Parameter(
        block.mlp.up_proj.weight.to(torch.int8), requires_grad=False
    )
    refused = pytest.raises(ValueError, match=r"up_proj.weight of tiny-llama is quantised \(torch")
    with refused, noisy_weights(model, 0.1):
        pass
    block.mlp.up_proj.weight = torch.nn.Parameter(torch.empty(2, 2, device="meta"))
    refused = pytest.raises(ValueError, match=r"up_proj.weight of tiny-llama is offloaded")
    with refused, noisy_weights(model, 0.1):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilons": [-1]}, "epsilons.0. must be at least 0, not -1"),
        ({"epsilons": [float("inf")]}, "must be a finite number"),
        ({"epsilons": []}, "no epsilons were given"),
        ({"seeds": 0}, "seeds must be at least 1, not 0"),
    ],
)
def test_bad_noise_on_the_weights_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        weight_noise(model, DATA, {"x": direction(model)}, **options)
    refused = pytest.raises(ValueError, match="epsilon must be at least 0, not -1")
    with refused, noisy_weights(model, -1.0):
        pass


def test_modules_that_an_adapter_keeps_for_itself_get_no_noise(tmp_path):
    settings = {"modules_to_save": ["mlp"], "target_modules": ["q_proj"], "r": 2}
    folder = saved(tmp_path / "own", tiny_model("llama"), **settings)
    model, plain = tiny_hooked("llama"), tiny_hooked("llama")
    attach(model.module, {"own": folder}, "tiny-llama")
    before = {key: weight.clone() for key, weight in model.adapter_weights("own").items()}
    (batch,) = model.batches(DATA)
    with noisy_weights(model, 0.2, seed=1), noisy_weights(plain, 0.2, seed=1):
        inside = model.adapter_weights("own")
        assert any("mlp" in key for key in inside)
        assert all(torch.equal(inside[key], weight) for key, weight in before.items())
        assert torch.equal(model.hidden(batch), plain.hidden(batch))


def test_differences_of_solutions_are_drawn_with_intervals_paired_by_seed():
    names, levels = ("a", "b", "c"), (0.1, 0.2)
    noise = np.random.default_rng(0).normal(0, 0.02, (2, 3))
    base = 3.0 + noise
    disturbed = np.stack([base - gain for gain in (1.0, 0.8, 0.6)]) + 0.01 * noise
    found = WeightNoise(
        directions=names,
        constructions=dict.fromkeys(names, "given"),
        epsilons=levels,
        seeds=(0, 1, 2),
        base_loss=3.0,
        losses={"a": 1.5, "b": 2.0, "c": 2.2},
        base=base,
        disturbed=disturbed,
    )
    upper, *lower = found.plot()
    assert upper.get_ylabel() == "gain lost [%]"
    for name, panel in zip("bc", lower, strict=True):
        assert panel.get_ylabel() == "difference from a\n[percentage points]"
        gap = [found.difference(name, "a", epsilon) for epsilon in levels]
        drawn = [list(line.get_ydata()) for line in panel.lines]
        assert [one.estimate for one in gap] in drawn
    bands = [
        [one for one in ax.collections if isinstance(one, FillBetweenPolyCollection)]
        for ax in (upper, *lower, found.plot(plt.figure().subplots()))
    ]
    assert [len(each) for each in bands] == [0, 1, 1, 3]
