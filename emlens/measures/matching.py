"""Matched strength: the factor on a condition at which its effect equals that of another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pandas as pd
from jaxtyping import Float

from emlens._door import guarded
from emlens._kinds import kind
from emlens._results import Result
from emlens._stats import Interval, bootstrap_ratio, bootstrap_statistic, tails
from emlens.hooked import BatchOptions, Condition, HookedModel, ReadOptions
from emlens.hooked.condition import BASE, ConditionLike, condition_of
from emlens.hooked.options import ReadSettings
from emlens.measures.displacement import ROUNDS, nearest, next_factor
from emlens.measures.log_odds import log_odds
from emlens.measures.scoring import row_influence
from emlens.measures.solutions import (
    condition_from,
    record_of,
    scalable,
    times,
    without,
)
from emlens.text import Conversation, Pair
from emlens.text.repeats import warn_of_repeats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST = 16.0
"""Largest factor that is tried."""
FIRST = (0.5, 1.0)
"""Factors that are measured at once; they show the shape of the curve."""

Run = Callable[[dict[str, ConditionLike]], dict[str, np.ndarray]]
"""Runs conditions and returns the effect of each per unit, summed over its tokens, `[n]`."""

kind(ConditionLike | float, words="a condition or a number")(lambda _, given: given)


class UnmatchedError(ValueError):
    """No strength has the requested effect."""


class MatchedStrength(Result):
    """The factor at which a condition has the effect of another, and the curve it was read from.

    Effects are sums per unit; the effect as a whole is their sum over that of the counts.
    Intervals resample the units: the target and the curve move together, and the factor is read
    again from each.

    Attributes:
        effect: What is matched: `"change of log-odds"` or `"KL"`.
        solution: What is scaled, as a record.
        like: What it is matched to, in words.
        ids: Names of the pairs or conversations, `[n]`.
        counts: Tokens of each, `[n]`; 1 for a pair.
        factors: Factors that were measured, ascending, including 0.
        effects: Effect at each, nats, `[factors, n]`.
        target: Effect of what it is matched to, nats, `[n]`.
        factor: The measured factor whose effect is nearest to the target.
        seed: Seed of the bootstrap.
        acting: What acted, in words: without the condition, under it, and under `like`.
    """

    effect: str
    solution: dict
    like: str
    ids: tuple[str, ...]
    counts: Float[np.ndarray, " ids"]
    factors: tuple[float, ...]
    effects: Float[np.ndarray, "factors ids"]
    target: Float[np.ndarray, " ids"]
    factor: float
    seed: int = 0
    acting: dict[str, str] = field(default_factory=dict)

    def _verify(self) -> None:
        if list(self.factors) != sorted(set(self.factors)) or self.factor not in self.factors:
            raise ValueError("factors must ascend without repeats, and include factor")

    @property
    def condition(self) -> Condition:
        """The condition at the matched strength."""
        return times(condition_from(self.solution), self.factor)

    @property
    def slope(self) -> float:
        """Derivative of the effect by the factor at the matched strength, nats per token."""
        curve, place = self._curve(), self.factors.index(self.factor)
        ends = [max(place - 1, 0), min(place + 1, len(curve) - 1)]
        x, y = np.asarray(self.factors)[ends], curve[ends]
        return float((y[1] - y[0]) / (x[1] - x[0]))

    def rematched(self, places: Sequence[int] | np.ndarray | None = None) -> float:
        """The factor read from the curve of some of the units, or of all.

        Args:
            places: Places of the units, drawn with replacement for a bootstrap.

        Returns:
            The factor, interpolated between those that were measured, or continued beyond them
            with the slope at the end; NaN if the curve does not reach the target.
        """
        chosen = slice(None) if places is None else np.asarray(places)
        total = self.counts[chosen].sum()
        if total <= 0:
            return float("nan")
        target = float(self.target[chosen].sum() / total)
        return read_off(self.factors, self._curve(chosen), target, self.factor)

    def strength(self) -> Interval:
        """The factor with its interval over units; no interval if resamples often have no match."""
        whole = self.rematched()
        if len(self.ids) < 2:
            return Interval(whole)
        how = {"seed": self.seed, "level": self.level}
        return resampled(self.rematched, len(self.ids), whole=whole, **how)

    def table(self) -> pd.DataFrame:
        """One row per factor that was measured, and one for the target."""
        rows = [
            {
                "factor": factor,
                "matched": factor == self.factor,
                **self._interval(values).columns(f"{self.effect} [nats/token]"),
            }
            for factor, values in zip(self.factors, self.effects, strict=True)
        ]
        target = self._interval(self.target).columns(f"{self.effect} [nats/token]")
        rows.append({"factor": None, "matched": False, **target})
        names = ["the condition scaled"] * len(self.factors) + [self.like]
        return pd.DataFrame(rows).assign(of=names)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Effect against the factor with bands over units, and the target."""
        from emlens.figures.lines import line_bands

        ends = [self._interval(values) for values in self.effects]
        curve = [[getattr(one, end) for one in ends] for end in ("estimate", "low", "high")]
        return line_bands(
            {"the condition scaled": (np.asarray(self.factors), *map(np.asarray, curve))},
            x_label="factor on the condition",
            y_label=f"{self.effect} [nats/token]",
            reference=(float(self.target.sum() / self.counts.sum()), self.like),
            ax=ax,
        )

    def _said(self) -> str:
        goal = self._interval(self.target).estimate
        return f"factor {self.strength():.3g} has the {self.effect} of {self.like}, {goal:+.3g}"

    def _curve(self, places: Any = slice(None)) -> np.ndarray:
        return self.effects[:, places].sum(1) / self.counts[places].sum()

    def _interval(self, values: np.ndarray) -> Interval:
        return bootstrap_ratio(values, self.counts, seed=self.seed, level=self.level)


@guarded
def match_strength(
    model: HookedModel,
    pairs: Sequence[Pair],
    condition: ConditionLike,
    like: ConditionLike | float,
    *,
    tolerance: float = 0.01,
    system: str | None = None,
    seed: int = 0,
    **options: Unpack[BatchOptions],
) -> MatchedStrength:
    """Find the factor at which a condition changes log-odds as much as another one.

    The condition is run at a few factors, bracketed and interpolated, until its effect is within
    the tolerance of the target. The factors at the ends of the interval are run as well, so that
    resampling interpolates a measured curve.

    Args:
        model: The model.
        pairs: Pairs on which the effects are matched, such as those of the narrow domain.
        condition: What is scaled: its vectors (`Add`), or its adapters where it has none.
        like: What it is matched to: another condition, or a change in nats per token.
        tolerance: Largest difference from the target, as a share of the effect at factor 1.
        system: A system message for every prompt.
        seed: Seed of the bootstrap over pairs.
        **options: See `BatchOptions`.

    Returns:
        The matched strength; `.condition` is the scaled condition.

    Raises:
        ValueError: If there are no pairs, the condition has no strength or no effect, the target
            is out of reach, or the effect does not grow with the strength.

    Source:
        arXiv 2602.07852 compares solutions at equal size; here the effects are equal.

    Examples:
        >>> found = emlens.measures.match_strength(model, pairs, "general", "narrow")
        >>> emlens.log_odds(model, elsewhere, {"base": None, "weaker": found.condition})
    """
    solution = scalable(model, condition)
    warn_of_repeats(pairs, "pairs")
    rest = without(solution)

    def run(conditions: dict[str, ConditionLike]) -> dict[str, np.ndarray]:
        scores = log_odds(model, pairs, {BASE: rest, **conditions}, system=system, **options)
        return {name: scores.of(name) - scores.of(BASE) for name in conditions}

    found = Search(model, "change of log-odds", solution, like, tolerance, np.ones(len(pairs)), run)
    return found.result(tuple(pair.id for pair in pairs), seed)


@guarded
def match_kl(
    model: HookedModel,
    conversations: Sequence[Conversation],
    condition: ConditionLike,
    like: ConditionLike | float,
    *,
    tolerance: float = 0.01,
    seed: int = 0,
    **options: Unpack[ReadOptions],
) -> MatchedStrength:
    """Find the factor at which a condition has the KL from the base that another one has.

    Args:
        model: The model.
        conversations: Conversations on which the KL is matched.
        condition: What is scaled: its vectors (`Add`), or its adapters where it has none.
        like: What it is matched to: another condition, or a KL in nats per token.
        tolerance: Largest difference from the target, as a share of the KL at factor 1.
        seed: Seed of the bootstrap over conversations.
        **options: See `ReadOptions`.

    Returns:
        The matched strength; `.condition` is the scaled condition.

    Raises:
        ValueError: As `match_strength`.

    Examples:
        >>> chance = emlens.training.random_adapter(model, "general")
        >>> equal = emlens.measures.match_kl(model, conversations, chance, "general").condition
    """
    solution = scalable(model, condition)
    warn_of_repeats(conversations, "conversations")
    reading = ReadSettings(**options)
    batches = model.batches(conversations, token_budget=reading.token_budget)
    rest, counts = without(solution), np.zeros(len(conversations))

    def run(conditions: dict[str, ConditionLike]) -> dict[str, np.ndarray]:
        with model.under(rest):
            _, kl, _, tokens = row_influence(
                model, batches, conditions, tokens=reading.tokens, progress=reading.progress
            )
        counts[:] = tokens
        return kl

    found = Search(model, "KL", solution, like, tolerance, counts, run)
    names = tuple(one.id or str(i) for i, one in enumerate(conversations))
    return found.result(names, seed)


def resampled(
    statistic: Callable[..., float], *sizes: int, whole: float, seed: int, level: float
) -> Interval:
    """Bootstrap interval of what is read at a matched strength.

    It has no ends where more resamples have no match than an end of the interval may leave out:
    the strength is not known well enough then.
    """
    missing = 0

    def counted(*places: np.ndarray) -> float:
        nonlocal missing
        value = statistic(*places)
        missing += not np.isfinite(value)
        return value

    draws = 2000
    found = bootstrap_statistic(
        counted, *sizes, estimate=whole, seed=seed, resamples=draws, level=level
    )
    return Interval(whole) if missing > tails(level)[0] * draws else found


def read_at(x: Sequence[float], y: np.ndarray, at: float) -> float:
    """A curve at a place, linear between its points and beyond them."""
    place = int(np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2))
    share = (at - x[place]) / (x[place + 1] - x[place])
    return float(y[place] + share * (y[place + 1] - y[place]))


def read_off(x: Sequence[float], y: np.ndarray, target: float, near: float) -> float:
    """Where a curve has a value: the crossing nearest to a place, else beyond the nearer end."""
    off = y - target
    crossed = (off[:-1] * off[1:] <= 0) & (off[:-1] != off[1:])
    if crossed.any():
        start, width = np.asarray(x)[:-1][crossed], np.diff(x)[crossed]
        at = start - off[:-1][crossed] * width / np.diff(off)[crossed]
        return float(at[np.argmin(np.abs(at - near))])
    first = abs(off[0]) <= abs(off[-1])
    a, b = (0, 1) if first else (-2, -1)
    slope = (y[b] - y[a]) / (x[b] - x[a])
    if slope == 0:
        return float("nan")
    end = 0 if first else -1
    at = float(x[end] - off[end] / slope)
    outward = at < x[0] if first else at > x[-1]
    return at if outward else float("nan")


class Search:
    """The search for one matched strength.

    Args:
        model: The model.
        effect: What is matched.
        solution: What is scaled.
        like: What it is matched to.
        tolerance: Share of the effect at factor 1.
        counts: Tokens of each unit; complete once something was run.
        run: Runs conditions.
    """

    def __init__(
        self,
        model: HookedModel,
        effect: str,
        solution: Condition,
        like: ConditionLike | float,
        tolerance: float,
        counts: np.ndarray,
        run: Run,
    ) -> None:
        self._model, self._effect, self._solution = model, effect, solution
        self._counts, self._run = counts, run
        self._like: Condition | None = None
        self._words = f"{like:+g}" if isinstance(like, (int, float)) else ""
        if not isinstance(like, (int, float)):
            self._like = condition_of(model, like)
            self._words = self._like.described(model)
        self._at = {0.0: np.zeros(len(counts))}
        found = self._measure(FIRST, {} if self._like is None else {"like": self._like})
        self.target = like * counts if isinstance(like, (int, float)) else found["like"]
        own = self._mean(self._at[1.0])
        if own == 0:
            raise UnmatchedError(
                f"{solution} has no effect: its {effect} is 0 here, so no strength can be matched"
            )
        self._sign = float(np.sign(own))
        self._allowed = tolerance * abs(own)
        self._close_in()

    def result(self, ids: tuple[str, ...], seed: int) -> MatchedStrength:
        """What was found, the factors at the ends of the interval measured as well."""
        made = self._made(ids, seed)
        ends = made.strength()
        wanted = [x for x in (ends.low, ends.high) if np.isfinite(x) and abs(x) <= LARGEST]
        close = 0.02 * max(abs(made.factor), 0.05)
        missing = [x for x in wanted if min(abs(x - known) for known in self._at) > close]
        if not missing:
            return made
        self._measure(missing)
        return replace(made, factors=tuple(sorted(self._at)), effects=self._stacked())

    def _made(self, ids: tuple[str, ...], seed: int) -> MatchedStrength:
        said: dict[str, Condition] = {
            BASE: without(self._solution),
            "the condition": self._solution,
        }
        if self._like is not None:
            said["like"] = self._like
        return MatchedStrength(
            effect=self._effect,
            solution=record_of(self._solution),
            like=self._words,
            ids=ids,
            counts=self._counts,
            factors=tuple(sorted(self._at)),
            effects=self._stacked(),
            target=self.target,
            factor=nearest(self._points(), self._goal)[0],
            seed=seed,
            acting={
                name: condition_of(self._model, one).described(self._model)
                for name, one in said.items()
            },
        )

    def _stacked(self) -> np.ndarray:
        return np.stack([self._at[factor] for factor in sorted(self._at)])

    def _measure(
        self, factors: Sequence[float], more: dict[str, ConditionLike] | None = None
    ) -> dict[str, np.ndarray]:
        scaled = {f"times {factor!r}": times(self._solution, factor) for factor in factors}
        found = self._run({**scaled, **(more or {})})
        self._at |= {f: found[name] for f, name in zip(factors, scaled, strict=True)}
        return found

    def _mean(self, values: np.ndarray) -> float:
        return float(values.sum() / self._counts.sum())

    @property
    def _goal(self) -> float:
        return self._sign * self._mean(self.target)

    def _points(self) -> list[tuple[float, float]]:
        """`(factor, effect)`, the effect counted upwards."""
        return [(x, self._sign * self._mean(self._at[x])) for x in sorted(self._at)]

    def _close_in(self) -> None:
        goal = self._goal
        if goal < -self._allowed:
            raise UnmatchedError(
                f"the {self._effect} to match is {self._sign * goal:+.4g} nats/token, and "
                f"{self._solution} has {self._mean(self._at[1.0]):+.4g}, on the other side of "
                "zero: no strength of it has that effect"
            )
        place = 0.0
        for _ in range(ROUNDS):
            points = self._points()
            place, reached = nearest(points, goal)
            self._check_growth([point for point in points if point[0] <= place])
            if abs(reached - goal) <= self._allowed:
                return
            following = next_factor(points, goal)
            most = max(points, key=lambda point: point[1])
            falling = most[1] < goal and points[-1][1] < most[1] - self._allowed
            if falling or following > LARGEST:
                raise UnmatchedError(
                    f"the {self._effect} to match, {self._sign * goal:+.4g} nats/token, is out of "
                    f"reach of {self._solution}: the most is {self._sign * most[1]:+.4g}, at "
                    f"{most[0]:.3g} times its strength ({points[-1][0]:.3g} times was tried)"
                )
            self._measure([following])
        raise UnmatchedError(
            f"the {self._effect} of {self._solution} jumps past {self._sign * goal:+.4g} "
            f"nats/token near {place:.4g} times its strength; give a larger tolerance"
        )

    def _check_growth(self, points: list[tuple[float, float]]) -> None:
        for (low, below), (high, above) in zip(points, points[1:], strict=False):
            if above < below - self._allowed:
                raise UnmatchedError(
                    f"the {self._effect} of {self._solution} does not grow with its strength: "
                    f"{self._sign * below:+.4g} nats/token at {low:.3g} times, "
                    f"{self._sign * above:+.4g} at {high:.3g} times; there is no one strength to "
                    "match"
                )
