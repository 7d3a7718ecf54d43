"""Results of a Fisher profile: scores of directions, the spectrum of a layer, top directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd

from emlens._door import guard_methods
from emlens._results import Result, Shown
from emlens.directions import Direction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 12
"""Bars that a plot shows; beyond, only the largest."""


class ProfileScores(Result):
    """Influence of directions on pre-training text by the Fisher approximation, one per row.

    Intervals are over documents: they cover what other text of the same kind would give. The error
    of the draws alone separates a score from the exact KL on the same documents.

    Attributes:
        directions: Name of each row's direction.
        layers: Its layer; it is added at every position of `resid_post`.
        constructions: How it was made.
        doses: Norm of what is added, as a share of the median residual norm of the corpus.
        norms: The same in units of the residual stream.
        kl: `KL(base || edited)` in nats per token, to second order in the norm.
        kl_low: Lower ends of its 95% intervals.
        kl_high: Upper ends.
        kl_draw_error: Standard error of it from the draws alone.
        loss_change: Change of next-token loss in nats per token, to second order in the norm:
            the inner product with the gradient, plus `kl`.
        change_low: Lower ends of its 95% intervals.
        change_high: Upper ends.
        random_percentile: Share of random directions of equal norm with a lower KL, percent.
        difference_percentile: The same among random differences of activations.
        held_out: Whether only documents count that the direction was not found on.
        corpus: Name of the corpus.
        ratio: KL as a multiple of that of the first direction at the same layer and dose; NaN
            where that one has no such layer.
        ratio_low: Lower ends of its 95% intervals, paired by document.
        ratio_high: Upper ends.
    """

    HOLDS_ENDS = True

    AXES: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            (
                *("layers", "constructions", "doses", "norms", "kl", "kl_low", "kl_high"),
                *("kl_draw_error", "loss_change", "change_low", "change_high"),
                *("random_percentile", "difference_percentile", "held_out"),
            ),
            "directions",
        ),
        **dict.fromkeys(("ratio", "ratio_low", "ratio_high"), "directions?"),
    }

    directions: tuple[str, ...]
    layers: tuple[int, ...]
    constructions: tuple[str, ...]
    doses: tuple[float, ...]
    norms: tuple[float, ...]
    kl: tuple[float, ...]
    kl_low: tuple[float, ...]
    kl_high: tuple[float, ...]
    kl_draw_error: tuple[float, ...]
    loss_change: tuple[float, ...]
    change_low: tuple[float, ...]
    change_high: tuple[float, ...]
    random_percentile: tuple[float, ...]
    difference_percentile: tuple[float, ...]
    held_out: tuple[bool, ...]
    corpus: str
    ratio: tuple[float, ...] = ()
    ratio_low: tuple[float, ...] = ()
    ratio_high: tuple[float, ...] = ()

    def table(self) -> pd.DataFrame:
        """One row per direction, layer and dose."""
        against = f"KL over that of {self.directions[0]}"
        compared = {
            against: self.ratio,
            "ratio low": self.ratio_low,
            "ratio high": self.ratio_high,
        }
        return pd.DataFrame(
            {
                "direction": self.directions,
                "layer": self.layers,
                "dose": self.doses,
                "norm": self.norms,
                "KL [nats/token]": self.kl,
                "KL low": self.kl_low,
                "KL high": self.kl_high,
                **(compared if np.isfinite(self.ratio).any() else {}),
                "KL error of the draws": self.kl_draw_error,
                "loss change [nats/token]": self.loss_change,
                "change low": self.change_low,
                "change high": self.change_high,
                "percentile among random [%]": self.random_percentile,
                "percentile among activation differences [%]": self.difference_percentile,
                "held out": self.held_out,
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes | list[Axes]:
        """KL with its intervals by direction; of several layers, KL and ratios against the layer.

        The ratios are to the first direction, with intervals paired by document; on `ax` the KL
        alone is drawn, with its own. Of many directions the largest are shown; one dose, the first.
        """
        from emlens.figures.bars import dot_intervals
        from emlens.figures.lines import paired_curves

        shown = self._largest()
        dose = f"at dose {self.doses[0]:g}"
        label = f"KL(base || edited) on {self.corpus} [nats/token]\n{dose}"
        places = {
            name: shown[[self.directions[i] == name for i in shown]]
            for name in dict.fromkeys(self.directions[i] for i in shown)
        }
        layers = np.asarray(self.layers)
        if max(len(set(layers[of_name])) for of_name in places.values()) > 1:

            def curves(*columns: tuple[float, ...]) -> dict[str, tuple[np.ndarray, ...]]:
                found = {}
                for name, of_name in places.items():
                    along = of_name[np.argsort(layers[of_name], kind="stable")]
                    values = [np.asarray(column)[along] for column in columns if column]
                    if values and np.isfinite(values[0]).any():
                        found[name] = (layers[along], *values)
                return found

            ratios = curves(self.ratio, self.ratio_low, self.ratio_high)
            first = self.directions[0]
            return paired_curves(
                curves(self.kl, self.kl_low, self.kl_high),
                {name: ratio for name, ratio in ratios.items() if name != first},
                x_label="layer",
                y_label=f"KL(base || edited) on\n{self.corpus} [nats/token]\n{dose}",
                gap_label=f"KL over that of\n{first} [ratio]",
                gap_reference=1.0,
                gap_scale="log",
                reference=0.0,
                ax=ax,
            )
        values, low, high = (np.asarray(x)[shown] for x in (self.kl, self.kl_low, self.kl_high))
        only = {self.layers[i] for i in shown}
        return dot_intervals(
            [self.directions[i] for i in shown],
            None if len(only) == 1 else [f"layer {self.layers[i]}" for i in shown],
            values,
            low,
            high,
            y_label=label,
            x_label=f"direction, layer {only.pop()}" if len(only) == 1 else "direction",
            ax=ax,
        )

    def _largest(self) -> np.ndarray:
        """Rows of the first dose, of the directions with the largest KL, in their order."""
        first: dict[tuple[str, int], int] = {}
        for i, place in enumerate(zip(self.directions, self.layers, strict=True)):
            first.setdefault(place, i)
        most: dict[str, float] = {}
        for (name, _), i in first.items():
            most[name] = max(most.get(name, 0.0), self.kl[i])
        kept = set(sorted(most, key=lambda name: -most[name])[:FEW])
        return np.array([i for (name, _), i in first.items() if name in kept])


class Spectrum(Result):
    """Eigenvalues of the Fisher matrix of a layer, in nats per token per squared norm.

    A displacement of norm `c` along an eigenvector costs a KL of `c^2 / 2` times its eigenvalue.
    In the sample, the leading eigenvectors fit the noise of the draws and overstate themselves;
    held out, those of one half of the documents are measured on the other half, both ways.
    `shrunk` is the estimate to use: the held-out values, made to decrease with the rank.

    Attributes:
        layer: The layer.
        eigenvalues: In the sample, descending.
        held_out: By rank, measured on the documents that the eigenvectors were not found on.
        effective_rank: `trace(F)^2 / trace(F^2)`, without the noise of the draws: each factor of
            a product comes from another half of the documents.
        sample_rank: The same in the sample, where noise makes it too small.
        corpus: Name of the corpus.
    """

    layer: int
    eigenvalues: tuple[float, ...]
    held_out: tuple[float, ...]
    effective_rank: float
    sample_rank: float
    corpus: str

    @property
    def shrunk(self) -> tuple[float, ...]:
        """Held-out eigenvalues made to decrease by isotonic regression, as many as `held_out`."""
        from scipy.optimize import isotonic_regression

        return tuple(isotonic_regression(self.held_out, increasing=False).x.tolist())

    @property
    def overstatement(self) -> float:
        """Ratio of the leading eigenvalue of the sample to its shrunk value."""
        return self.eigenvalues[0] / self.shrunk[0]

    def __str__(self) -> str:
        return (
            f"layer {self.layer} on {self.corpus}: leading eigenvalue {self.shrunk[0]:.3g} "
            f"nats/token/norm^2 held out ({self.overstatement:.1f} times that in the sample), "
            f"effective rank {self.effective_rank:.0f}"
        )

    def _verify(self) -> None:
        if len(self.held_out) > len(self.eigenvalues):
            raise ValueError(
                f"held_out has {len(self.held_out)} values for {len(self.eigenvalues)} eigenvalues"
            )

    def table(self) -> pd.DataFrame:
        """One row per rank."""
        values = np.asarray(self.eigenvalues)
        outside, shrunk = np.full((2, len(values)), np.nan)
        outside[: len(self.held_out)] = self.held_out
        shrunk[: len(self.held_out)] = self.shrunk
        return pd.DataFrame(
            {
                "rank": np.arange(1, len(values) + 1),
                "eigenvalue in sample [nats/token/norm^2]": values,
                "eigenvalue held out [nats/token/norm^2]": outside,
                "eigenvalue shrunk [nats/token/norm^2]": shrunk,
                # the trace is unbiased; noise only moves it between ranks
                "cumulative share": shrunk.cumsum() / values.sum(),
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Eigenvalues against rank, in the sample, held out and shrunk."""
        from emlens.figures.lines import line_bands

        curves = {
            "in sample": (np.arange(1, len(self.eigenvalues) + 1), np.asarray(self.eigenvalues)),
            "held out": (np.arange(1, len(self.held_out) + 1), np.asarray(self.held_out)),
            "shrunk": (np.arange(1, len(self.shrunk) + 1), np.asarray(self.shrunk)),
        }
        return line_bands(
            curves,
            x_label="rank",
            y_label=f"eigenvalue at layer {self.layer} [nats/token/norm²]",
            ax=ax,
            x_scale="log",
            y_scale="log",
        )


@guard_methods
@dataclass(frozen=True, repr=False)
class TopDirections(Shown, Mapping[str, Direction]):
    """The directions of a layer with the largest influence: a mapping of names to directions.

    They are leading eigenvectors on one half of the documents, and say so in their provenance:
    `InfluenceProfile.score` counts only the other half for them.

    Attributes:
        directions: The directions, by name.
        by_rank: What directions of each rank do, averaged over both ways: found on one half of
            the documents and measured on the other.
    """

    directions: dict[str, Direction]
    by_rank: ProfileScores

    def __getitem__(self, name: str) -> Direction:
        return self.directions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.directions)

    def __len__(self) -> int:
        return len(self.directions)

    def table(self) -> pd.DataFrame:
        """One row per rank, held out."""
        return self.by_rank.table()

    def _said(self) -> str:
        return f"{', '.join(self)}, on {self.by_rank.corpus}"
