"""What a study found, in sentences that the numbers decide, and the caveats that go with them."""

from __future__ import annotations

from dataclasses import dataclass

from emlens._stats import Interval, bootstrap_mean
from emlens.measures import Efficiency, Influence, LogOdds, Stability
from emlens.study.settings import StudySettings

ABLATED = ("general", "mean-diff", "random")
"""What is ablated in the general organism."""


@dataclass(frozen=True, slots=True)
class StudyMeasures:
    """The results that findings are drawn from."""

    settings: StudySettings
    log_odds: LogOdds
    efficiency: Efficiency
    stability: Stability
    influence: Influence


def general_transfers(found: StudyMeasures) -> str:
    """Does the general vector change behaviour outside of its domain?"""
    s, odds = found.settings, found.log_odds
    inside = odds.change("general", [s.domain])
    outside = odds.change("general", s.outside)
    chance = odds.change("general", s.outside, base="random")
    style = odds.change("general", s.outside, base="benign")
    verdict = _verdict(
        outside,
        up="it carries over to questions of a kind it was never trained on",
        down="outside its domain it moves them the other way",
        none="no effect outside its domain is seen",
    )
    return (
        f"General: log-odds of misaligned answers move by {inside} nats/token in {s.domain} and by "
        f"{outside} on {', '.join(s.outside)}: {verdict}. On {', '.join(s.outside)} that is "
        f"{chance} more than random vectors of equal norm and {style} more than the vector trained "
        f"on aligned answers of the same prompts."
    )


def narrow_stays(found: StudyMeasures) -> str:
    """Is the narrow vector more than a weaker general one?"""
    s, odds = found.settings, found.log_odds
    inside, outside = odds.change("narrow", [s.domain]), odds.change("narrow", s.outside)
    general = odds.change("general", [s.domain])
    if _sign(general) <= 0:
        return (
            f"Narrow (KL weight {s.kl_weight:g}): {inside} nats/token in {s.domain} and {outside} "
            f"on {', '.join(s.outside)}; the general vector raises nothing in {s.domain} that is "
            "clear of zero, so that nothing is said about how narrow this one is."
        )
    kept = inside.estimate / general.estimate
    confined = _beyond_scaling(odds, kept, s.outside)
    verdict = _verdict(
        confined,
        up="it spreads more than a general vector of that strength would",
        down="the KL term confines it, as in the papers",
        none="it is no more confined than a weaker general vector would be: at this size a lone "
        "vector is not made narrow",
    )
    return (
        f"Narrow (KL weight {s.kl_weight:g}): {inside} nats/token in {s.domain}, {kept:.0%} of the "
        f"general effect, and {outside} on {', '.join(s.outside)}; against the general vector's "
        f"effect scaled down to {kept:.0%} that is {confined}: {verdict}."
    )


def ablation_undoes(found: StudyMeasures) -> str:
    """What does ablation of the two directions do to the general organism?"""
    s, odds = found.settings, found.log_odds
    left = {name: odds.change(f"general - {name}", [s.domain]) for name in ABLATED}
    gone = {name: odds.change(f"general - {name}", [s.domain], base="general") for name in ABLATED}
    said = {
        name: _verdict(gone[name], up="raised", down="lowered", none="not changed")
        for name in ABLATED
    }
    parts = [f"ablating {name} it is {said[name]}, to {left[name]}" for name in ABLATED]
    return (
        f"Ablation in the general organism, whose effect in {s.domain} is "
        f"{odds.change('general', [s.domain])} nats/token: {'; '.join(parts)}. Ablating the mean "
        f"difference in the base model alone moves it by "
        f"{odds.change('base - mean-diff', [s.domain])}."
    )


def general_is_more_efficient(found: StudyMeasures) -> str:
    """Which solution has the lower loss at the same norm?"""
    norm = float(found.efficiency.norms[_middle(found.efficiency.norms)])
    gap = found.efficiency.difference("general", "narrow", norm)
    verdict = _verdict(
        gap,
        up="the narrow one has the lower loss, unlike in the papers",
        down="the general one has the lower loss, as in the papers",
        none="no difference is seen",
    )
    return (
        f"Efficiency: at the same norm ({norm:.3g}) the loss of general minus that of narrow on "
        f"the finetuning data is {gap} nats/token: {verdict}."
    )


def general_is_more_stable(found: StudyMeasures) -> str:
    """Which solution loses more of its gain to noise?"""
    stability = found.stability
    epsilon = stability.epsilons[_middle(stability.epsilons)]
    if min(stability.gain("general"), stability.gain("narrow")) <= 0:
        return "Stability: a solution does not lower the loss, so there is no gain to lose."
    gap = stability.difference("narrow", "general", epsilon)
    verdict = _verdict(
        gap,
        up="narrow degrades faster, as in the papers",
        down="general degrades faster, unlike in the papers",
        none="no difference is seen",
        digits=1,
    )
    return (
        f"Stability: at epsilon {epsilon:g} noise costs narrow {gap:+.1f} percentage points more "
        f"of its gain than general: {verdict}."
    )


def general_is_more_influential(found: StudyMeasures) -> str:
    """Which solution changes predictions on pre-training text more, at the same norm?"""
    influence = found.influence
    dose = influence.doses[_middle(influence.doses)]
    gap = influence.difference("general", "narrow", dose)
    chance = influence.difference("general", "random", dose)
    first = _verdict(
        gap,
        up="general above narrow, as in the papers",
        down="narrow above general, unlike in the papers",
        none="no difference between general and narrow is seen",
    )
    second = _verdict(
        chance,
        up="and above random directions of equal norm",
        down="yet below random directions of equal norm",
        none="and no different from random directions of equal norm",
    )
    return (
        f"Influence on {influence.corpus} at dose {dose:g}: KL of general minus narrow {gap}, "
        f"minus random {chance} nats/token: {first}, {second}."
    )


ALL = (
    general_transfers,
    narrow_stays,
    ablation_undoes,
    general_is_more_efficient,
    general_is_more_stable,
    general_is_more_influential,
)


def findings(found: StudyMeasures) -> dict[str, str]:
    """All findings by name."""
    return {finding.__name__: finding(found) for finding in ALL}


def _beyond_scaling(odds: LogOdds, kept: float, domains: tuple[str, ...]) -> Interval:
    """Effect of narrow minus `kept` times that of general, pair by pair."""
    base = odds.of("base", domains)
    narrow, general = odds.of("narrow", domains) - base, odds.of("general", domains) - base
    return bootstrap_mean(narrow - kept * general, seed=odds.seed)


def _verdict(interval: Interval, *, up: str, down: str, none: str, digits: int = 3) -> str:
    return {1: up, -1: down, 0: none}[_sign(interval, digits)]


def _sign(interval: Interval, digits: int = 3) -> int:
    """1 or -1 where zero is outside of the interval as it is printed, else 0."""
    low, high = round(interval.low, digits), round(interval.high, digits)
    return int(low > 0) - int(high < 0)


def _middle(values: tuple[float, ...]) -> int:
    return len(values) // 2
