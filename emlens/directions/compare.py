"""Cosines between directions of several constructions or finetunes, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from emlens._results import Result
from emlens.directions.direction import Directions


@dataclass(frozen=True)
class Comparison(Result):
    """Signed cosines between named directions.

    Attributes:
        names: The directions compared.
        constructions: How each was made.
        rows: One record per pair and layer: `first`, `second`, `layer`, `cosine`.
        null: Central 95% band of the cosine between random directions of this width.
        site: Where they live.
    """

    names: tuple[str, ...]
    constructions: dict[str, str]
    rows: tuple[dict, ...]
    null: tuple[float, float]
    site: str

    def table(self) -> pd.DataFrame:
        """One row per pair and layer; `beyond chance` says whether it leaves the null band."""
        frame = pd.DataFrame(list(self.rows))
        frame["beyond chance"] = (frame["cosine"] < self.null[0]) | (frame["cosine"] > self.null[1])
        return frame

    def plot(self, ax=None):
        """Cosine against layer, one line per pair, over the null band."""
        from emlens.figures import layer_curves

        frame = pd.DataFrame(list(self.rows))
        frame["pair"] = frame["first"] + " vs " + frame["second"]
        curves = {
            str(pair): (part["layer"].to_numpy(), part["cosine"].to_numpy())
            for pair, part in frame.groupby("pair", sort=False)
        }
        return layer_curves(curves, null=self.null, ax=ax)


def compare(directions: Mapping[str, Directions]) -> Comparison:
    """Return the signed cosine of every pair of directions at every layer that both have.

    Args:
        directions: Named directions at one site, of one width.

    Returns:
        The cosines, with the band that random directions fall in (95%): about `2 / sqrt(d)`.

    Raises:
        ValueError: If there are fewer than two, or sites or widths differ.

    Example:
        >>> emlens.compare({"medical": medical, "finance": finance}).plot()
    """
    if len(directions) < 2:
        raise ValueError("compare needs at least two named directions")
    sites = {name: d.site for name, d in directions.items()}
    widths = {name: d.d_model for name, d in directions.items()}
    if len(set(sites.values())) > 1 or len(set(widths.values())) > 1:
        raise ValueError(f"directions to compare differ in site {sites} or width {widths}")
    rows = [
        {"first": first, "second": second, "layer": layer, "cosine": value}
        for first, second in combinations(directions, 2)
        if set(directions[first].layers) & set(directions[second].layers)
        for layer, value in directions[first].cosine(directions[second]).items()
    ]
    if not rows:
        raise ValueError("the directions have no layer in common")
    return Comparison(
        names=tuple(directions),
        constructions={name: d.provenance.construction for name, d in directions.items()},
        rows=tuple(rows),
        null=null_band(next(iter(widths.values()))),
        site=next(iter(sites.values())),
    )


def null_band(d_model: int, level: float = 0.95) -> tuple[float, float]:
    """Return the central band of the cosine between two random directions of width `d_model`.

    The squared cosine is Beta(1/2, (d-1)/2) distributed.
    """
    from scipy.stats import beta

    edge = float(np.sqrt(beta.ppf(level, 0.5, (d_model - 1) / 2)))
    return -edge, edge
