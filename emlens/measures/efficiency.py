"""Efficiency: the finetuning loss that vectors and adapters reach at matched strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Literal, Unpack, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float

from emlens._door import guarded
from emlens._stats import Interval, bootstrap_ratio
from emlens.directions import Directions
from emlens.hooked import HookedModel, ReadOptions
from emlens.hooked.condition import BASE
from emlens.hooked.options import ReadSettings
from emlens.hooked.sites import check_layers
from emlens.measures.doses import displaced_grid, norm_grid, own_grid, place_on
from emlens.measures.measured import OnGrid
from emlens.measures.scoring import row_losses
from emlens.measures.solutions import (
    acting_of,
    construction_of,
    kind_of,
    norm_of,
    read_solutions,
)
from emlens.text import Conversation
from emlens.text.repeats import warn_of_repeats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Match = Literal["norm", "own", "displacement"]
"""What is the same for all solutions at a point of the grid: the norm, the factor on the norm
that each came with, or how far the residual stream is displaced."""

FACTORS = tuple(np.linspace(0, 2, 9))

REMARK = (
    "loss / norm^2 falls with the norm by itself: it compares two solutions only at the same norm, "
    "or each at the norm where it reaches the same loss."
)


class Efficiency(OnGrid):
    """Loss on the finetuning data against the strength of a solution.

    A point of the grid is identified by its value: a norm, or what `match` says.

    Attributes:
        directions: Names of the solutions: vectors or adapters.
        constructions: How each was made.
        norms: The common grid of norms, `[m]`: units of the residual stream for vectors,
            `||scale * B A||_F` for adapters. Empty if something else is matched.
        doses: The same as shares of the median residual norm (NaN where that is unknown).
        sums: Summed loss in nats, `[directions, m, conversations]`.
        counts: Counted tokens per conversation.
        own_norms: Norm of each unscaled solution.
        tokens: Mask of the tokens that counted.
        seed: Seed of the bootstrap over conversations.
        kinds: `"vector"` or `"adapter"`, per solution; a vector if not given.
        match: What is the same for all at a point of the grid.
        levels: The grid, `[m]`, where it is not of norms: factors of the own norms, or
            displacements as shares of the median residual norm.
        factors: Factor on each solution, `[m]`, where norms are not matched.
        displacements: Displacement that was measured at each point, `[m]` per solution, where
            that is matched.
        place: Where it was measured.
        acting: The adapters and edits that acted under each solution and under `"base"`, in words.
    """

    AXES = {
        "norms": "points",
        "doses": "points",
        "levels": "points",
        "factors": "directions points",
        "displacements": "directions points",
        "own_norms": "directions",
        "kinds": "directions",
    }

    norms: tuple[float, ...]
    doses: tuple[float, ...]
    sums: Float[np.ndarray, "directions points counts"]
    counts: Float[np.ndarray, " counts"]
    own_norms: dict[str, float]
    tokens: str = "response"
    seed: int = 0
    kinds: dict[str, str] = field(default_factory=dict)
    match: str = "norm"
    levels: tuple[float, ...] = ()
    factors: dict[str, tuple[float, ...]] = field(default_factory=dict)
    displacements: dict[str, tuple[float, ...]] = field(default_factory=dict)
    place: str = ""
    acting: dict[str, str] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[float, ...]:
        """The values by which points are named, `[m]`."""
        return self.norms if self.match == "norm" else self.levels

    def norms_of(self, direction: str) -> np.ndarray:
        """Norm of a solution at each point of the grid, `[m]`."""
        self._index(direction)
        if self.match == "norm":
            return np.asarray(self.norms)
        return np.asarray(self.factors[direction]) * self.own_norms[direction]

    def loss(self, direction: str, norm: float) -> Interval:
        """Loss in nats per token at one point of the grid, with its interval."""
        return self._at(direction, norm)

    def area(self, first: str, second: str) -> Interval:
        """Area between two curves, `first - second`, over the width of the grid.

        The mean difference of loss over the grid in nats per token (trapezoids), paired by
        conversation; negative where `first` has the lower loss.

        Raises:
            ValueError: If the grid has no width.
        """
        grid = np.asarray(self.grid)
        order = np.argsort(grid)
        steps = np.diff(grid[order])
        if not steps.sum() > 0:
            raise ValueError(
                f"an area needs at least two points on the grid; there is {list(self.grid)}"
            )
        weights = np.zeros(len(grid))
        weights[order[:-1]] += steps / 2
        weights[order[1:]] += steps / 2
        gap = weights @ (self._units(first) - self._units(second)) / steps.sum()
        return self._interval(gap)

    def norm_at(self, direction: str, loss: float) -> float:
        """Smallest norm at which a solution reaches a loss; NaN where it does not on the grid.

        Interpolated between the points. NaN also if the loss is reached at the first point, so
        that the norm is smaller still. `loss / norm_at(...)**2` is the ratio at
        matched loss.

        Args:
            direction: A solution.
            loss: Loss in nats per token.
        """
        norms = self.norms_of(direction)
        order = np.argsort(norms)
        norms, losses = norms[order], self._curve(direction)[order]
        reached = np.flatnonzero(losses <= loss)
        if not len(reached):
            return float("nan")
        last = int(reached[0])
        if last == 0:
            exact = norms[0] == 0 or losses[0] == loss
            return float(norms[0]) if exact else float("nan")
        share = (losses[last - 1] - loss) / (losses[last - 1] - losses[last])
        return float(norms[last - 1] + share * (norms[last] - norms[last - 1]))

    def table(self) -> pd.DataFrame:
        """One row per solution and point of the grid.

        `loss / norm^2` is the ratio of arXiv 2602.07852 (Fig. 4a); it falls with the norm by
        itself, so it can only be compared between solutions at the same norm, or at the same
        loss (`norm_at`).
        """
        rows = []
        for name in self.directions:
            norms = self.norms_of(name)
            for j, (level, norm) in enumerate(zip(self.grid, norms, strict=True)):
                loss = self.loss(name, level)
                row = {"direction": name, "norm": norm}
                row |= {"dose": self.doses[j]} if self.match == "norm" else {}
                if self.match != "norm":
                    row["factor of own norm"] = self.factors[name][j]
                if self.match == "displacement":
                    row["displacement asked"] = level
                    row["displacement [share of median residual norm]"] = self.displacements[name][
                        j
                    ]
                row |= {
                    **loss.columns("loss [nats/token]"),
                    "loss / norm^2": loss.estimate / norm**2 if norm else float("nan"),
                    "acting": self._acting(name),
                }
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes | list[Axes]:
        """Loss against dose (or what the grid measures), and differences of solutions.

        The differences are from the first solution at the same point of the grid, with intervals
        paired by conversation. On `ax` the loss alone is drawn, with bands.
        """
        from emlens.figures.lines import paired_curves

        return paired_curves(
            self._curves("loss [nats/token]", "low", "high"),
            self._gaps(),
            x_label=self._across_label(),
            y_label="loss on finetuning\ndata [nats/token]",
            gap_label=f"difference from\n{self.directions[0]} [nats/token]",
            ax=ax,
        )

    def plot_ratio(self, ax: Axes | None = None) -> Axes:
        """`loss / norm^2` against the same axis as `plot`: see `table` for how to read it."""
        from emlens.figures.lines import line_bands

        return line_bands(
            self._curves("loss / norm^2"),
            x_label=self._across_label(),
            y_label="loss / norm² [nats/token, norm in its own unit]",
            title="compares only at the same norm, or at the same loss",
            y_scale="log",
            ax=ax,
        )

    def _repr_html_(self) -> str:
        return f"{super()._repr_html_()}<p>{REMARK}</p>"

    def _across(self, direction: str) -> np.ndarray:
        if self.match == "displacement":
            return np.asarray(self.displacements[direction])
        known = self.match == "norm" and not np.isnan(self.doses).any()
        return np.asarray(self.doses if known else self.grid)

    def _across_label(self) -> str:
        if self.match == "displacement":
            return f"displacement at {self.place} [share of median residual norm]"
        if self.match == "own":
            return "strength [share of own norm]"
        if not np.isnan(self.doses).any():
            return "dose [share of median residual norm]"
        adapters = "adapter" in self.kinds.values()
        return "norm of the adapter [||scale * B A||]" if adapters else "norm of what is added"

    def _units(self, direction: str) -> np.ndarray:
        return self.sums[self._index(direction)]

    def _interval(self, values: np.ndarray) -> Interval:
        return bootstrap_ratio(values, self.counts, seed=self.seed, level=self.level)

    def _curve(self, direction: str) -> np.ndarray:
        return self._units(direction).sum(1) / np.sum(self.counts)

    def _place(self, at: float) -> int:
        what = {"norm": "norm", "own": "factor", "displacement": "displacement"}[self.match]
        return place_on(self.grid, at, what)


@guarded
def efficiency(
    model: HookedModel,
    conversations: Sequence[Conversation],
    directions: Mapping[str, Directions | str],
    *,
    norms: Sequence[float] | None = None,
    factors: Sequence[float] = FACTORS,
    match: Match = "norm",
    displacements: Sequence[float] | None = None,
    layer: int | None = None,
    seed: int = 0,
    **options: Unpack[ReadOptions],
) -> Efficiency:
    """Return the loss on finetuning data for vectors and adapters, at matched strength.

    The norm of a vector is that of what it adds; over several layers, the root of the sum of
    squares. The norm of an adapter is `||scale * B A||_F`, over its modules in the same way. The
    two norms have different units: vectors and adapters are compared by displacement.

    Args:
        model: The model.
        conversations: Finetuning data.
        directions: What is compared, by name: a direction, directions of several layers, or the
            name of an adapter on the model.
        norms: The grid of norms; `factors` times the mean of the own norms by default
            (arXiv 2602.07852 uses 0 to 2 times).
        factors: See `norms` and `match`.
        match: `"norm"` puts all on one grid of norms; `"own"` scales each to `factors` times its
            own norm, 1 being the solution exactly; `"displacement"` scales each so that it
            displaces the residual stream alike.
        displacements: The grid for that, as shares of the median residual norm; by default
            `factors` times the geometric mean of those of the unscaled solutions.
        layer: Where the displacement is measured, at `resid_post`; the last layer by default.
        seed: Seed of the bootstrap over conversations.
        **options: See `ReadOptions`.

    Raises:
        ValueError: If there is nothing to compare, a direction is zero or of another width, an
            adapter does not exist or is not plain LoRA, a norm is negative or not finite, norms of
            vectors and adapters are to be matched, or a displacement is out of reach.
        TypeError: If something is neither directions nor the name of an adapter.

    Examples:
        >>> found = emlens.efficiency(model, conversations, {"general": general, "narrow": narrow})
        >>> found.area("general", "narrow")
    """
    _check_match(match, norms, displacements, layer)
    solutions = read_solutions(model, directions)
    own = {name: norm_of(model, one) for name, one in solutions.items()}
    warn_of_repeats(conversations, "conversations")
    reading = ReadSettings(**options)
    tokens = reading.tokens
    batches = model.batches(conversations, token_budget=reading.token_budget)
    if match == "norm":
        grid = norm_grid(solutions, own, norms, factors)
    elif match == "own":
        grid = own_grid(solutions, factors)
    else:
        at = check_layers(model.n_layers - 1 if layer is None else layer, model.n_layers)[0]
        grid = displaced_grid(model, batches, solutions, displacements, factors, at, tokens)
    points = {(name, j): at for name, of in grid.points.items() for j, at in enumerate(of)}
    sums, counts = row_losses(
        model,
        batches,
        {BASE: [], **{key: at for key, at in points.items() if at is not None}},
        tokens=tokens,
        progress=reading.progress,
        description="efficiency",
    )
    losses = {key: sums[BASE if at is None else key] for key, at in points.items()}
    return Efficiency(
        directions=tuple(solutions),
        constructions={name: construction_of(one) for name, one in solutions.items()},
        norms=grid.norms,
        doses=grid.doses,
        sums=np.array(
            [[losses[name, j] for j in range(len(of))] for name, of in grid.points.items()]
        ),
        counts=counts,
        own_norms=own,
        tokens=tokens,
        seed=seed,
        kinds={name: kind_of(one) for name, one in solutions.items()},
        match=match,
        levels=grid.levels,
        factors=grid.factors,
        displacements=grid.displacements,
        place=grid.place,
        acting=acting_of(model, solutions),
    )


def _check_match(
    match: str,
    norms: Sequence[float] | None,
    displacements: Sequence[float] | None,
    layer: int | None,
) -> None:
    if match not in get_args(Match):
        raise ValueError(f"unknown match {match!r}; choose {', '.join(get_args(Match))}")
    if norms is not None and match != "norm":
        raise ValueError(f'norms are a grid for match="norm", not for match={match!r}')
    if match != "displacement" and (displacements is not None or layer is not None):
        what = (
            "a layer is given, but it is"
            if displacements is None
            else "displacements are given, but they are"
        )
        raise ValueError(f'{what} for match="displacement"')
