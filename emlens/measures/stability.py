"""Stability: how much of a solution survives norm-preserving noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np
import pandas as pd
from jaxtyping import Float

from emlens._door import guarded
from emlens._stats import Interval
from emlens.directions import Directions
from emlens.hooked import Condition, HookedModel, ReadOptions
from emlens.hooked.condition import BASE
from emlens.hooked.options import ReadSettings
from emlens.measures.measured import UnderNoise
from emlens.measures.scoring import row_losses
from emlens.measures.solutions import (
    Axes,
    acting_of,
    angle_under_noise,
    construction_of,
    kind_of,
    noisy,
    norm_of,
    perturbed,
    read_solutions,
    shrunk,
)
from emlens.text import Conversation
from emlens.text.repeats import warn_of_repeats

if TYPE_CHECKING:
    import matplotlib.axes

__all__ = ["EPSILONS", "Stability", "perturbed", "stability"]

ADDED = "added"
EPSILONS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)

Noise = Literal["random", "added"] | Axes | Mapping[str, Directions]
"""`"random"`, `"added"`, or directions that span what the noise is drawn from."""


def _none() -> np.ndarray:
    return np.zeros((0, 0))


class Stability(UnderNoise):
    """Loss under noise, and its relative increase: 0% without noise, 100% at the base model.

    Attributes:
        directions: Names of the solutions: vectors or adapters.
        constructions: How each was made.
        norms: Norm of each. The noise preserves it (for an adapter those of `A` and `B`) unless it
            is added.
        epsilons: Noise levels, `[m]`.
        seeds: Noise seeds, the same for every solution.
        base_loss: Loss of the model without any solution, nats per token.
        losses: Loss of each solution without noise, nats per token.
        perturbed: `[directions, m, seeds]`, nats per token.
        kinds: `"vector"` or `"adapter"`, per solution; a vector if not given.
        noise: What the noise was drawn from; `"added"` where it did not shrink the solution.
        shrunk: Loss of the solution shrunk as under noise, without the noise, `[directions, m]`,
            nats per token; none where the noise was added.
        angles: Angle between the solution and the noisy one, degrees, mean over seeds,
            `[directions, m]`: for vectors in the residual stream, for an adapter that of `B A` in
            the weights. The same epsilon rotates an adapter further, since it rotates both `A`
            and `B`.
        acting: The adapters and edits that acted under each solution and under `"base"`, in words.
    """

    AXES = {"norms": "directions", "kinds": "directions"}

    norms: dict[str, float]
    perturbed: Float[np.ndarray, "directions epsilons seeds"]
    kinds: dict[str, str] = field(default_factory=dict)
    noise: str = "random"
    shrunk: Float[np.ndarray, "directions epsilons"] = field(default_factory=_none)
    angles: Float[np.ndarray, "directions epsilons"] = field(default_factory=_none)
    acting: dict[str, str] = field(default_factory=dict)

    def increase(self, direction: str) -> np.ndarray:
        """Relative loss increase in percent, `[epsilons, seeds]`.

        `100 (L_perturbed - L_direction) / (L_base - L_direction)`; NaN where the solution does
        not lower the loss, so that there is nothing to lose.
        """
        perturbed = self.perturbed[self._index(direction)]
        return 100 * (perturbed - self.losses[direction]) / self._whole(direction)

    def shrinking(self, direction: str) -> np.ndarray:
        """Relative loss increase of shrinking alone, in percent, `[epsilons]`.

        It is the part of `increase` that is not due to the change of direction. Zero if the noise
        was added; NaN if it was not measured, or there is no gain to lose.
        """
        place, gain = self._index(direction), self._whole(direction)
        if self.noise == ADDED:
            return 0 * gain * np.ones(len(self.epsilons))
        if not self.shrunk.size:
            return np.full(len(self.epsilons), np.nan)
        return 100 * (self.shrunk[place] - self.losses[direction]) / gain

    def half_lives(self, direction: str) -> np.ndarray:
        """Lowest noise level at which half of the gain is lost, `[seeds]`.

        Interpolated between the levels, from no loss at level 0; NaN where half is not lost up
        to the highest level, or there is no gain to lose.
        """
        epsilons = np.asarray(self.epsilons)
        order = np.argsort(epsilons)
        levels = np.concatenate([[0.0], epsilons[order]])
        curves = self.increase(direction)[order]
        return np.array([_crossing(levels, np.concatenate([[0.0], y]), 50.0) for y in curves.T])

    def half_life(self, direction: str) -> Interval:
        """Mean over seeds of the noise level at which half of the gain is lost, with t interval.

        NaN if a seed does not lose half of the gain: a mean over the others would be too low.
        `summary` reports how many do not.
        """
        return self._interval(self.half_lives(direction))

    def table(self) -> pd.DataFrame:
        """One row per solution and noise level."""
        more = {"shrinking alone [%]": np.array([self.shrinking(n) for n in self.directions])}
        if self.angles.size:
            more["angle [degrees]"] = self.angles
        return self._table("loss increase [%]", more)

    def summary(self) -> pd.DataFrame:
        """One row per solution: its gain, and the noise level at which half of it is lost."""
        rows = []
        for name in self.directions:
            half = self.half_life(name)
            rows.append(
                {
                    "direction": name,
                    "norm": self.norms[name],
                    "gain [nats/token]": self.gain(name),
                    **half.columns("half lost at epsilon"),
                    "note": self._note(name),
                }
            )
        return pd.DataFrame(rows)

    def plot(
        self, ax: matplotlib.axes.Axes | None = None
    ) -> matplotlib.axes.Axes | list[matplotlib.axes.Axes]:
        """Relative loss increase against the noise level from 0, and differences of solutions.

        The differences are from the first solution, with intervals paired by noise seed. On `ax`
        the increase alone is drawn, with bands over seeds.
        """
        from emlens.figures.lines import paired_curves

        curves, gaps = self._curves("loss increase [%]", "low", "high"), self._gaps()
        return paired_curves(
            {name: _from_zero(curve) for name, curve in curves.items()},
            {name: _from_zero(gap) for name, gap in gaps.items()},
            x_label=f"noise level epsilon ({'added' if self.noise == ADDED else 'norm kept'})",
            y_label="loss increase\n[% of the gain]",
            gap_label=f"difference from {self.directions[0]}\n[percentage points]",
            reference=(50, "half of the gain"),
            bands=True,
            ax=ax,
        )

    def _repr_html_(self) -> str:
        halves = self.summary().to_html(index=False, float_format="%.3f", na_rep="", escape=True)
        return f"{super()._repr_html_()}{halves}"

    def _note(self, direction: str) -> str:
        if self.gain(direction) <= 0:
            return "no gain to lose"
        beyond = int(np.isnan(self.half_lives(direction)).sum())
        if not beyond:
            return ""
        highest = f"beyond the highest level ({max(self.epsilons):g})"
        of = "" if beyond == len(self.seeds) else f" for {beyond} of {len(self.seeds)} seeds"
        return f"{highest}{of}"

    def _units(self, direction: str) -> np.ndarray:
        return self.increase(direction)


@guarded
def stability(
    model: HookedModel,
    conversations: Sequence[Conversation],
    directions: Mapping[str, Directions | str],
    *,
    epsilons: Sequence[float] = EPSILONS,
    seeds: int = 3,
    noise: Noise = "random",
    seed: int = 0,
    **options: Unpack[ReadOptions],
) -> Stability:
    """Perturb each solution with norm-preserving noise, and return its loss.

    `x' = sqrt(1 - eps^2) x + eps y`, `y` random, orthogonal to `x`, of equal norm
    (arXiv 2602.07852, Fig. 4). Vectors of several layers are perturbed layer by layer; for an
    adapter, `A` and `B` of every module are perturbed separately. All solutions get the same
    noise for each seed, as far as their shapes agree.

    The papers' noise also shrinks the solution. The loss of `sqrt(1 - eps^2) x` alone is measured
    beside it, and `noise="added"` takes `x + eps y`.

    Args:
        model: The model.
        conversations: Finetuning data.
        directions: What is perturbed, by name: a direction, directions of several layers, or the
            name of an adapter on the model.
        epsilons: Noise levels between 0 and 1.
        seeds: Number of noise draws.
        noise: `"random"` for all directions of the residual stream; `"added"` for the same
            without shrinking; or directions whose span the noise is drawn from (for vectors),
            e.g. the principal ones of the Fisher profile.
        seed: First noise seed.
        **options: See `ReadOptions`.

    Raises:
        ValueError: If there is nothing to perturb, a direction is zero or of another width, an
            adapter does not exist or is not plain LoRA, an epsilon is outside of 0..1, there are
            no seeds, or the directions of the noise leave none beside the perturbed one.
        TypeError: If something is neither directions nor the name of an adapter.

    Examples:
        >>> solutions = {"general": general, "narrow": narrow}
        >>> found = emlens.stability(model, conversations, solutions, epsilons=[0.4])
        >>> found.difference("narrow", "general", 0.4)
    """
    solutions = read_solutions(model, directions)
    if not len(epsilons) or any(not 0 <= epsilon <= 1 for epsilon in epsilons):
        raise ValueError(f"epsilons must lie between 0 and 1; got {tuple(epsilons)}")
    axes, drawn_from = _axes(noise)
    draws = tuple(range(seed, seed + seeds))
    added = drawn_from == ADDED
    conditions: dict[str | tuple[str, float] | tuple[str, float, int], Condition] = {}
    for name, one in solutions.items():
        conditions[name] = one
        for epsilon in epsilons:
            for draw in draws:
                conditions[name, epsilon, draw] = noisy(one, epsilon, draw, axes, added)
            if not added:
                conditions[name, epsilon] = shrunk(one, epsilon)
    warn_of_repeats(conversations, "conversations")
    reading = ReadSettings(**options)
    batches = model.batches(conversations, token_budget=reading.token_budget)
    sums, counts = row_losses(
        model,
        batches,
        {BASE: [], **conditions},
        tokens=reading.tokens,
        progress=reading.progress,
        description="stability",
    )
    loss = {name: float(sums[name].sum() / counts.sum()) for name in sums}
    return Stability(
        directions=tuple(solutions),
        constructions={name: construction_of(one) for name, one in solutions.items()},
        norms={name: norm_of(model, one) for name, one in solutions.items()},
        epsilons=tuple(float(epsilon) for epsilon in epsilons),
        seeds=draws,
        base_loss=loss[BASE],
        losses={name: loss[name] for name in solutions},
        perturbed=np.array(
            [[[loss[name, e, draw] for draw in draws] for e in epsilons] for name in solutions]
        ),
        kinds={name: kind_of(one) for name, one in solutions.items()},
        noise=drawn_from,
        shrunk=_none()
        if added
        else np.array([[loss[name, e] for e in epsilons] for name in solutions]),
        angles=_angles(model, solutions, conditions, epsilons, draws),
        acting=acting_of(model, solutions),
    )


def _angles(
    model: HookedModel,
    solutions: Mapping[str, Condition],
    conditions: Mapping[Any, Condition],
    epsilons: Sequence[float],
    draws: Sequence[int],
) -> np.ndarray:
    def angle(name: str, epsilon: float) -> float:
        noisy_ones = [conditions[name, epsilon, draw] for draw in draws]
        return float(
            np.mean([angle_under_noise(model, solutions[name], one) for one in noisy_ones])
        )

    return np.array([[angle(name, epsilon) for epsilon in epsilons] for name in solutions])


def _axes(noise: Noise) -> tuple[Axes | None, str]:
    """The directions to draw noise from (None for all), and what they are called."""
    if isinstance(noise, str):
        if noise not in ("random", ADDED):
            raise ValueError(
                f'unknown noise {noise!r}; give "random", "added", or directions to draw it '
                "from; noise on the weights is emlens.measures.weight_noise"
            )
        return None, noise
    names: list[str] = []
    if isinstance(noise, Mapping):
        names, given = list(noise), list(noise.values())
    else:
        given = [noise] if isinstance(noise, Directions) else list(noise)
    for one in given:
        if not isinstance(one, Directions):
            raise TypeError(f"noise is drawn from Directions, not from a {type(one).__name__}")
    names = names or [one.provenance.construction for one in given]
    return given, f"within {', '.join(names)}"


def _from_zero(curve: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """A curve that begins at noise 0, where nothing is lost."""
    known = np.isfinite(curve[1]).any() and 0.0 not in curve[0]
    return tuple(np.concatenate([[0.0], part]) for part in curve) if known else curve


def _crossing(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """Where a curve first reaches a level, linear between its points; NaN where it does not."""
    reached = np.flatnonzero(y >= level)
    if not len(reached):
        return float("nan")
    last = int(reached[0])
    if y[last] == level or last == 0:
        return float(x[last])
    share = (level - y[last - 1]) / (y[last] - y[last - 1])
    return float(x[last - 1] + share * (x[last] - x[last - 1]))
