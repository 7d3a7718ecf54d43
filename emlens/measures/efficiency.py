"""Efficiency: how low a direction brings the finetuning loss, at matched norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from emlens._results import Result
from emlens._stats import Interval, bootstrap_ratio
from emlens.directions import Direction
from emlens.edits import Add
from emlens.hooked import HookedModel
from emlens.measures.grids import dose_of, factors_to_norms, named
from emlens.measures.scoring import row_losses
from emlens.text import Conversation, TokenMask


@dataclass(frozen=True)
class Efficiency(Result):
    """Loss on the finetuning data against the norm of what is added.

    Attributes:
        directions: Names of the directions.
        constructions: How each was made.
        norms: The common grid of norms, `[m]`, units of the residual stream.
        doses: The same as shares of the median residual norm (NaN where that is unknown).
        sums: Summed loss in nats, `[directions, m, conversations]`.
        counts: Counted tokens per conversation.
        own_norms: Norm that each direction came with.
        tokens: Mask of the tokens that counted.
        seed: Seed of the bootstrap over conversations.
    """

    directions: tuple[str, ...]
    constructions: dict[str, str]
    norms: tuple[float, ...]
    doses: tuple[float, ...]
    sums: tuple[tuple[tuple[float, ...], ...], ...]
    counts: tuple[float, ...]
    own_norms: dict[str, float]
    tokens: str = "response"
    seed: int = 0

    def loss(self, direction: str, norm: float) -> Interval:
        """Loss in nats per token at one norm of the grid, with its interval."""
        i, j = self.directions.index(direction), self._place(norm)
        return bootstrap_ratio(self.sums[i][j], self.counts, seed=self.seed)

    def difference(self, first: str, second: str, norm: float) -> Interval:
        """Paired difference of loss, `first - second`, at the same norm, nats per token."""
        a, b, j = self.directions.index(first), self.directions.index(second), self._place(norm)
        gap = np.asarray(self.sums[a][j]) - np.asarray(self.sums[b][j])
        return bootstrap_ratio(gap, self.counts, seed=self.seed)

    def table(self) -> pd.DataFrame:
        """One row per direction and norm.

        `loss / norm^2` is the ratio of arXiv 2602.07852 (Fig. 4a); it falls with the norm by
        itself, so it says something only between directions at the same norm.
        """
        rows = []
        for name in self.directions:
            for norm, dose in zip(self.norms, self.doses, strict=True):
                loss = self.loss(name, norm)
                rows.append(
                    {
                        "direction": name,
                        "norm": norm,
                        "dose": dose,
                        "loss [nats/token]": loss.estimate,
                        "low": loss.low,
                        "high": loss.high,
                        "loss / norm^2": loss.estimate / norm**2 if norm else float("nan"),
                    }
                )
        return pd.DataFrame(rows)

    def plot(self, ax=None):
        """Loss against dose (norm, where doses are unknown), with bands."""
        from emlens.figures import line_bands

        known = not np.isnan(self.doses).any()
        x = np.asarray(self.doses if known else self.norms)
        frame = self.table()
        curves = {}
        for name, part in frame.groupby("direction", sort=False):
            y, low, high = (part[c].to_numpy() for c in ("loss [nats/token]", "low", "high"))
            curves[str(name)] = (x, y, low, high)
        unit = "dose [share of median residual norm]" if known else "norm of what is added"
        return line_bands(
            curves, x_label=unit, y_label="loss on finetuning data [nats/token]", ax=ax
        )

    def _place(self, norm: float) -> int:
        return int(np.argmin(np.abs(np.asarray(self.norms) - norm)))


def efficiency(
    model: HookedModel,
    conversations: Sequence[Conversation],
    directions: Mapping[str, Direction],
    *,
    norms: Sequence[float] | None = None,
    factors: Sequence[float] = tuple(np.linspace(0, 2, 9)),
    tokens: TokenMask = "response",
    token_budget: int = 2048,
    seed: int = 0,
    progress: bool = False,
) -> Efficiency:
    """Return the loss on finetuning data for each direction, rescaled to matched norms.

    Args:
        model: The model.
        conversations: Finetuning data.
        directions: Named directions; all are put on the same grid of norms.
        norms: The grid, units of the residual stream; `factors` times the mean of the
            directions' own norms by default (arXiv 2602.07852 uses 0 to 2 times).
        factors: See `norms`.
        tokens: Tokens that count.
        token_budget: Padded tokens of a batch.
        seed: Seed of the bootstrap over conversations.
        progress: Show a progress bar.

    Raises:
        ValueError: If there is nothing to compare, or a norm is negative.
    """
    named(directions)
    grid = factors_to_norms(directions, factors) if norms is None else [float(n) for n in norms]
    if min(grid) < 0:
        raise ValueError(f"norms must not be negative; got {min(grid):g}")
    conditions = {"base": []} | {
        f"{name} {j}": [Add(direction.scaled_to(norm))]
        for name, direction in directions.items()
        for j, norm in enumerate(grid)
        if norm > 0
    }
    batches = model.batches(conversations, token_budget=token_budget)
    sums, counts = row_losses(
        model, batches, conditions, tokens=tokens, progress=progress, description="efficiency"
    )
    return Efficiency(
        directions=tuple(directions),
        constructions={name: d.provenance.construction for name, d in directions.items()},
        norms=tuple(grid),
        doses=tuple(dose_of(directions, norm) for norm in grid),
        sums=tuple(
            tuple(
                tuple(sums[f"{name} {j}" if norm > 0 else "base"].tolist())
                for j, norm in enumerate(grid)
            )
            for name in directions
        ),
        counts=tuple(counts.tolist()),
        own_norms={name: d.norm for name, d in directions.items()},
        tokens=tokens,
        seed=seed,
    )
