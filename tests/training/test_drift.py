"""Training on: a planted model in which the general solution is the better one, and the record."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

import emlens
from emlens import Add, KLPenalty, train_vector
from emlens.directions import cosine
from emlens.training import Drift, continue_training, drift, train_adapter, train_weights
from tests.support.data import conversations, pairs
from tests.support.models import tiny_hooked

drift_module = importlib.import_module("emlens.training.drift")
TRAIN, ELSEWHERE = conversations("bad", 6), conversations("good", 5)
INSIDE, OUTSIDE = pairs(4, "inside"), pairs(7, "outside")[4:]
QUICK = {"epochs": 3, "batch_size": 3, "lr": 0.1, "warmup": 0, "progress": False}


@pytest.fixture(scope="module")
def solutions():
    model = tiny_hooked("llama")
    general = train_vector(model, TRAIN, 1, **{**QUICK, "epochs": 8})[1]
    narrow = train_vector(model, TRAIN, 1, kl=KLPenalty(ELSEWHERE, weight=20.0), **QUICK)[1]
    return model, general, narrow


def test_a_run_goes_on_from_where_it_ended(solutions):
    model, _, narrow = solutions
    on = continue_training(model, TRAIN, narrow, progress=False)
    assert torch.allclose(on.path[0], narrow.path[-1], atol=1e-6)
    assert on.settings["kl"] is None
    assert on.settings["lr"] == narrow.settings["lr"]
    assert on.settings["alpha"] == narrow.settings["alpha"]
    assert on.steps[-1].loss < narrow.steps[-1].loss


def test_without_the_kl_the_narrow_solution_drifts_to_the_general_one(solutions, tmp_path):
    model, general, narrow = solutions
    on = continue_training(model, TRAIN, narrow, epochs=8, progress=False)
    found = drift(model, INSIDE, OUTSIDE, on, {"general": general, "narrow": narrow}, records=4)
    assert found.steps[0] == 0
    assert found.steps[-1] == len(on.steps)
    assert len(found.steps) == 4
    toward = found.cosines["general"]
    assert toward[-1] > toward[0] + 0.1
    assert found.cosines["narrow"][0] == pytest.approx(1)
    assert found.cosines["narrow"][-1] < 0.95
    end = on.direction()
    assert toward[-1] == pytest.approx(cosine(end.vector, general.direction().vector), abs=1e-5)
    scores = emlens.log_odds(model, INSIDE, {"base": [], "end": [Add(end)]})
    assert found.inside[-1][0] == pytest.approx(scores.change("end").estimate, abs=1e-5)
    assert Drift.load(found.save(tmp_path / "d.json")).table().equals(found.table())
    ax = found.plot()
    assert ax.get_xlabel() == "change of log-odds inside [nats/token]"
    assert ax.get_ylabel() == "change of log-odds outside [nats/token]"
    track = max(ax.lines, key=lambda line: len(line.get_xdata()))
    np.testing.assert_allclose(
        track.get_xydata(), np.stack([found.inside, found.outside])[..., 0].T
    )
    assert found.plot_cosines().get_ylabel() == "cosine similarity"


def test_with_a_kl_the_general_solution_is_held_back(solutions):
    model, general, _ = solutions
    kl = KLPenalty(ELSEWHERE, weight=50.0)
    on = continue_training(model, TRAIN, general, kl=kl, epochs=8, progress=False)
    assert on.steps[-1].kl < 0.6 * on.steps[0].kl


def test_an_adapter_goes_on_and_its_records_are_put_back():
    model = tiny_hooked("llama")
    settings = {**QUICK, "lr": 1e-2, "layers": [1], "alpha": 16.0, "record_every": 1}
    first = train_adapter(model, TRAIN, "x", **settings)
    on = continue_training(model, TRAIN, first, progress=False)
    for name in first.states:
        assert torch.equal(on.states[name][0], first.states[name][-1])
    (layer,) = model.lora_layers("x").values()
    before = layer.lora_B["x"].weight.detach().clone()
    found = drift(model, INSIDE, OUTSIDE, on, {"first": first}, records=2)
    assert torch.equal(layer.lora_B["x"].weight, before)
    assert found.cosines["first"][0] == pytest.approx(1)
    alone = emlens.log_odds(model, INSIDE, {"base": [], "x": "x"}).change("x")
    assert found.inside[-1][0] == pytest.approx(alone.estimate, abs=1e-5)
    model.remove_adapter("x")
    with pytest.raises(ValueError, match="trained adapter 'x', which is not on tiny-llama"):
        continue_training(model, TRAIN, first)


def test_a_way_is_measured_where_the_vector_was_trained_and_against_the_base(solutions):
    model = solutions[0]
    _, run = train_vector(model, TRAIN, 1, where="response", **QUICK)
    found = drift(model, INSIDE, OUTSIDE, run, {"itself": run}, records=2)
    as_trained = [Add(run.direction(), where="response")]
    scores = emlens.log_odds(model, INSIDE, {"base": [], "run": as_trained})
    assert found.inside[-1][0] == pytest.approx(scores.change("run").estimate, abs=1e-6)
    everywhere = emlens.log_odds(model, INSIDE, {"base": [], "run": [Add(run.direction())]})
    assert found.inside[-1][0] != pytest.approx(everywhere.change("run").estimate, abs=1e-4)
    one, other = (
        drift(model, pairs(12), OUTSIDE, run, {"itself": run}, records=2, seed=seed)
        for seed in (0, 5)
    )
    assert other.inside[-1][0] == one.inside[-1][0]
    assert not np.array_equal(other.inside[-1][1:], one.inside[-1][1:])


def test_the_way_of_an_adapter_does_not_depend_on_the_one_that_stands():
    model = tiny_hooked("llama")
    settings = {**QUICK, "lr": 1e-2, "layers": [1], "alpha": 16.0}
    run = train_adapter(model, TRAIN, "x", **settings)
    assert run.path_steps == (0, len(run.steps))
    alone = drift(model, INSIDE, OUTSIDE, run, {}, records=2)
    with model.adapter("x"):
        assert drift(model, INSIDE, OUTSIDE, run, {}, records=2) == alone
    # the path of adapters is large: as often as before, or ten times
    on = continue_training(model, TRAIN, run, progress=False, epochs=15)
    assert on.path_steps == tuple(range(0, 31, 3))
    often = train_adapter(model, TRAIN, "y", **settings, record_every=2)
    assert continue_training(model, TRAIN, often, progress=False).path_steps == often.path_steps


def test_finetuned_weights_have_no_way_to_go_on_from():
    model = tiny_hooked("llama")
    run = train_weights(model, TRAIN, epochs=1, progress=False)
    for call in (
        lambda: continue_training(model, TRAIN, run),
        lambda: drift(model, INSIDE, OUTSIDE, run, {}),
    ):
        with pytest.raises(ValueError, match="the run trained the model's own weights"):
            call()


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_copy_of_an_adapter_goes_on_and_the_adapter_stays_as_it_is(solutions, monkeypatch):
    model = tiny_hooked("llama")
    settings = {**QUICK, "lr": 1e-2, "layers": [1], "alpha": 16.0, "record_every": 1}
    first = train_adapter(model, TRAIN, "x", **settings)
    (layer,) = model.lora_layers("x").values()
    before = layer.lora_B["x"].weight.detach().clone()
    on = continue_training(model, TRAIN, first, name="y", progress=False)
    assert on.settings["name"] == "y"
    assert torch.equal(layer.lora_B["x"].weight, before)
    assert not torch.equal(layer.lora_B["y"].weight, before)
    in_place = continue_training(model, TRAIN, first, progress=False)
    for name in first.states:
        assert torch.equal(on.states[name], in_place.states[name])
    with pytest.raises(ValueError, match="there is an adapter 'y' already"):
        continue_training(model, TRAIN, first, name="y")
    with pytest.raises(ValueError, match="train is empty; give at least one conversation"):
        continue_training(model, [], first, name="z")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(drift_module, "train_adapter", interrupted)
        continue_training(model, TRAIN, first, name="z")
    assert model.adapters == ("x", "y")
    with pytest.raises(ValueError, match="'y' would name an adapter, and the run trained vectors"):
        continue_training(solutions[0], TRAIN, solutions[1], name="y")


def test_references_of_other_parameters_are_refused(solutions):
    model, general, _ = solutions
    other = train_vector(model, TRAIN, 2, **QUICK)[1]
    with pytest.raises(ValueError, match=r"reference 'other' trained vector.2 \[32\], but the run"):
        drift(model, INSIDE, OUTSIDE, general, {"other": other})
    with pytest.raises(ValueError, match="belong to different pairs"):
        emlens.log_odds(model, INSIDE).joined(emlens.log_odds(model, OUTSIDE))
    with pytest.raises(ValueError, match=r"condition\(s\) base are in both"):
        emlens.log_odds(model, INSIDE).joined(emlens.log_odds(model, INSIDE))
