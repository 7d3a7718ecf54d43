"""What a study found, in sentences that the numbers decide, and the caveats that go with them."""

from __future__ import annotations

from dataclasses import dataclass

from emlens._stats import Interval
from emlens.measures import Efficiency, Influence, LogOdds, Stability
from emlens.study.settings import StudySettings


@dataclass(frozen=True, slots=True)
class Measured:
    """The results that findings are drawn from."""

    settings: StudySettings
    log_odds: LogOdds
    efficiency: Efficiency
    stability: Stability
    influence: Influence


def general_transfers(found: Measured) -> str:
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


def narrow_stays(found: Measured) -> str:
    """Does the narrow vector keep its effect inside, with little outside?"""
    s, odds = found.settings, found.log_odds
    inside, outside = odds.change("narrow", [s.domain]), odds.change("narrow", s.outside)
    lost_inside = odds.change("general", [s.domain], base="narrow")
    lost_outside = odds.change("general", s.outside, base="narrow")
    if inside.low > 0 and outside.low <= 0 < lost_outside.low:
        verdict = "it keeps an effect inside and none is seen outside, as in the papers"
    else:
        verdict = (
            "the KL term shrinks the vector rather than confining it: a lone vector at this size "
            "is not made narrow"
        )
    return (
        f"Narrow (KL weight {s.kl_weight:g}): {inside} nats/token in {s.domain} and {outside} on "
        f"{', '.join(s.outside)}; the KL term costs {lost_inside} inside and {lost_outside} "
        f"outside: {verdict}."
    )


def ablation_undoes(found: Measured) -> str:
    """What does ablation of the two directions do to the general organism?"""
    s, odds = found.settings, found.log_odds
    before = odds.change("general", [s.domain]).estimate
    parts = []
    for name in ("general", "mean-diff", "random"):
        after = odds.change(f"general - {name}", [s.domain])
        parts.append(f"{name} {1 - after.estimate / before:.0%} (leaving {after})")
    return (
        f"Ablation in the general organism takes away, of the effect in {s.domain}: "
        + "; ".join(parts)
        + f" nats/token. Ablating the mean difference in the base model alone moves it by "
        f"{odds.change('base - mean-diff', [s.domain])}."
    )


def general_is_more_efficient(found: Measured) -> str:
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


def general_is_more_stable(found: Measured) -> str:
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
    )
    return (
        f"Stability: at epsilon {epsilon:g} noise costs narrow {gap.estimate:+.1f} "
        f"[{gap.low:+.1f}, {gap.high:+.1f}] percentage points more of its gain than general: "
        f"{verdict}."
    )


def general_is_more_influential(found: Measured) -> str:
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


def findings(found: Measured) -> dict[str, str]:
    """All findings by name."""
    return {finding.__name__: finding(found) for finding in ALL}


def _verdict(interval: Interval, *, up: str, down: str, none: str) -> str:
    if interval.low > 0:
        return up
    return down if interval.high < 0 else none


def _middle(values: tuple[float, ...]) -> int:
    return len(values) // 2
