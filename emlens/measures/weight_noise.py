"""Weight noise: how much of a solution's gain is left under noise on the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Unpack

import numpy as np
import pandas as pd
from jaxtyping import Float

from emlens._arguments import NOT_NEGATIVE
from emlens._door import guarded
from emlens._progress import bar
from emlens.directions import Directions
from emlens.hooked import HookedModel, ReadOptions
from emlens.hooked.condition import BASE
from emlens.hooked.lora_scaling import noisy_weights
from emlens.hooked.options import ReadSettings
from emlens.measures.doses import checked_grid
from emlens.measures.measured import UnderNoise
from emlens.measures.scoring import row_losses
from emlens.measures.solutions import acting_of, construction_of, read_solutions
from emlens.text import Conversation
from emlens.text.repeats import warn_of_repeats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2)


class WeightNoise(UnderNoise):
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

    base: Float[np.ndarray, "epsilons seeds"]
    disturbed: Float[np.ndarray, "directions epsilons seeds"]
    acting: dict[str, str] = field(default_factory=dict)

    def lost(self, direction: str) -> np.ndarray:
        """Share of the gain that is lost under the noise, in percent, `[epsilons, seeds]`.

        The gain under noise is measured against the base model with the same noise, which excludes
        the effect of the noise on the model itself. NaN if there is no gain to lose.
        """
        left = self.base - self.disturbed[self._index(direction)]
        return 100 * (1 - left / self._whole(direction))

    def table(self) -> pd.DataFrame:
        """One row per solution and noise level."""
        losses = {
            "loss [nats/token]": self.disturbed.mean(2),
            "base loss [nats/token]": np.stack([self.base.mean(1)] * len(self.directions)),
        }
        return self._table("gain lost [%]", losses)

    def plot(self, ax: Axes | None = None) -> Axes | list[Axes]:
        """Share of the gain that is lost against the noise level, and differences of solutions.

        The differences are from the first solution, with intervals paired by noise seed. On `ax`
        the shares alone are drawn, with bands over seeds.
        """
        from emlens.figures.lines import paired_curves

        return paired_curves(
            self._curves("gain lost [%]", "low", "high"),
            self._gaps(),
            x_label="noise on the weights [share of the norm of each matrix]",
            y_label="gain lost [%]",
            gap_label=f"difference from {self.directions[0]}\n[percentage points]",
            reference=(50, "half of the gain"),
            ax=ax,
        )

    def _units(self, direction: str) -> np.ndarray:
        return self.lost(direction)


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
    base model and all solutions get the same noise. The solutions themselves are not changed.
    The weights are restored exactly afterwards; a copy of them takes as much main memory as the
    blocks. Nothing else may use the model while this runs.

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

    undisturbed = losses()
    found: dict[tuple[float, int], dict[str, float]] = {}
    points = [(level, draw) for level in levels for draw in draws]
    for level, draw in bar(points, desc="weight noise", shown=reading.progress):
        with noisy_weights(model, level, draw):
            found[level, draw] = losses()

    def of(name: str) -> list[list[float]]:
        return [[found[level, draw][name] for draw in draws] for level in levels]

    return WeightNoise(
        directions=tuple(solutions),
        constructions={name: construction_of(one) for name, one in solutions.items()},
        epsilons=tuple(levels),
        seeds=draws,
        base_loss=undisturbed[BASE],
        losses={name: undisturbed[name] for name in solutions},
        base=np.array(of(BASE)),
        disturbed=np.array([of(name) for name in solutions]),
        acting=acting_of(model, solutions),
    )
