"""Weight noise: how much of a solution's gain is left when the weights themselves are disturbed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Unpack

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from emlens._arguments import NOT_NEGATIVE
from emlens._door import guarded
from emlens._results import Result
from emlens._stats import Interval, mean_over_seeds
from emlens.directions import Directions
from emlens.hooked import BASE, HookedModel, ReadOptions
from emlens.hooked.lora_scaling import noisy_weights
from emlens.hooked.options import ReadSettings
from emlens.measures.doses import checked_grid, place_on
from emlens.measures.scoring import row_losses
from emlens.measures.solutions import acting_of, construction_of, read_solutions
from emlens.text import Conversation, warn_of_repeats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class WeightNoise(Result):
    """Losses of the base model and of solutions on it, under the same noise on the weights.

    Attributes:
        directions: Names of the solutions: vectors or adapters.
        constructions: How each was made.
        epsilons: Norm of the noise as a share of the norm of each weight matrix, `[m]`.
        seeds: Noise seeds.
        base_loss: Loss of the undisturbed model without any solution, nats per token.
        losses: Loss of each solution on the undisturbed model, nats per token.
        base: Loss of the disturbed model without any solution, `[m, seeds]`.
        disturbed: Loss of each solution on the disturbed model, `[directions, m, seeds]`.
        acting: The adapters and edits that acted under each solution and under `"base"`, in words.
    """

    AXES = {
        "base": "epsilons seeds",
        "constructions": "directions",
        "losses": "directions",
        "disturbed": "directions epsilons seeds",
    }

    directions: tuple[str, ...]
    constructions: dict[str, str]
    epsilons: tuple[float, ...]
    seeds: tuple[int, ...]
    base_loss: float
    losses: dict[str, float]
    base: tuple[tuple[float, ...], ...]
    disturbed: tuple[tuple[tuple[float, ...], ...], ...]
    acting: dict[str, str] = field(default_factory=dict)

    def _verify(self) -> None:
        checked_grid(self.epsilons, "epsilons")

    def gain(self, direction: str) -> float:
        """How much a solution lowers the loss of the undisturbed model, nats per token."""
        self._check(direction)
        return self.base_loss - self.losses[direction]

    def lost(self, direction: str) -> np.ndarray:
        """Share of the gain that is lost under the noise, in percent, `[epsilons, seeds]`.

        The gain under noise is that over the base model with the same noise, so that what the
        noise does to the model by itself is left out. NaN where there is no gain to lose.
        """
        gain = self.gain(direction)
        disturbed = np.asarray(self.disturbed[self.directions.index(direction)])
        left = np.asarray(self.base) - disturbed
        return 100 * (1 - left / (gain if gain > 0 else float("nan")))

    def mean_lost(self, direction: str, epsilon: float) -> Interval:
        """Mean over seeds of the share of the gain that is lost, percent, with t interval."""
        return mean_over_seeds(self.lost(direction)[self._place(epsilon)])

    def difference(self, first: str, second: str, epsilon: float) -> Interval:
        """Difference of the lost shares in percent, `first - second`, paired by seed."""
        place = self._place(epsilon)
        return mean_over_seeds(self.lost(first)[place] - self.lost(second)[place])

    def table(self) -> pd.DataFrame:
        """One row per solution and noise level."""
        rows = []
        for name in self.directions:
            for place, epsilon in enumerate(self.epsilons):
                mean = self.mean_lost(name, epsilon)
                of_name = self.disturbed[self.directions.index(name)]
                rows.append(
                    {
                        "direction": name,
                        "epsilon": epsilon,
                        "gain lost [%]": mean.estimate,
                        "low": mean.low,
                        "high": mean.high,
                        "loss [nats/token]": float(np.mean(of_name[place])),
                        "base loss [nats/token]": float(np.mean(self.base[place])),
                        "seeds": len(self.seeds),
                        "gain lost at 100% [nats/token]": self.gain(name),
                        "acting": self.acting.get(name, ""),
                    }
                )
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Share of the gain that is lost against the noise level, with bands over seeds."""
        from emlens.figures import line_bands

        curves = {}
        for name, part in self.table().groupby("direction", sort=False):
            y, low, high = (part[c].to_numpy() for c in ("gain lost [%]", "low", "high"))
            curves[str(name)] = (np.asarray(self.epsilons), y, low, high)
        return line_bands(
            curves,
            x_label="noise on the weights [share of the norm of each matrix]",
            y_label="gain lost [%]",
            reference=(50, "half of the gain"),
            ax=ax,
        )

    def _check(self, direction: str) -> None:
        if direction not in self.directions:
            raise KeyError(f"no direction {direction!r}; there are {', '.join(self.directions)}")

    def _place(self, epsilon: float) -> int:
        return place_on(self.epsilons, epsilon, "epsilon")


@guarded(epsilons=NOT_NEGATIVE)
def weight_noise(
    model: HookedModel,
    conversations: Sequence[Conversation],
    directions: Mapping[str, Directions | str],
    *,
    epsilons: Sequence[float] = LEVELS,
    seeds: int = 3,
    seed: int = 0,
    **options: Unpack[ReadOptions],
) -> WeightNoise:
    """Add noise to the weights of the blocks, and return what is left of each solution's gain.

    Each weight matrix `W` of every block becomes `W + eps ||W||_F Z`, `Z` Gaussian of norm 1; the
    base model and all solutions meet the same noise. The solutions themselves are left alone.
    The weights are put back bit by bit; their originals take main memory of the size of the
    blocks meanwhile. Nothing else may use the model while this runs.

    Args:
        model: The model.
        conversations: Finetuning data.
        directions: Solutions by name: a direction, directions of several layers, or the name of
            an adapter on the model.
        epsilons: Norm of the noise as a share of the norm of each matrix.
        seeds: Number of noise draws.
        seed: First noise seed.
        **options: See `ReadOptions`.

    Raises:
        ValueError: If there are no solutions, one does not fit the model, an epsilon is negative
            or not finite, there are no seeds, or weights are quantised or offloaded.
        TypeError: If something is neither directions nor the name of an adapter.
    """
    solutions = read_solutions(model, directions)
    levels = checked_grid(epsilons, "epsilons")
    draws = tuple(range(seed, seed + seeds))
    warn_of_repeats(conversations, "conversations")
    reading = ReadSettings(**options)
    batches = model.batches(conversations, token_budget=reading.token_budget)

    def losses() -> dict[str, float]:
        conditions = {BASE: [], **solutions}
        sums, counts = row_losses(
            model, batches, conditions, tokens=reading.tokens, description="weight noise"
        )
        return {name: float(values.sum() / counts.sum()) for name, values in sums.items()}

    untouched = losses()
    found: dict[tuple[float, int], dict[str, float]] = {}
    points = [(level, draw) for level in levels for draw in draws]
    for level, draw in tqdm(points, desc="weight noise", disable=reading.quiet):
        with noisy_weights(model, level, draw):
            found[level, draw] = losses()

    def of(name: str) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(found[level, draw][name] for draw in draws) for level in levels)

    return WeightNoise(
        directions=tuple(solutions),
        constructions={name: construction_of(one) for name, one in solutions.items()},
        epsilons=tuple(levels),
        seeds=draws,
        base_loss=untouched[BASE],
        losses={name: untouched[name] for name in solutions},
        base=of(BASE),
        disturbed=tuple(of(name) for name in solutions),
        acting=acting_of(model, solutions),
    )
