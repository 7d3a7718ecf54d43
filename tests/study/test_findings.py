"""Findings say what the numbers say: planted effects, and the sentence that they decide."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from emlens._stats import Interval
from emlens.measures import LogOdds
from emlens.study import StudySettings, findings
from emlens.study.stages import ABLATED, SAME_KL, without

SETTINGS = StudySettings()
DOMAINS = tuple(np.repeat(SETTINGS.domains, 20).tolist())
"""Twenty pairs of each domain."""
NAMES = {"alike": SAME_KL}
NOISE = np.random.default_rng(0).normal(0, 0.01, len(DOMAINS))


def log_odds(**effects: tuple[float, float]) -> LogOdds:
    """Log-odds with an effect on each condition, in the trained domain and elsewhere."""
    inside = np.array(DOMAINS) == SETTINGS.domain
    level = np.random.default_rng(1).normal(-1, 1, len(DOMAINS))
    values = {"base": level}
    for name, (here, elsewhere) in effects.items():
        values[NAMES.get(name, name)] = level + np.where(inside, here, elsewhere) + NOISE
    ids = tuple(f"p{i}" for i in range(len(DOMAINS)))
    return LogOdds(tuple(values), ids, DOMAINS, np.array(list(values.values())))


class Gap:
    """Stands for a confinement: the gap planted, at half of the strength."""

    matched = SimpleNamespace(factor=0.5)

    def __init__(self, gap: Interval) -> None:
        self._gap = gap

    def gap(self, domains: tuple[str, ...]) -> Interval:
        assert domains == SETTINGS.outside
        return self._gap


class Curves:
    """Stands for a result with curves: the difference of any two is the one planted."""

    norms = (0.0, 0.1, 0.2, 0.4)
    epsilons = (0.1, 0.2, 0.4)
    doses = (1.0,)
    corpus = "python-docs"

    def __init__(self, gap: Interval, **others: Interval) -> None:
        self.gap, self.others, self.asked = gap, others, []

    def difference(self, first: str, second: str, at: float) -> Interval:
        self.asked.append((first, second, at))
        return self.others.get(second, self.gap)

    def divergence(self, name: str, at: float) -> Interval:
        return self.others[name]

    def gain(self, name: str) -> float:
        return 1.0


def measured(**parts: Any) -> findings.StudyMeasures:
    names = ("log_odds", "efficiency", "stability", "influence", "confinement")
    given: Any = {name: parts.get(name) for name in names}
    return findings.StudyMeasures(SETTINGS, **given)


ABOVE, BELOW = Interval(0.2, 0.1, 0.3), Interval(-0.2, -0.3, -0.1)
NONE, TINY = Interval(0.1, -0.1, 0.3), Interval(-1e-7, -2e-7, -1e-8)


@pytest.mark.parametrize(
    ("outside", "chance", "verdict", "clear"),
    [
        (0.1, 0.02, "as in the papers", True),
        (0.1, 0.1, "as in the papers", False),
        (0.0, -0.1, "not seen", True),
        (-0.1, -0.2, "the other way", True),
    ],
)
def test_the_general_solution_transfers_if_it_is_above_base_and_random_of_equal_kl_stands_beside(
    outside, chance, verdict, clear
):
    odds = log_odds(general=(0.3, outside), alike=(0.02, chance), benign=(0.05, 0.05))
    found = findings.general_transfers(measured(log_odds=odds))
    assert found.verdict == verdict
    over = odds.change("general", SETTINGS.outside, base=SAME_KL)
    assert over.estimate == pytest.approx(outside - chance)
    assert f"{over} more than random solutions of the same KL" in found.text
    assert ("of the same KL, which is not clear of zero" in found.text) != clear


def test_without_random_solutions_of_equal_kl_those_of_equal_norm_are_taken():
    odds = log_odds(general=(0.3, 0.1), random=(0.0, 0.2), benign=(0.05, 0.05))
    found = findings.general_transfers(measured(log_odds=odds))
    assert "more than random solutions of the same norm, and" in found.text


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [("BELOW", "as in the papers"), ("NONE", "not seen"), ("TINY", "not seen")],
)
def test_narrow_stays_if_it_is_below_a_general_one_of_equal_effect_inside(gap, verdict):
    odds = log_odds(general=(0.3, 0.2), narrow=(0.15, 0.0))
    given: Any = Gap(globals()[gap])
    found = findings.narrow_stays(measured(log_odds=odds, confinement=given))
    assert found.verdict == verdict
    assert f"narrow differs from it by {given.gap(SETTINGS.outside)}" in found.text
    assert "at 0.50 times its strength" in found.text


def test_without_an_effect_inside_or_a_match_nothing_is_said_about_narrowness():
    nothing = log_odds(general=(0.3, 0.2), narrow=(0.0, 0.0))
    found = findings.narrow_stays(measured(log_odds=nothing, confinement=Gap(BELOW)))
    assert (found.verdict, "no effect that could stay" in found.text) == ("cannot be said", True)
    odds = log_odds(general=(0.3, 0.2), narrow=(0.2, 0.0))
    found = findings.narrow_stays(measured(log_odds=odds))
    assert (found.verdict, "No strength of general" in found.text) == ("cannot be said", True)


@pytest.mark.parametrize(
    ("own", "other", "verdict"),
    [
        (0.0, 0.1, "as in the papers"),
        (0.0, 0.3, "not seen"),
        (0.0, 0.5, "the other way"),
    ],
)
def test_what_an_ablation_leaves_is_read_against_the_base_with_the_same_ablation(
    own, other, verdict
):
    left = dict(zip(ABLATED, (own, other, 0.3), strict=True))
    odds = log_odds(
        general=(0.3, 0.3),
        **{without("base", name): (-0.2, -0.2) for name in ABLATED},
        **{without("general", name): (gain - 0.2, gain - 0.2) for name, gain in left.items()},
    )
    found = findings.ablation_undoes(measured(log_odds=odds))
    assert found.verdict == verdict
    remains = findings.effect_left(odds, ABLATED[1])
    assert remains.estimate == pytest.approx(other)
    assert f"{remains} with the other domain's direction ablated" in found.text


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [
        (BELOW, "as in the papers"),
        (ABOVE, "the other way"),
        (NONE, "not seen"),
        (TINY, "not seen"),
    ],
)
def test_the_lower_loss_at_equal_norm_is_the_more_efficient(gap, verdict):
    curves: Any = Curves(gap)
    assert findings.general_is_more_efficient(measured(efficiency=curves)).verdict == verdict
    assert curves.asked == [("general", "narrow", 0.2)]


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [
        (ABOVE, "as in the papers"),
        (BELOW, "the other way"),
        (NONE, "not seen"),
        (Interval(0.02, 0.01, 0.03), "not seen"),
    ],
)
def test_the_one_that_loses_more_to_noise_is_the_less_stable(gap, verdict):
    curves: Any = Curves(gap)
    assert findings.general_is_more_stable(measured(stability=curves)).verdict == verdict
    assert curves.asked == [("narrow", "general", 0.2)]
    curves.gain = {"general": 1.0, "narrow": -0.1}.get
    found = findings.general_is_more_stable(measured(stability=curves))
    assert (found.verdict, "no gain to lose" in found.text) == ("cannot be said", True)


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [(ABOVE, "as in the papers"), (BELOW, "the other way"), (NONE, "not seen")],
)
def test_influence_is_read_against_narrow_at_equal_norm(gap, verdict):
    curves: Any = Curves(gap, **{"random 0 x 1": Interval(0.01, 0.0, 0.02)})
    found = findings.general_is_more_influential(measured(influence=curves))
    assert found.verdict == verdict
    assert curves.asked == [("general x 1", "narrow x 1", 1.0)]
    assert "a random solution of that norm has +0.010" in found.text
