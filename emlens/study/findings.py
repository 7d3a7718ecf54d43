"""What a study found: a claim of the papers, what the numbers say of it, and the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from emlens._stats import Interval, bootstrap_mean
from emlens.measures import Confinement, Efficiency, Influence, LogOdds, Stability
from emlens.study.report import Finding
from emlens.study.settings import StudySettings
from emlens.study.stages import ABLATED, RANDOM, SAME_KL, at, without

Verdict = Literal["the other way", "cannot be said", "not seen", "as in the papers"]
"""From the least to the most like the papers."""


@dataclass(frozen=True, slots=True)
class StudyMeasures:
    """The results that findings are drawn from.

    Attributes:
        confinement: None where no strength of general has the effect of narrow.
    """

    settings: StudySettings
    log_odds: LogOdds
    efficiency: Efficiency
    stability: Stability
    influence: Influence
    confinement: Confinement | None


def general_transfers(found: StudyMeasures) -> Finding:
    """Does the general solution change behaviour outside of its domain?"""
    s, odds = found.settings, found.log_odds
    outside = odds.change("general", s.outside)
    alike = SAME_KL if SAME_KL in odds.conditions else RANDOM
    chance = odds.change("general", s.outside, base=alike)
    style = odds.change("general", s.outside, base="benign")
    return _finding(
        f"Training on {s.domain} alone changes answers outside of it",
        _verdict(outside, 1),
        f"Misaligned answers gain {odds.change('general', [s.domain])} nats/token of log-odds in "
        f"{s.domain} and {outside} on {_outside(s)}. On {_outside(s)} that is {chance} more than "
        f"random solutions of the same {'KL' if alike == SAME_KL else 'norm'}"
        f"{'' if _sign(chance) else ', which is not clear of zero'}, and {style} more "
        "than the benign control, which was trained on good answers to the same prompts.",
    )


def narrow_stays(found: StudyMeasures) -> Finding:
    """Is the narrow solution more than a weaker general one?"""
    s, odds = found.settings, found.log_odds
    inside, outside = odds.change("narrow", [s.domain]), odds.change("narrow", s.outside)
    claim = f"With a KL penalty the effect stays in {s.domain}"
    own = f"Narrow gains {inside} nats/token in {s.domain} and {outside} on {_outside(s)}."
    if _sign(inside) <= 0:
        return _finding(claim, "cannot be said", f"{own} There is no effect that could stay.")
    if found.confinement is None:
        return _finding(
            claim,
            "cannot be said",
            f"{own} No strength of general has the same effect in {s.domain}, so it cannot be said "
            "what the penalty does beyond weakening.",
        )
    confined = found.confinement.gap(s.outside)
    return _finding(
        claim,
        _verdict(confined, -1),
        f"{own} The general solution at {found.confinement.matched.factor:.2f} times its strength "
        f"has the same effect in {s.domain}; on {_outside(s)} narrow differs from it by "
        f"{confined}.",
    )


def general_is_more_efficient(found: StudyMeasures) -> Finding:
    """Which solution has the lower loss at the same norm?"""
    norm = float(found.efficiency.norms[1 + found.settings.factors.index(1.0)])
    gap = found.efficiency.difference("general", "narrow", norm)
    return _finding(
        "General is more efficient",
        _verdict(gap, -1),
        f"At the same norm ({norm:.3g}) the loss of general on the finetuning data differs from "
        f"that of narrow by {gap} nats/token.",
    )


def general_is_more_stable(found: StudyMeasures) -> Finding:
    """Which solution loses more of its gain to noise?"""
    stability = found.stability
    epsilon = stability.epsilons[(len(stability.epsilons) - 1) // 2]
    claim = "General tolerates more noise"
    if min(stability.gain("general"), stability.gain("narrow")) <= 0:
        return _finding(
            claim, "cannot be said", "A solution does not lower the loss: there is no gain to lose."
        )
    gap = stability.difference("narrow", "general", epsilon)
    return _finding(
        claim,
        _verdict(gap, 1, digits=1),
        f"At epsilon {epsilon:g} noise costs narrow {gap:+.1f} percentage points more of its gain "
        "than general.",
    )


def general_is_more_influential(found: StudyMeasures) -> Finding:
    """Which solution changes predictions on pre-training text more, at the same norm?"""
    influence = found.influence
    general, narrow = at("general", 1.0), at("narrow", 1.0)
    gap = influence.difference(general, narrow, influence.doses[0])
    random = influence.divergence(at("random 0", 1.0), influence.doses[0])
    return _finding(
        "General matters more on pre-training text",
        _verdict(gap, 1),
        f"On {influence.corpus} at the same norm the KL of general is {gap} nats/token above that "
        f"of narrow; a random solution of that norm has {random}.",
    )


def ablation_undoes(found: StudyMeasures) -> Finding:
    """How much of the general solution's effect is left when a direction is ablated?"""
    odds = found.log_odds
    lost = {name: _lost(odds, name) for name in ABLATED}
    parts = [f"{effect_left(odds, name)} with the {name} ablated" for name in ABLATED]
    own, other, chance = (lost[name] for name in ABLATED)
    return _finding(
        "A linear direction carries it",
        _less_like(_verdict(own, 1), _verdict(other, 1)),
        f"Over all held-out pairs general gains {odds.change('general')} nats/token against base. "
        f"Where a direction is ablated in both, it gains {'; '.join(parts)}. The own direction "
        f"takes {own} away, the other domain's {other}, a random one {chance}.",
    )


def effect_left(odds: LogOdds, ablated: str, domains: Sequence[str] | None = None) -> Interval:
    """Effect of the general solution on the base model where a direction is ablated in both."""
    return odds.change(without("general", ablated), domains, base=without("base", ablated))


def _lost(odds: LogOdds, ablated: str) -> Interval:
    """How much of the general solution's effect an ablation takes away, pair by pair."""
    whole = odds.of("general") - odds.of("base")
    left = odds.of(without("general", ablated)) - odds.of(without("base", ablated))
    return bootstrap_mean(whole - left, seed=odds.seed, level=odds.level)


ALL = (
    general_transfers,
    narrow_stays,
    general_is_more_efficient,
    general_is_more_stable,
    general_is_more_influential,
    ablation_undoes,
)

_DOUBT: tuple[Verdict, ...] = get_args(Verdict)


def findings(found: StudyMeasures) -> dict[str, Finding]:
    """All findings by name."""
    return {finding.__name__: finding(found) for finding in ALL}


def _finding(claim: str, verdict: Verdict, text: str) -> Finding:
    return Finding(text, claim, verdict)


def _less_like(*verdicts: Verdict) -> Verdict:
    return min(verdicts, key=_DOUBT.index)


def _outside(settings: StudySettings) -> str:
    return f"{' and '.join(settings.outside)} questions"


def _verdict(interval: Interval, expected: int, digits: int = 3) -> Verdict:
    """What an interval says of a claim that the papers make with this sign."""
    sign = expected * _sign(interval, digits)
    return "as in the papers" if sign > 0 else "the other way" if sign < 0 else "not seen"


def _sign(interval: Interval, digits: int = 3) -> int:
    """1 or -1 where zero is outside of the interval as it is printed, else 0."""
    low, high = round(interval.low, digits), round(interval.high, digits)
    return int(low > 0) - int(high < 0)
