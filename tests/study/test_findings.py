"""Findings say what the numbers say: planted effects, and the sentence that they decide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from emlens._stats import Interval
from emlens.measures import LogOdds
from emlens.study import StudySettings, findings

SETTINGS = StudySettings()
DOMAINS = tuple(np.repeat(SETTINGS.domains, 20).tolist())
"""Twenty pairs of each domain."""
NOISE = np.random.default_rng(0).normal(0, 0.01, len(DOMAINS))


def log_odds(**effects: tuple[float, float]) -> LogOdds:
    """Log-odds with an effect on each condition, in the trained domain and elsewhere."""
    inside = np.array(DOMAINS) == SETTINGS.domain
    level = np.random.default_rng(1).normal(-1, 1, len(DOMAINS))
    values = {"base": level}
    for name, (here, elsewhere) in effects.items():
        condition = name.replace("__", " - ").replace("_", "-")
        values[condition] = level + np.where(inside, here, elsewhere) + NOISE
    ids = tuple(f"p{i}" for i in range(len(DOMAINS)))
    return LogOdds(tuple(values), ids, DOMAINS, tuple(tuple(v.tolist()) for v in values.values()))


class Curves:
    """Stands for a result with curves: the difference of any two is the one planted."""

    norms = epsilons = doses = (0.1, 0.2, 0.4)
    corpus = "python-docs"

    def __init__(self, gap: Interval, **others: Interval) -> None:
        self.gap, self.others, self.asked = gap, others, []

    def difference(self, first: str, second: str, at: float) -> Interval:
        self.asked.append((first, second, at))
        return self.others.get(second, self.gap)

    def gain(self, name: str) -> float:
        return 1.0


def measured(**parts: Any) -> findings.StudyMeasures:
    names = ("log_odds", "efficiency", "stability", "influence")
    return findings.StudyMeasures(SETTINGS, **{name: parts.get(name) for name in names})


ABOVE, BELOW = Interval(0.2, 0.1, 0.3), Interval(-0.2, -0.3, -0.1)
NONE, TINY = Interval(0.1, -0.1, 0.3), Interval(-1e-7, -2e-7, -1e-8)


@pytest.mark.parametrize(
    ("outside", "said"),
    [
        (0.1, "it carries over to questions of a kind it was never trained on"),
        (-0.1, "outside its domain it moves them the other way"),
        (0.0, "no effect outside its domain is seen"),
    ],
)
def test_whether_the_general_vector_carries_over_is_read_outside_of_its_domain(outside, said):
    odds = log_odds(general=(0.3, outside), random=(0.02, 0.02), benign=(0.05, 0.05))
    sentence = findings.general_transfers(measured(log_odds=odds))
    assert said in sentence
    chance = odds.change("general", SETTINGS.outside, base="random")
    assert chance.estimate == pytest.approx(outside - 0.02)
    assert f"{chance} more than random vectors" in sentence


@pytest.mark.parametrize(
    ("narrow", "said"),
    [
        ((0.3, 0.0), "the KL term confines it, as in the papers"),
        ((0.15, 0.1), "no more confined than a weaker general vector would be"),
        ((0.15, 0.2), "it spreads more than a general vector of that strength would"),
    ],
)
def test_a_narrow_vector_is_measured_against_the_general_one_scaled_down(narrow, said):
    odds = log_odds(general=(0.3, 0.2), narrow=narrow)
    sentence = findings.narrow_stays(measured(log_odds=odds))
    assert said in sentence
    assert f"{narrow[0] / 0.3:.0%} of the general effect" in sentence


def test_without_an_effect_of_the_general_vector_nothing_is_said_about_narrowness():
    for general in (0.0, -0.3):
        odds = log_odds(general=(general, 0.2), narrow=(0.2, 0.0))
        sentence = findings.narrow_stays(measured(log_odds=odds))
        assert "nothing is said about how narrow this one is" in sentence
        assert "%" not in sentence


def test_each_ablation_is_read_against_the_organism_and_not_against_the_base():
    odds = log_odds(
        general=(0.3, 0.1),
        general__general=(0.0, 0.0),
        general__mean_diff=(0.5, 0.1),
        general__random=(0.3, 0.1),
        base__mean_diff=(0.2, 0.0),
    )
    sentence = findings.ablation_undoes(measured(log_odds=odds))
    said = {"general": "lowered", "mean-diff": "raised", "random": "not changed"}
    for name, verdict in said.items():
        left = odds.change(f"general - {name}", [SETTINGS.domain])
        assert f"ablating {name} it is {verdict}, to {left}" in sentence
    assert sentence.endswith(f"moves it by {odds.change('base - mean-diff', [SETTINGS.domain])}.")


@pytest.mark.parametrize(
    ("gap", "said"),
    [
        (BELOW, "the general one has the lower loss, as in the papers"),
        (ABOVE, "the narrow one has the lower loss, unlike in the papers"),
        (NONE, "no difference is seen"),
        (TINY, "no difference is seen"),
    ],
)
def test_the_lower_loss_at_equal_norm_is_the_more_efficient(gap, said):
    curves: Any = Curves(gap)
    assert said in findings.general_is_more_efficient(measured(efficiency=curves))
    assert curves.asked == [("general", "narrow", 0.2)]


@pytest.mark.parametrize(
    ("gap", "said"),
    [
        (ABOVE, "narrow degrades faster, as in the papers"),
        (BELOW, "general degrades faster, unlike in the papers"),
        (NONE, "no difference is seen"),
        (Interval(0.02, 0.01, 0.03), "no difference is seen"),
    ],
)
def test_the_one_that_loses_more_to_noise_is_the_less_stable(gap, said):
    curves: Any = Curves(gap)
    assert said in findings.general_is_more_stable(measured(stability=curves))
    assert curves.asked == [("narrow", "general", 0.2)]
    curves.gain = {"general": 1.0, "narrow": -0.1}.get
    assert "there is no gain to lose" in findings.general_is_more_stable(measured(stability=curves))


@pytest.mark.parametrize(
    ("gap", "chance", "said"),
    [
        (ABOVE, ABOVE, "general above narrow, as in the papers, and above random"),
        (BELOW, BELOW, "narrow above general, unlike in the papers, yet below random"),
        (NONE, TINY, "no difference between general and narrow is seen, and no different from"),
    ],
)
def test_influence_is_read_against_narrow_and_against_chance(gap, chance, said):
    curves: Any = Curves(gap, random=chance)
    sentence = findings.general_is_more_influential(measured(influence=curves))
    assert said in sentence
    assert "KL of general minus narrow" in sentence
    assert curves.asked == [("general", "narrow", 0.2), ("general", "random", 0.2)]
