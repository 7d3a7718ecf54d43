"""Matched strength and confinement: planted models, closed forms, curves made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from emlens import Ablate, Add, Clamp, Direction, log_odds
from emlens.hooked import Condition, Noisy, Scaled
from emlens.measures import (
    Confinement,
    MatchedStrength,
    confinement,
    match_kl,
    match_strength,
)
from emlens.measures.confinement import gap_over
from emlens.measures.matching import Search
from emlens.measures.solutions import condition_from, record_of, scalable, times
from tests.support.data import conversations, pairs
from tests.support.planted import (
    GENERAL,
    INSIDE,
    NARROW,
    OUTSIDE,
    WIDTH,
    planted_model,
    planted_pairs,
)
from tests.support.solutions import direction, with_adapters


@pytest.fixture(scope="module")
def planted():
    return planted_model()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_adapters(tmp_path_factory.mktemp("adapters"))


def axis(number: int, size: float) -> Add:
    return Add(Direction.of(size * torch.eye(WIDTH)[number], 0))


def by_hand(effects, target, factors=(0.0, 0.5, 1.0), factor=0.5, **more) -> MatchedStrength:
    effects = np.asarray(effects, dtype=float)
    n = effects.shape[1]
    return MatchedStrength(
        effect="change of log-odds",
        solution={"adapters": {"a": 1.0}, "edits": []},
        like="b",
        ids=tuple(f"p{i}" for i in range(n)),
        counts=more.pop("counts", np.ones(n)),
        factors=factors,
        effects=effects,
        target=target,
        factor=factor,
        **more,
    )


# -- planted ----------------------------------------------------------------------------------


def test_the_strength_of_equal_effect_is_found_where_it_is_known(planted):
    # the logits of the planted model are linear in what is added
    inside = planted_pairs(INSIDE)
    found = match_strength(planted, inside, axis(GENERAL, 2.0), axis(NARROW, 0.5))
    assert found.factor == pytest.approx(0.25, rel=1e-3)
    scores = log_odds(planted, inside, {"base": [], "a": found.condition, "b": axis(NARROW, 0.5)})
    assert scores.change("a").estimate == pytest.approx(scores.change("b").estimate, rel=0.02)
    whole = log_odds(planted, inside, {"base": [], "a": axis(GENERAL, 2.0)}).change("a").estimate
    assert found.slope == pytest.approx(whole, rel=1e-2)
    assert found.strength().estimate == pytest.approx(0.25, rel=1e-3)


def test_what_is_planted_as_narrow_is_confined_by_all_that_the_general_one_does(planted):
    inside, outside = planted_pairs(INSIDE), planted_pairs(OUTSIDE)
    found = confinement(planted, inside, outside, axis(GENERAL, 2.0), axis(NARROW, 0.5))
    edits = {"base": [], "a": axis(GENERAL, 0.5), "b": axis(NARROW, 0.5)}
    scores = log_odds(planted, outside, edits)
    gap = scores.change("b").estimate - scores.change("a").estimate
    assert scores.change("a").estimate > 10 * abs(scores.change("b").estimate)
    assert found.gap().estimate == pytest.approx(gap, rel=1e-2)
    assert found.gap().high < 0
    assert found.effect().estimate == pytest.approx(scores.change("b").estimate, abs=1e-6)
    assert found.scaled_effect().estimate == pytest.approx(scores.change("a").estimate, rel=1e-2)


def test_a_weaker_general_solution_is_not_confined(model):
    # half of an adapter is no linear half of its effect, which an extrapolation would take it for
    inside, outside = pairs(5), pairs(6, "elsewhere")
    found = confinement(model, inside, outside, "many", Scaled("many", 0.4), tolerance=1e-3)
    assert found.matched.factor == pytest.approx(0.4, abs=0.01)
    gap = found.gap()
    assert gap.low <= 1e-3 and gap.high >= -1e-3
    assert gap.estimate == pytest.approx(0, abs=2e-3)


def test_a_number_is_matched_as_well_and_an_adapter_keeps_its_weights(model):
    before = {n: w.clone() for n, w in model.adapter_weights("one").items()}
    effect = log_odds(model, pairs(4), {"base": None, "x": Scaled("one", 0.3)}).change("x").estimate
    found = match_strength(model, pairs(4), "one", effect, tolerance=1e-3)
    again = log_odds(model, pairs(4), {"base": None, "x": found.condition}).change("x").estimate
    whole = log_odds(model, pairs(4), {"base": None, "x": "one"}).change("x").estimate
    assert abs(again - effect) <= 1e-3 * abs(whole)
    assert all(torch.equal(before[n], w) for n, w in model.adapter_weights("one").items())


def test_a_vector_on_an_adapter_is_scaled_and_the_adapter_is_not(model):
    x = direction(model, layer=2)
    given = ("one", [Add(x, scale=0.5)])
    found = match_strength(model, pairs(4), given, ("one", [Add(x, scale=0.2)]))
    assert found.factor == pytest.approx(0.4, abs=0.02)
    assert found.condition.adapters == ("one",)
    (edit,) = found.condition.edits
    assert isinstance(edit, Add) and edit.scale == 0.5


def test_the_kl_of_a_random_adapter_is_brought_to_that_of_another(model):
    texts = conversations("bad", 4)
    found = match_kl(model, texts, "other", "one", tolerance=1e-3)

    def kl(condition) -> float:
        total, n = 0.0, 0
        for batch in model.batches(texts, token_budget=1):
            mask = batch.targets("response")[0]
            logs = []
            for one in (None, condition):
                with model.under(one), torch.no_grad():
                    ids = batch.input_ids
                    logs.append(model.module(input_ids=ids).logits[0].log_softmax(-1))
            at = mask.nonzero()[:, 0] - 1
            total += float((logs[0].exp() * (logs[0] - logs[1])).sum(-1)[at].sum())
            n += len(at)
        return total / n

    assert kl(found.condition) == pytest.approx(kl("one"), abs=2e-3 * kl("other") + 1e-6)


# -- resampling -------------------------------------------------------------------------------


def test_a_resample_is_matched_again_on_the_curve():
    # the effect of unit i is a_i times the factor, the target b_i: the factor is sum b / sum a
    generator = np.random.default_rng(0)
    a, b = generator.uniform(1, 3, 12), generator.uniform(0.4, 0.6, 12)
    found = by_hand([0 * a, 0.5 * a, a], b)
    places = generator.integers(0, 12, 12)
    assert found.rematched(places) == pytest.approx(b[places].sum() / a[places].sum())
    assert found.rematched() == pytest.approx(b.sum() / a.sum())
    draws = np.random.default_rng(1).integers(0, 12, (4000, 12))
    # as far out as a t interval of 12 units reaches: 2.201 standard errors of those
    tail = norm.cdf(-2.200985 * np.sqrt(12 / 11))
    low, high = np.quantile(b[draws].sum(1) / a[draws].sum(1), [tail, 1 - tail])
    interval = found.strength()
    assert interval.low == pytest.approx(low, rel=0.03)
    assert interval.high == pytest.approx(high, rel=0.03)


def test_the_gap_holds_the_uncertainty_of_the_strength():
    # outside all units are alike, so what the interval holds comes from the strength alone
    generator = np.random.default_rng(0)
    a, b = generator.uniform(1, 3, 12), generator.uniform(0.4, 0.6, 12)
    matched = by_hand([0 * a, 0.5 * a, a], b)
    flat = np.ones(12)
    found = Confinement(
        matched=matched,
        ids=tuple("abcdefghijkl"),
        domains=("d",) * 12,
        factors=(0.0, 0.5, 1.0),
        scaled=np.stack([0 * flat, 2 * flat, 4 * flat]),
        own=flat,
    )
    gap, strength = found.gap(), matched.strength()
    assert gap.estimate == pytest.approx(1 - 4 * strength.estimate)
    assert gap.low == pytest.approx(1 - 4 * strength.high, rel=0.15)
    assert gap.high == pytest.approx(1 - 4 * strength.low, rel=0.15)
    several = gap_over([found, found, found])
    assert several.estimate == pytest.approx(gap.estimate)
    with pytest.raises(KeyError, match=r"the domains are \['d'\]"):
        found.gap(["nowhere"])


def test_a_target_beyond_the_curve_is_read_with_the_slope_at_its_end():
    found = by_hand([[0, 0], [1, 1], [4, 4]], [5, 5], factor=1.0)
    assert found.rematched() == pytest.approx(1 + 1 / 6)
    assert by_hand([[0, 0], [1, 1], [4, 4]], [-1, -1]).rematched() == pytest.approx(-0.5)
    # a flat end leads nowhere
    assert np.isnan(by_hand([[0, 0], [4, 4], [4, 4]], [5, 5]).rematched())


def test_there_is_no_interval_where_many_resamples_have_no_match():
    found = by_hand([[0] * 4, [1] * 4, [1] * 4], [0.2, 0.2, 0.2, 3])
    assert found.strength().estimate == pytest.approx(0.45)
    assert np.isnan(found.strength().low)


# -- what cannot be matched -------------------------------------------------------------------


def search(curve, target, tolerance=0.01):
    def run(conditions):
        factors = {name: float(name.removeprefix("times ")) for name in conditions}
        return {name: np.full(3, curve(factor)) for name, factor in factors.items()}

    condition = Condition(("general",))
    return Search(None, "KL", condition, target, tolerance, np.ones(3), run)  # type: ignore[arg-type]


def test_the_search_ends_at_the_known_strength_of_a_curve():
    for curve, target, expected in (
        (lambda x: x**2, 0.09, 0.3),
        (lambda x: -(x**3), -8.0, 2.0),
        (lambda x: 1 - np.exp(-3 * x), 0.5, np.log(2) / 3),
        (lambda x: x * np.exp(-x / 2), 0.3, 0.3590),
    ):
        found = search(curve, target, 1e-4)
        (best, _) = min(found._points(), key=lambda p: abs(p[1] - abs(target)))
        assert best == pytest.approx(expected, rel=2e-3)
        assert len(found._at) <= 14


@pytest.mark.parametrize(
    ("curve", "target", "complaint"),
    [
        (lambda x: 1 - np.exp(-x), 2.0, "is out of reach of adapter general: the most is"),
        (lambda x: x * np.exp(-x), 2.0, r"the most is \+0\.3.*, at .* times its strength"),
        (lambda x: x, -0.5, "on the other side of zero"),
        (lambda x: 0.0, 0.5, "has no effect"),
        (lambda x: np.sin(2 * np.pi * x * 1.1), 0.5, "does not grow with its strength"),
        (lambda x: float(x > 0.3), 0.5, r"jumps past \+0\.5"),
    ],
)
def test_what_cannot_be_matched_is_said(curve, target, complaint):
    with pytest.raises(ValueError, match=complaint):
        search(curve, target)


def test_what_has_no_one_strength_is_refused(model):
    x = direction(model)
    for given, complaint in (
        (None, "the base has no strength"),
        (Ablate(x), "has no strength; give vectors that are added"),
        ([Add(x), Clamp(x)], "has no strength; give vectors that are added"),
        (Noisy("one", 0.2), "changed by more than one factor"),
        (Scaled("many", {0: 2.0}), "changed by more than one factor"),
        ("none such", "there is no adapter 'none such'"),
    ):
        with pytest.raises(ValueError, match=complaint):
            match_strength(model, pairs(2), given, "one")  # type: ignore[arg-type]


def test_a_condition_is_kept_and_scaled_as_it_is(model):
    x = direction(model)
    for given in ("one", Scaled("one", 0.5), Add(x, dose=0.1, where="response"), ("one", [Add(x)])):
        condition = scalable(model, given)  # type: ignore[arg-type]
        kept = condition_from(record_of(condition))
        assert str(kept) == str(condition)
        assert times(kept, 0.5).identity(model) == times(condition, 0.5).identity(model)
    assert times(scalable(model, Scaled("one", 0.5)), 3).adapters == (Scaled("one", 1.5),)
