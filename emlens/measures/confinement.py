"""Confinement: the effect of a solution outside of its domain, against another scaled down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Unpack

import numpy as np
import pandas as pd
from jaxtyping import Float

from emlens._door import guarded
from emlens._results import Result
from emlens._stats import Interval, bootstrap_mean
from emlens.hooked import BatchOptions, Condition, HookedModel
from emlens.hooked.condition import BASE, ConditionLike, condition_of
from emlens.measures.log_odds import log_odds
from emlens.measures.matching import MatchedStrength, match_strength, read_at, resampled
from emlens.measures.solutions import condition_from, times, without
from emlens.text import Pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Confinement(Result):
    """Effect of a solution outside of its domain, compared with another of the same effect inside.

    Attributes:
        matched: The strength at which the other one has the same effect inside.
        ids: Ids of the pairs outside, `[n]`.
        domains: Their domains, `[n]`.
        factors: Factors on the other one that were run outside, ascending, including 0.
        scaled: Change of log-odds at each, nats per token, `[factors, n]`.
        own: Change of log-odds under the solution itself, nats per token, `[n]`.
        acting: What acted, in words.
    """

    AXES = {"domains": "ids"}

    matched: MatchedStrength
    ids: tuple[str, ...]
    domains: tuple[str, ...]
    factors: tuple[float, ...]
    scaled: Float[np.ndarray, "factors ids"]
    own: Float[np.ndarray, " ids"]
    acting: dict[str, str] = field(default_factory=dict)

    def _verify(self) -> None:
        if list(self.factors) != sorted(set(self.factors)) or len(self.factors) < 2:
            raise ValueError("factors must be at least two, in ascending order, without repeats")

    def gap(self, domains: Sequence[str] | None = None) -> Interval:
        """Effect of the solution outside minus that of the other one at the matched strength.

        Below zero, the solution is more confined than the other one scaled down. Pairs inside and
        outside are resampled, and the strength is matched again in each resample.

        Raises:
            KeyError: If every domain is unknown.
        """
        return gap_over([self], domains)

    def effect(self, domains: Sequence[str] | None = None) -> Interval:
        """Change of log-odds outside under the solution, nats per token."""
        return self._mean(self.own[self._places(domains)])

    def scaled_effect(self, domains: Sequence[str] | None = None) -> Interval:
        """The same under the other one at the matched strength, as it was run."""
        place = self.factors.index(self.matched.factor)
        return self._mean(self.scaled[place, self._places(domains)])

    def table(self) -> pd.DataFrame:
        """One row per domain outside, and one for all where there are several."""
        each = list(dict.fromkeys(self.domains))
        rows = []
        for name in [*each, *(["all"] if len(each) > 1 else [])]:
            chosen = None if name == "all" and name not in each else [name]
            rows.append(
                {
                    "domain": name,
                    "pairs": len(self._places(chosen)),
                    **self.effect(chosen).columns("change [nats/token]", "change "),
                    **self.scaled_effect(chosen).columns("scaled [nats/token]", "scaled "),
                    **self.gap(chosen).columns("gap [nats/token]", "gap "),
                    "factor": self.matched.factor,
                }
            )
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Both effects and their difference by domain, with intervals."""
        from emlens.figures import COLOURS
        from emlens.figures.bars import dot_intervals

        frame = self.table()
        columns = {
            "the solution": ("change [nats/token]", "change "),
            "the other one, scaled": ("scaled [nats/token]", "scaled "),
            "difference": ("gap [nats/token]", "gap "),
        }
        parts = [
            (domain, series, *row)
            for series, (column, before) in columns.items()
            for domain, *row in frame[
                ["domain", column, f"{before}low", f"{before}high"]
            ].itertuples(index=False)
        ]
        groups, series, values, low, high = zip(*parts, strict=True)
        return dot_intervals(
            groups,
            series,
            values,
            low,
            high,
            y_label="change of log-odds outside [nats/token]",
            # the solution is the narrow one, and the general one is scaled
            colours=dict(
                zip(columns, (COLOURS[name] for name in ("narrow", "general", "base")), strict=True)
            ),
            ax=ax,
        )

    def _said(self) -> str:
        return (
            f"outside {self.effect()}, less {self.scaled_effect()} at factor "
            f"{self.matched.factor:.3g}: {self.gap()} nats/token"
        )

    def _places(self, domains: Sequence[str] | None) -> np.ndarray:
        keep = [domains is None or domain in domains for domain in self.domains]
        if not any(keep):
            raise KeyError(f"no pairs of {domains}; the domains are {sorted(set(self.domains))}")
        return np.flatnonzero(keep)

    def _mean(self, values: np.ndarray) -> Interval:
        return bootstrap_mean(values, seed=self.matched.seed, level=self.level)

    def _gap_of(self, inside: np.ndarray | None, outside: np.ndarray) -> float:
        factor = self.matched.rematched(inside)
        if not np.isfinite(factor):
            return float("nan")
        curve = self.scaled[:, outside].mean(1)
        return float(self.own[outside].mean()) - read_at(self.factors, curve, factor)


def gap_over(found: Sequence[Confinement], domains: Sequence[str] | None = None) -> Interval:
    """The mean gap of several trainings on the same pairs; trainings are resampled as well.

    Raises:
        ValueError: If their pairs differ.
    """
    first = found[0]
    if any((one.ids, one.matched.ids) != (first.ids, first.matched.ids) for one in found):
        raise ValueError("these were measured on different pairs, so they have no mean gap")
    places = first._places(domains)

    def gap(trainings: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> float:
        each = {i: found[i]._gap_of(inside, places[outside]) for i in set(trainings.tolist())}
        return float(np.mean([each[i] for i in trainings.tolist()]))

    sizes = len(found), len(first.matched.ids), len(places)
    whole = gap(*(np.arange(n) for n in sizes))
    if min(sizes[1:]) < 2:
        return Interval(whole)
    matched = first.matched
    return resampled(gap, *sizes, whole=whole, seed=matched.seed, level=matched.level)


@guarded
def confinement(
    model: HookedModel,
    inside: Sequence[Pair],
    outside: Sequence[Pair],
    condition: ConditionLike,
    like: ConditionLike,
    *,
    tolerance: float = 0.01,
    system: str | None = None,
    seed: int = 0,
    **options: Unpack[BatchOptions],
) -> Confinement:
    """Compare a narrow solution outside with a general one that is as strong inside.

    The general one is scaled until it changes the log-odds inside as much as the narrow one does
    (`match_strength`), and is run outside at that strength.

    Args:
        model: The model.
        inside: Held-out pairs of the narrow domain.
        outside: Pairs of other domains.
        condition: The solution that is scaled: the general one.
        like: The solution that it is compared with, unscaled: the narrow one.
        tolerance: See `match_strength`.
        system: A system message for every prompt.
        seed: Seed of the bootstrap.
        **options: See `BatchOptions`.

    Returns:
        Both effects outside, and their difference (`.gap()`) with an interval that includes
        the uncertainty of the strength.

    Raises:
        ValueError: As `match_strength`.

    Source:
        arXiv 2602.07852, section 3: whether the narrow solution stays in its domain.

    Examples:
        >>> found = emlens.measures.confinement(model, finance, elsewhere, "general", "narrow")
        >>> found.gap()
    """
    how = {"system": system, "seed": seed, **options}
    matched = match_strength(model, inside, condition, like, tolerance=tolerance, **how)
    solution = condition_from(matched.solution)
    ends = matched.strength()
    known = np.asarray(matched.factors)
    low, high = (x if np.isfinite(x) else matched.factor for x in (ends.low, ends.high))
    chosen = {0.0, matched.factor, *known[(known >= low) & (known <= high)].tolist()}
    chosen |= {float(known[np.argmin(np.abs(known - end))]) for end in (low, high)}
    factors = tuple(sorted(chosen))
    conditions: dict[str, Condition] = {BASE: without(solution)}
    conditions |= {repr(x): times(solution, x) for x in factors if x}
    conditions["like"] = condition_of(model, like)
    scores = log_odds(model, outside, conditions, **how)
    base = scores.of(BASE)
    return Confinement(
        matched=matched,
        ids=scores.ids,
        domains=scores.domains,
        factors=factors,
        scaled=np.stack([scores.of(repr(x) if x else BASE) - base for x in factors]),
        own=scores.of("like") - base,
        acting=scores.acting,
    )
