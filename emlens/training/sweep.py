"""How narrow the solution gets with the weight of the KL: sweeps, and the weight that suffices."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import exp, log
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from jaxtyping import Float

from emlens._door import guarded
from emlens._progress import bar
from emlens._results import Result
from emlens._stats import Interval, bootstrap_mean, level_in_force
from emlens.hooked import HookedModel
from emlens.hooked.condition import ConditionLike, condition_of
from emlens.measures import log_odds
from emlens.measures.matching import read_at, read_off, resampled
from emlens.measures.solutions import times
from emlens.text import Conversation, Pair
from emlens.training.adapter import train_adapter
from emlens.training.options import SolutionOptions
from emlens.training.run import TrainingRun
from emlens.training.settings import KLPenalty
from emlens.training.vector import train_vector

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

JUMP, CLOSE = 0.5, 2.0
"""A jump: this share of the effect outside is lost between weights of less than this ratio."""

FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25)
"""Strengths at which the solution of the lowest weight is run, as what others are compared with."""


class KLSweep(Result):
    """What each weight of the KL leaves of the effect, inside the domain and outside.

    Attributes:
        weights: Weights on nats per token, ascending; 0 is training without KL.
        inside: Change of log-odds in the domain with its interval, nats per token.
        outside: The same outside.
        beyond: Outside, less the effect of the solution of the lowest weight at the strength that
            has the same effect inside: read between the strengths `FACTORS` that are run, and in
            each resample again. NaN where none of them has that effect.
        kl: KL of the last update, nats per token; None without KL.
        norms: Norm of the solution.
        tolerance: What counts as no effect outside; None for a sweep without one.
        weaker: Effects inside and outside of the solution of the lowest weight at each strength,
            nats per token; empty in files of earlier versions.
    """

    HOLDS_ENDS = True
    AXES = {"kl": "weights", "norms": "weights"}

    weights: tuple[float, ...]
    inside: Float[np.ndarray, "weights 3"]
    outside: Float[np.ndarray, "weights 3"]
    beyond: Float[np.ndarray, "weights 3"]
    kl: tuple[float | None, ...]
    norms: tuple[float, ...]
    tolerance: float | None = None
    weaker: tuple[tuple[float, float], ...] = ()

    @property
    def chosen(self) -> float | None:
        """The smallest weight from which on the effect outside is within the tolerance."""
        if self.tolerance is None:
            return None
        passing = None
        for weight, (estimate, _, _) in zip(self.weights[::-1], self.outside[::-1], strict=True):
            if abs(estimate) > self.tolerance:
                break
            passing = weight
        return passing

    @property
    def turn(self) -> tuple[float, float] | None:
        """The neighbouring weights between which most of the effect outside is lost."""
        losses = -np.diff(np.abs(self.outside[:, 0]))
        if not len(losses) or max(losses) <= 0:
            return None
        place = int(np.argmax(losses))
        return self.weights[place], self.weights[place + 1]

    @property
    def jumps(self) -> bool:
        """Whether narrow turns to general at once: see `JUMP` and `CLOSE`.

        Weights that lie far apart cannot show it; `auto_kl` closes in.
        """
        if self.turn is None or self.turn[0] == 0:
            return False
        low, high = (self.weights.index(weight) for weight in self.turn)
        sizes = np.abs(self.outside[:, 0])
        return (
            bool(sizes[low] - sizes[high] > JUMP * sizes.max())
            and self.turn[1] / self.turn[0] < CLOSE
        )

    def table(self) -> pd.DataFrame:
        """One row per weight, in nats per token."""
        import pandas as pd

        rows = []
        for i, weight in enumerate(self.weights):
            row: dict[str, object] = {"KL weight": weight}
            for name in ("inside", "outside", "beyond"):
                row |= Interval(*getattr(self, name)[i]).columns(f"{name} [nats/token]", f"{name} ")
            rows.append({**row, "KL [nats/token]": self.kl[i], "norm": self.norms[i]})
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The trade-off: effect outside against that inside, one point per weight of the KL.

        The dashed line is the solution of the lowest weight at other strengths.
        """
        from emlens.figures import colour
        from emlens.figures.paths import effect_plane

        return effect_plane(
            self.inside,
            self.outside,
            [f"KL x {weight:g}" if weight else "no KL" for weight in self.weights],
            shades=[colour("narrow" if weight else "general") for weight in self.weights],
            others={"the lowest weight, run weaker": self.weaker} if self.weaker else None,
            ax=ax,
        )

    def __str__(self) -> str:
        said = [f"{len(self.weights)} weights, {self.weights[0]:g} to {self.weights[-1]:g}"]
        if self.tolerance is not None:
            least = "none suffices" if self.chosen is None else f"{self.chosen:.3g} suffices"
            said.append(f"for {self.tolerance:g} nats/token outside {least}")
        if self.turn is not None:
            said.append(f"most is lost between {self.turn[0]:.3g} and {self.turn[1]:.3g}")
            said.append("at once" if self.jumps else "gradually, as far as these weights show")
        return "; ".join(said)


@guarded
def sweep_kl(
    model: HookedModel,
    train: Sequence[Conversation],
    inside: Sequence[Pair],
    outside: Sequence[Pair],
    kl: KLPenalty,
    weights: Sequence[float],
    *,
    layer: int | None = None,
    **options: Unpack[SolutionOptions],
) -> KLSweep:
    """Train once per weight and measure each solution inside and outside of the domain.

    Args:
        model: The model.
        train: Conversations of the narrow domain.
        inside: Held-out pairs of the domain.
        outside: Pairs of other domains.
        kl: The penalty; its weight is replaced.
        weights: Weights on nats per token; 0 trains without KL.
        layer: Train a vector at this layer; None trains an adapter.
        **options: See `SolutionOptions`; `seed` is that of the bootstrap, too.

    Raises:
        ValueError: If there are no weights, one is negative, or as the training and `log_odds`.
    """
    wanted = sorted(set(map(float, weights)))
    if not wanted or wanted[0] < 0:
        raise ValueError(f"weights must be 0 or more, and at least one, not {list(weights)}")
    bench = _Bench(model, train, kl, inside, outside, layer, options)
    shown = options.get("progress", True)
    with bar(wanted, desc="KL weights", unit="training", shown=shown) as each:
        return bench.sweep([bench.measure(weight) for weight in each], None)


@guarded
def auto_kl(
    model: HookedModel,
    train: Sequence[Conversation],
    inside: Sequence[Pair],
    outside: Sequence[Pair],
    kl: KLPenalty,
    *,
    tolerance: float,
    low: float = 0.01,
    high: float = 100.0,
    trials: int = 6,
    layer: int | None = None,
    **options: Unpack[SolutionOptions],
) -> KLSweep:
    """Find the smallest weight whose effect outside is within a tolerance of the base.

    Bisection of the logarithm of the weight, on runs as short as `options` say. Without KL,
    `low` and `high` are tried first; `.chosen` is the weight, `.turn` and `.jumps` say where and
    how narrow turns to general.

    Args:
        model: The model.
        train: Conversations of the narrow domain.
        inside: Held-out pairs of the domain.
        outside: Pairs of other domains.
        kl: The penalty; its weight is replaced.
        tolerance: Largest change of log-odds outside, either way, in nats per token.
        low: Smallest weight to try.
        high: Largest weight to try.
        trials: Halvings between them.
        layer: Train a vector at this layer; None trains an adapter.
        **options: See `SolutionOptions`; `seed` is that of the bootstrap, too.

    Returns:
        All weights tried. `.chosen` is 0 where no penalty is needed, and None where the largest
        weight does not suffice.

    Raises:
        ValueError: If the tolerance or the range is not positive, or as `sweep_kl`.
    """
    if tolerance <= 0 or not 0 < low < high or trials < 1:
        raise ValueError(
            f"auto_kl needs tolerance > 0, 0 < low < high and trials >= 1, not tolerance "
            f"{tolerance}, low {low}, high {high}, trials {trials}"
        )
    bench = _Bench(model, train, kl, inside, outside, layer, options)
    tried = [bench.measure(0.0)]
    if abs(tried[0].outside.estimate) > tolerance:
        tried += [bench.measure(high)]
        if abs(tried[-1].outside.estimate) <= tolerance:
            tried += [bench.measure(low)]
            failing, passing = low, high
            if abs(tried[-1].outside.estimate) <= tolerance:
                trials = 0
            for _ in range(trials):
                middle = exp((log(failing) + log(passing)) / 2)
                tried.append(bench.measure(middle))
                if abs(tried[-1].outside.estimate) <= tolerance:
                    passing = middle
                else:
                    failing = middle
    return bench.sweep(sorted(tried, key=lambda trial: trial.weight), tolerance)


@dataclass(frozen=True)
class _Trial:
    weight: float
    inside: Interval
    outside: Interval
    shifts: tuple[np.ndarray, np.ndarray]
    kl: float | None
    norm: float


@dataclass
class _Bench:
    """What every trial shares."""

    model: HookedModel
    train: Sequence[Conversation]
    kl: KLPenalty
    inside: Sequence[Pair]
    outside: Sequence[Pair]
    layer: int | None
    options: SolutionOptions

    _weaker: list[np.ndarray] | None = None

    @property
    def seed(self) -> int:
        return self.options.get("seed", 0)

    def measure(self, weight: float) -> _Trial:
        """Train with a weight and measure; the first one, the lowest, at all strengths."""
        penalty = replace(self.kl, weight=weight) if weight else None
        with ExitStack() as undo:
            condition, run = self._solve(penalty, undo)
            solution = condition_of(self.model, condition)
            if self._weaker is None:
                self._weaker = self._shifts([times(solution, x) for x in FACTORS])
                shifts = [side[FACTORS.index(1.0)] for side in self._weaker]
            else:
                shifts = [side[0] for side in self._shifts([solution])]
        inside, outside = (bootstrap_mean(shift, seed=self.seed) for shift in shifts)
        last = run.steps[-1]
        return _Trial(weight, inside, outside, (shifts[0], shifts[1]), last.kl, last.norm)

    def _shifts(self, solutions: Sequence[ConditionLike]) -> list[np.ndarray]:
        """Changes of log-odds inside and outside, each `[solutions, pairs]`."""
        # an adapter is trained on the base; a vector in the model as it was brought
        named: dict[str, ConditionLike] = {"base": None if self.layer is None else []}
        named |= {f"solution {i}": one for i, one in enumerate(solutions)}
        with self.model.adapter(*self.model.adapters_in_force):
            both = [log_odds(self.model, p, named) for p in (self.inside, self.outside)]
        return [scores.values[1:] - scores.values[:1] for scores in both]

    def sweep(self, trials: Sequence[_Trial], tolerance: float | None) -> KLSweep:
        assert self._weaker is not None
        inside, outside = (side.mean(1) for side in self._weaker)
        return KLSweep(
            weights=tuple(trial.weight for trial in trials),
            inside=np.array([_triple(trial.inside) for trial in trials]),
            outside=np.array([_triple(trial.outside) for trial in trials]),
            beyond=np.array([_triple(self._beyond(trial, *self._weaker)) for trial in trials]),
            kl=tuple(trial.kl for trial in trials),
            norms=tuple(trial.norm for trial in trials),
            tolerance=tolerance,
            weaker=((0.0, 0.0), *zip(inside.tolist(), outside.tolist(), strict=True)),
        )

    def _beyond(self, trial: _Trial, inside: np.ndarray, outside: np.ndarray) -> Interval:
        factors = (0.0, *FACTORS)

        def gap(here: np.ndarray, elsewhere: np.ndarray) -> float:
            curves = [
                np.concatenate([[0.0], side[:, places].mean(1)])
                for side, places in ((inside, here), (outside, elsewhere))
            ]
            at = read_off(factors, curves[0], float(trial.shifts[0][here].mean()), 1.0)
            if not 0 <= at <= factors[-1]:
                return float("nan")
            return float(trial.shifts[1][elsewhere].mean()) - read_at(factors, curves[1], at)

        sizes = inside.shape[1], outside.shape[1]
        whole = gap(*(np.arange(n) for n in sizes))
        if not np.isfinite(whole) or min(sizes) < 2:
            return Interval(whole)
        return resampled(gap, *sizes, whole=whole, seed=self.seed, level=level_in_force())

    def _solve(self, kl: KLPenalty | None, undo: ExitStack) -> tuple[ConditionLike, TrainingRun]:
        options: dict[str, Any] = {"record_every": None, "progress": False, "seed": self.seed}
        options |= self.options
        if self.layer is not None:
            _, run = train_vector(self.model, self.train, self.layer, kl=kl, **options)
            return run.edits(), run
        name = next(n for i in range(10**6) if (n := f"sweep {i}") not in self.model.adapters)
        run = train_adapter(self.model, self.train, name, kl=kl, **options)
        undo.callback(self.model.remove_adapter, name)
        return name, run


def _triple(interval: Interval) -> tuple[float, float, float]:
    return interval.estimate, interval.low, interval.high
