"""Sweeps over the KL weight: against single runs, and against a planted threshold."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

import emlens
from emlens import Add, KLPenalty, _progress, train_vector
from emlens.figures.labels import PointLabels
from emlens.training import KLSweep, auto_kl, sweep_kl, train_adapter
from emlens.training.sweep import FACTORS
from tests.support.data import conversations, pairs
from tests.support.models import tiny_hooked

TRAIN, ELSEWHERE = conversations("bad", 6), conversations("good", 5)
INSIDE, OUTSIDE = pairs(4, "inside"), pairs(7, "outside")[4:]
KL = KLPenalty(ELSEWHERE, weight=1.0)
QUICK = {"epochs": 2, "batch_size": 3, "lr": 0.2}
GENTLE = {**QUICK, "lr": 0.02}
"""Small enough for an effect that grows with the strength."""


def test_each_weight_is_a_run_of_its_own_measured_inside_and_outside(tmp_path):
    model = tiny_hooked("llama")
    found = sweep_kl(model, TRAIN, INSIDE, OUTSIDE, KL, [5.0, 0], layer=1, **GENTLE)
    assert found.weights == (0.0, 5.0)
    for i, kl in enumerate((None, KLPenalty(ELSEWHERE, weight=5.0))):
        direction, run = train_vector(model, TRAIN, 1, kl=kl, progress=False, **GENTLE)
        for name, own in (("inside", INSIDE), ("outside", OUTSIDE)):
            scores = emlens.log_odds(model, own, {"base": [], "v": [Add(direction)]})
            change = scores.change("v")
            assert getattr(found, name)[i] == pytest.approx(
                (change.estimate, change.low, change.high), abs=1e-5
            )
        assert found.norms[i] == pytest.approx(direction.norm, rel=1e-5)
        assert found.kl[i] == (None if kl is None else pytest.approx(run.steps[-1].kl, abs=1e-6))
    assert found.beyond[0] == pytest.approx((0, 0, 0), abs=1e-9)
    general = train_vector(model, TRAIN, 1, progress=False, **GENTLE)[0]
    curve = np.zeros((1 + len(FACTORS), 2))
    for i, factor in enumerate(FACTORS, 1):
        for side, own in enumerate((INSIDE, OUTSIDE)):
            edits = [Add(general, scale=factor)]
            scores = emlens.log_odds(model, own, {"base": [], "v": edits})
            curve[i, side] = scores.change("v").estimate
    assert np.array(found.weaker) == pytest.approx(curve, abs=1e-5)
    assert (np.diff(curve[:, 0]) > 0).all(), "the case needs an effect that grows with strength"
    assert 0 < found.inside[1][0] < curve[-1, 0]
    at = np.interp(found.inside[1][0], curve[:, 0], (0, *FACTORS))
    expected = found.outside[1][0] - np.interp(at, (0, *FACTORS), curve[:, 1])
    assert found.beyond[1][0] == pytest.approx(expected, abs=1e-5)
    assert KLSweep.load(found.save(tmp_path / "sweep.json")) == found
    assert list(found.table()["KL weight"]) == [0, 5]
    ax = found.plot()
    assert ax.get_ylabel() == "change of log-odds outside [nats/token]"
    labels = next(child for child in ax.get_children() if isinstance(child, PointLabels))
    names = [text.get_text().replace("\n", " ") for text in labels.texts]
    assert names == ["no KL", "KL x 5"]


def test_a_vector_is_measured_where_it_was_trained(hooked_llama):
    options = {**QUICK, "where": "response"}
    found = sweep_kl(hooked_llama, TRAIN, INSIDE, OUTSIDE, KL, [0], layer=1, **options)
    direction, _ = train_vector(hooked_llama, TRAIN, 1, progress=False, **options)
    conditions = {"base": [], "x": [Add(direction, where="response")]}
    alone = emlens.log_odds(hooked_llama, INSIDE, conditions).change("x")
    assert found.inside[0][0] == pytest.approx(alone.estimate, abs=1e-5)


def test_adapters_are_swept_and_taken_away_again():
    model = tiny_hooked("llama")
    options = {**QUICK, "lr": 1e-2, "layers": [1], "alpha": 16.0}
    found = sweep_kl(model, TRAIN, INSIDE, OUTSIDE, KL, [0, 3.0], **options)
    assert model.adapters == ()
    assert abs(found.outside[1][0]) < abs(found.outside[0][0])


def test_the_seed_is_that_of_the_trainings():
    model = tiny_hooked("llama")
    options = {**QUICK, "lr": 1e-2, "layers": [1], "alpha": 16.0}
    run = train_adapter(model, TRAIN, "by hand", seed=5, progress=False, **options)
    model.remove_adapter("by hand")
    norms = [
        sweep_kl(model, TRAIN, INSIDE, OUTSIDE, KL, [0], seed=seed, **options).norms[0]
        for seed in (5, 6)
    ]
    assert norms[0] == run.steps[-1].norm
    assert norms[1] != norms[0]


@pytest.fixture
def planted(monkeypatch):
    """Solutions known by construction: what is left outside is a function of the weight."""
    module = sys.modules["emlens.training.sweep"]

    def plant(outside, bend=1.0):
        def measure(self, weight):
            strengths = np.array(FACTORS)[:, None]
            self._weaker = [strengths * np.full(4, 0.3), strengths**bend * np.full(3, outside(0))]
            inside = emlens.training.sweep.Interval(0.3, 0.2, 0.4)
            left = outside(weight)
            interval = emlens.training.sweep.Interval(left, left - 0.05, left + 0.05)
            shifts = np.full(4, 0.3), np.full(3, left)
            return module._Trial(weight, inside, interval, shifts, None, 1.0)

        monkeypatch.setattr(module._Bench, "measure", measure)

    return plant


def found_by(trials=8, tolerance=0.05):
    return auto_kl(
        tiny_hooked("llama"), TRAIN, INSIDE, OUTSIDE, KL, tolerance=tolerance, trials=trials
    )


def test_auto_kl_finds_a_planted_threshold_and_that_it_jumps(planted):
    planted(lambda weight: 0.2 if weight < 1.7 else 0.01)
    found = found_by()
    assert found.chosen == pytest.approx(1.7, rel=0.05)
    assert found.chosen >= 1.7
    assert found.turn[0] < 1.7 <= found.turn[1]
    assert found.jumps
    assert "suffices" in str(found)
    assert "at once" in str(found)


def test_a_solution_that_is_only_weaker_is_not_taken_for_a_narrow_one(planted, monkeypatch):
    """The effect outside falls with the square of the strength: half inside, a quarter outside."""
    planted(lambda weight: 0.2 if weight == 0 else 0.05, bend=2.0)
    module = sys.modules["emlens.training.sweep"]
    planted_measure = module._Bench.measure

    def half(self, weight):
        trial = planted_measure(self, weight)
        share = 1.0 if weight == 0 else 0.5
        interval = emlens.training.sweep.Interval(0.3 * share, 0.1, 0.4)
        shifts = trial.shifts[0] * share, trial.shifts[1]
        return replace(trial, inside=interval, shifts=shifts)

    monkeypatch.setattr(module._Bench, "measure", half)
    found = sweep_kl(tiny_hooked("llama"), TRAIN, INSIDE, OUTSIDE, KL, [0, 1.0], layer=1)
    assert found.beyond[0] == pytest.approx((0, 0, 0), abs=1e-9)
    # a line through the solution itself would give 0.05 - 0.5 * 0.2 = -0.05
    assert found.beyond[1] == pytest.approx((0, 0, 0), abs=1e-9)


def test_auto_kl_says_that_a_smooth_decline_does_not_jump(planted):
    planted(lambda weight: 0.2 / (1 + weight))
    found = found_by()
    assert found.chosen == pytest.approx(3.0, rel=0.05)
    assert not found.jumps
    assert "gradually" in str(found)


def test_auto_kl_says_when_no_weight_is_needed_or_none_suffices(planted):
    planted(lambda weight: 0.03)
    assert found_by().weights == (0.0,)
    assert found_by().chosen == 0
    planted(lambda weight: 0.2)
    assert found_by().weights == (0.0, 100.0)
    assert found_by().chosen is None
    assert "none suffices" in str(found_by())
    planted(lambda weight: 0.2 if weight == 0 else 0.01)
    assert found_by().chosen == 0.01


def test_a_larger_weight_leaves_less_outside_in_a_real_model():
    """The KL set holds both answers of every pair outside, so that enough of it must confine."""
    both = [pair.conversation(side) for pair in OUTSIDE for side in ("aligned", "misaligned")]
    options = {**QUICK, "epochs": 10, "warmup": 0, "schedule": "constant"}
    found = auto_kl(
        tiny_hooked("llama"),
        TRAIN,
        INSIDE,
        OUTSIDE,
        KLPenalty(both, weight=1.0),
        tolerance=0.05,
        layer=1,
        trials=2,
        **options,
    )
    assert abs(found.outside[0][0]) > 0.05
    assert abs(found.outside[-1][0]) < 0.05
    assert found.chosen is not None
    assert found.kl[-1] < 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: sweep_kl(m, TRAIN, INSIDE, OUTSIDE, KL, [], layer=1), "no weights were given"),
        (
            lambda m: sweep_kl(m, TRAIN, INSIDE, OUTSIDE, KL, [-1], layer=1),
            r"weights\[0\] must be at",
        ),
        (lambda m: sweep_kl(m, TRAIN, [], OUTSIDE, KL, [1], layer=1), "inside is empty; give at"),
        (lambda m: auto_kl(m, TRAIN, INSIDE, OUTSIDE, KL, tolerance=0), "needs tolerance > 0"),
    ],
)
def test_bad_input_is_refused(hooked_llama, call, message):
    with pytest.raises(ValueError, match=message):
        call(hooked_llama)


def test_a_sweep_shows_how_many_of_its_trainings_are_done(capsys, monkeypatch):
    monkeypatch.setattr(_progress, "watched", lambda: True)
    monkeypatch.setattr(_progress, "DELAY", 0)
    model = tiny_hooked("llama")
    sweep_kl(model, TRAIN, INSIDE, OUTSIDE, KL, [5.0, 0], layer=1, progress=True, **QUICK)
    shown = capsys.readouterr().err
    assert "KL weights" in shown and "2/2" in shown
