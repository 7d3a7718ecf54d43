"""Stability: how much of a solution survives norm-preserving noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from emlens._results import Result
from emlens._stats import Interval, mean_over_seeds
from emlens.directions import Direction
from emlens.edits import Add
from emlens.hooked import Edit, HookedModel
from emlens.measures.grids import named
from emlens.measures.scoring import row_losses
from emlens.text import Conversation, TokenMask

EPSILONS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Stability(Result):
    """Loss under noise, and its relative increase: 0% untouched, 100% back at the base model.

    Attributes:
        directions: Names of the directions.
        constructions: How each was made.
        norms: Norm of each, which the noise preserves.
        epsilons: Noise levels, `[m]`.
        seeds: Noise seeds, the same for every direction.
        base_loss: Loss of the model without any direction, nats per token.
        losses: Loss of each direction untouched, nats per token.
        perturbed: `[directions, m, seeds]`, nats per token.
    """

    directions: tuple[str, ...]
    constructions: dict[str, str]
    norms: dict[str, float]
    epsilons: tuple[float, ...]
    seeds: tuple[int, ...]
    base_loss: float
    losses: dict[str, float]
    perturbed: tuple[tuple[tuple[float, ...], ...], ...]

    def gain(self, direction: str) -> float:
        """How much the untouched direction lowers the loss, nats per token."""
        return self.base_loss - self.losses[direction]

    def increase(self, direction: str) -> np.ndarray:
        """Relative loss increase in percent, `[epsilons, seeds]`.

        `100 (L_perturbed - L_direction) / (L_base - L_direction)`; NaN where the direction does
        not lower the loss, so that there is nothing to lose.
        """
        perturbed = np.asarray(self.perturbed[self.directions.index(direction)])
        gain = self.gain(direction)
        return 100 * (perturbed - self.losses[direction]) / (gain if gain > 0 else float("nan"))

    def mean_increase(self, direction: str, epsilon: float) -> Interval:
        """Mean increase in percent over seeds, with its t interval."""
        return mean_over_seeds(self.increase(direction)[self._place(epsilon)])

    def difference(self, first: str, second: str, epsilon: float) -> Interval:
        """Difference of the increases in percent, paired by seed."""
        place = self._place(epsilon)
        return mean_over_seeds(self.increase(first)[place] - self.increase(second)[place])

    def table(self) -> pd.DataFrame:
        """One row per direction and noise level."""
        rows = []
        for name in self.directions:
            for epsilon in self.epsilons:
                mean = self.mean_increase(name, epsilon)
                rows.append(
                    {
                        "direction": name,
                        "epsilon": epsilon,
                        "loss increase [%]": mean.estimate,
                        "low": mean.low,
                        "high": mean.high,
                        "seeds": len(self.seeds),
                        "gain lost at 100% [nats/token]": self.gain(name),
                    }
                )
        return pd.DataFrame(rows)

    def plot(self, ax=None):
        """Relative loss increase against the noise level, with bands over seeds."""
        from emlens.figures import line_bands

        curves = {}
        for name, part in self.table().groupby("direction", sort=False):
            y, low, high = (part[c].to_numpy() for c in ("loss increase [%]", "low", "high"))
            curves[str(name)] = (np.asarray(self.epsilons), y, low, high)
        return line_bands(
            curves,
            x_label="noise level epsilon (norm kept)",
            y_label="loss increase [% of the gain]",
            ax=ax,
        )

    def _place(self, epsilon: float) -> int:
        return int(np.argmin(np.abs(np.asarray(self.epsilons) - epsilon)))


def stability(
    model: HookedModel,
    conversations: Sequence[Conversation],
    directions: Mapping[str, Direction],
    *,
    epsilons: Sequence[float] = EPSILONS,
    seeds: int = 3,
    tokens: TokenMask = "response",
    token_budget: int = 2048,
    seed: int = 0,
    progress: bool = False,
) -> Stability:
    """Perturb each direction, its norm kept, and return what that does to its loss.

    `x' = sqrt(1 - eps^2) x + eps y`, `y` random, orthogonal to `x`, of equal norm
    (arXiv 2602.07852, Fig. 4). All directions meet the same noise, seed by seed.

    Args:
        model: The model.
        conversations: Finetuning data.
        directions: Named directions.
        epsilons: Noise levels between 0 and 1.
        seeds: Number of noise draws.
        tokens: Tokens that count.
        token_budget: Padded tokens of a batch.
        seed: First noise seed.
        progress: Show a progress bar.

    Raises:
        ValueError: If there are no directions, one is zero, or an epsilon is outside of 0..1.
    """
    named(directions)
    if any(not 0 <= epsilon <= 1 for epsilon in epsilons):
        raise ValueError(f"epsilons must lie between 0 and 1; got {tuple(epsilons)}")
    draws = tuple(range(seed, seed + seeds))
    conditions: dict[str, list[Edit]] = {"base": []}
    for name, direction in directions.items():
        conditions[name] = [Add(direction)]
        for epsilon in epsilons:
            for draw in draws:
                noisy = perturbed(direction, epsilon, draw)
                conditions[f"{name} {epsilon} {draw}"] = [Add(noisy)]
    batches = model.batches(conversations, token_budget=token_budget)
    sums, counts = row_losses(
        model, batches, conditions, tokens=tokens, progress=progress, description="stability"
    )
    loss = {name: float(sums[name].sum() / counts.sum()) for name in conditions}
    return Stability(
        directions=tuple(directions),
        constructions={name: d.provenance.construction for name, d in directions.items()},
        norms={name: d.norm for name, d in directions.items()},
        epsilons=tuple(float(epsilon) for epsilon in epsilons),
        seeds=draws,
        base_loss=loss["base"],
        losses={name: loss[name] for name in directions},
        perturbed=tuple(
            tuple(tuple(loss[f"{name} {e} {draw}"] for draw in draws) for e in epsilons)
            for name in directions
        ),
    )


def perturbed(direction: Direction, epsilon: float, seed: int) -> Direction:
    """Return `sqrt(1 - eps^2) x + eps y` with `y` random, orthogonal to `x`, of equal norm."""
    x = direction.vector.double()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(x), generator=generator, dtype=torch.float64)
    noise = noise - (noise @ x) / (x @ x) * x
    noise = noise / noise.norm() * x.norm()
    mixed = (1 - epsilon**2) ** 0.5 * x + epsilon * noise
    return Direction(
        {direction.layer: mixed},
        direction.site,
        direction.provenance.derived(
            f"{direction.provenance.construction}, noise {epsilon:g}, seed {seed}"
        ),
        residual_norms=direction.residual_norms,
    )
