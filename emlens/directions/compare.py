"""Cosines between directions from several constructions or finetunes, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from emlens._door import guarded
from emlens._results import ROWS, Result
from emlens._stats import Interval, level_in_force, tails
from emlens.directions.direction import Directions, by_name
from emlens.directions.noise import Corrected, Estimate, corrected_cosine
from emlens.directions.vectors import cosine

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Named = Mapping[str, Directions] | Sequence[Directions]
"""Directions with their names, or without: their constructions are then their names."""

MOST = 10
"""The most pairs that a figure names one by one."""

PANELS = 6
"""The most pairs with intervals that have a panel each."""

ROUNDING = 1e-4
"""Share of a direction's norm below which its noise is taken for rounding."""


class Comparison(Result):
    """Signed cosines between named directions.

    Attributes:
        names: The directions compared.
        constructions: How each was made.
        rows: One record per pair and layer, with the columns of `table`.
        null: Central 95% band of the cosine of random directions of this width.
        site: Their site.
        chance: The source of the bands in the rows, besides random directions.
    """

    HOLDS_ENDS = True

    names: tuple[str, ...]
    constructions: dict[str, str]
    rows: tuple[dict, ...]
    null: tuple[float, float]
    site: str
    chance: str = "shuffled labels"

    def table(self) -> pd.DataFrame:
        """One row per pair and layer.

        `cosine` is that of the vectors. `corrected` is an estimate of it without sampling error,
        with its 95% interval (`low`, `high`) and, where it is not known, the reason (`note`).
        `chance low` and `chance high` hold 95% of what shuffled labels of the same data give. `same
        labels` is the mean cosine that any one labelling of the text gives when both were read from
        the same. `beyond chance` says whether the cosine leaves both this band and that of random
        directions. Columns without any value are left out.
        """
        import pandas as pd

        rows = []
        for row in self.rows:
            low, high = self._edges(row)
            rows.append({**row, "beyond chance": not low <= row["cosine"] <= high})
        frame = pd.DataFrame(rows).dropna(axis=1, how="all")
        return frame if any(row["note"] for row in self.rows) else frame.drop(columns="note")

    def _said(self) -> str:
        names = ", ".join(self.names)
        names = names if len(names) <= 90 else f"{len(self.names)} directions"
        return f"{names} at {self.site}, {len(self.rows)} pairs and layers"

    def _summary(self) -> tuple[pd.DataFrame, str]:
        """Of many rows one layer: how each of the names lies to the others there."""
        import pandas as pd

        if len(self.rows) <= ROWS:
            return self.table(), ""
        layers = [row["layer"] for row in self.rows]
        shared = sorted(set(layers), key=lambda layer: (-layers.count(layer), layer))
        most = [layer for layer in shared if layers.count(layer) == layers.count(shared[0])]
        layer = most[len(most) // 2]
        values, low, high = self._square(layer)
        np.fill_diagonal(values, np.nan)
        rows = []
        for place, name in enumerate(self.names):
            own = pd.Series(values[place], index=list(self.names)).dropna()
            outside = (values[place] < low[place]) | (values[place] > high[place])
            if len(own):
                rows.append(
                    {
                        "name": name,
                        "nearest": own.idxmax(),
                        "cosine": own.max(),
                        "median": own.median(),
                        "lowest": own.min(),
                        "beyond chance": f"{int(outside.sum())} of {len(own)}",
                    }
                )
        note = (
            f"Layer {layer}, each direction against the others. table() has all "
            f"{len(self.rows):,} rows, heatmap({layer}) draws the pairs."
        )
        return pd.DataFrame(rows), note

    def matrix(self, layer: int | None = None) -> pd.DataFrame:
        """Cosines of all pairs, `[names, names]`, at one layer or averaged over those shared.

        Raises:
            KeyError: If no pair shares the layer.
        """
        import pandas as pd

        names = list(self.names)
        return pd.DataFrame(self._square(layer)[0], index=names, columns=names)

    def order(self, layer: int | None = None) -> list[str]:
        """The names, ordered by hierarchical clustering of `1 - cosine`."""
        from scipy.cluster.hierarchy import average, leaves_list
        from scipy.spatial.distance import squareform

        values = np.nan_to_num(self._square(layer)[0])
        if len(values) < 3:
            return list(self.names)
        tree = average(squareform(np.clip(1 - values, 0, 2), checks=False))
        return [self.names[place] for place in leaves_list(tree)]

    def plot(
        self,
        ax: Axes | None = None,
        *,
        corrected: bool = False,
        highlight: Sequence[str] | None = None,
    ) -> Axes | list[Axes]:
        """Cosine against layer, one line per pair, over what chance gives to any of them.

        More pairs than have room for their names are grey, with their median. Up to six pairs
        with intervals have a panel each, so that no band covers another.

        Args:
            ax: Axes to draw on; a figure of its own if not given.
            corrected: Draw the cosines without sampling error, of few pairs with their intervals.
            highlight: Names whose pairs with all others are highlighted, each with its median.

        Raises:
            KeyError: If there is no direction with such a name.
        """
        from emlens.figures.labels import told_apart
        from emlens.figures.lines import layer_curves, many_curves, panels_of_curves

        layers = sorted({row["layer"] for row in self.rows})
        shared, short = told_apart(self.names)
        said = dict(zip(self.names, short, strict=True))
        columns = ("corrected", "low", "high") if corrected else ("cosine",)
        found: dict[tuple[str, str], dict] = {}
        for row in self.rows:
            found.setdefault((row["first"], row["second"]), {})[row["layer"]] = row
        curves = {
            pair: [_numbers([own.get(layer, {}).get(n) for layer in layers]) for n in columns]
            for pair, own in found.items()
        }
        edges = [
            [self._edges(row) for row in self.rows if row["layer"] == layer] for layer in layers
        ]
        low = [min(edge[0] for edge in found) for found in edges]
        high = [max(edge[1] for edge in found) for found in edges]
        look = {
            "null": (low, high),
            "y_label": "cosine without sampling error" if corrected else "cosine similarity",
            "title": f"all names begin with {shared}" if shared else None,
        }
        strange = [name for name in highlight or () if name not in self.names]
        if strange:
            raise KeyError(f"no direction {strange[0]!r}; there are {', '.join(self.names)}")
        if highlight is None and len(curves) <= MOST:
            lines = {
                f"{said[one]} vs {said[other]}": (layers, *values)
                for (one, other), values in curves.items()
            }
            if corrected and 1 < len(lines) <= PANELS and ax is None:
                return panels_of_curves(lines, **look)
            return layer_curves(lines, ax=ax, **look)
        groups = {
            said[name]: [n for n, pair in enumerate(curves) if name in pair]
            for name in highlight or ()
        }
        every = np.stack([values[0] for values in curves.values()])
        return many_curves(layers, every, groups, noun="pairs", ax=ax, **look)

    def heatmap(
        self, layer: int | None = None, *, clustered: bool = True, ax: Axes | None = None
    ) -> Axes:
        """All pairs at one layer, or averaged over layers; cells within chance are hatched.

        Args:
            layer: The layer.
            clustered: Order names by similarity; else as given.
            ax: Axes to draw on; a figure of its own if not given.
        """
        from emlens.figures import heatmap
        from emlens.figures.labels import told_apart

        order = self.order(layer) if clustered else list(self.names)
        places = [self.names.index(name) for name in order]
        values, low, high = (part[np.ix_(places, places)] for part in self._square(layer))
        where = "mean over layers" if layer is None else f"layer {layer}"
        shared, short = told_apart(order)
        title = f"{self.site}, {where}" + (f"\nall names begin with {shared}" if shared else "")
        return heatmap(values, short, short, null_band=(low, high), title=title, ax=ax)

    def _edges(self, row: Mapping) -> tuple[float, float]:
        """The wider of the two bands of chance."""
        low, high = row.get("chance low"), row.get("chance high")
        bands = [self.null] if low is None or high is None else [self.null, (low, high)]
        return min(band[0] for band in bands), max(band[1] for band in bands)

    def _square(self, layer: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cosines and both edges of chance, `[names, names]`, means over layers where asked."""
        rows = [row for row in self.rows if layer in (None, row["layer"])]
        if not rows:
            shared = sorted({row["layer"] for row in self.rows})
            raise KeyError(f"no pair shares layer {layer}; shared are {shared}")
        size = len(self.names)
        sums, counts = np.zeros((3, size, size)), np.zeros((size, size))
        for row in rows:
            i, j = self.names.index(row["first"]), self.names.index(row["second"])
            for place in ((i, j), (j, i)):
                sums[(slice(None), *place)] += row["cosine"], *self._edges(row)
                counts[place] += 1
        with np.errstate(invalid="ignore"):
            means = sums / counts
        np.fill_diagonal(means[0], 1.0)
        return means[0], means[1], means[2]


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values])


_COLUMNS = (
    *("first", "second", "layer", "cosine", "corrected", "low", "high"),
    *("chance low", "chance high", "same labels", "note"),
)


@guarded
def compare(directions: Named, *more: Directions) -> Comparison:
    """Return the signed cosine of every pair of directions at every shared layer.

    Two constructions of one behaviour are often nearly orthogonal, but so are two noisy estimates
    of one direction: look at `corrected` and at the chance bands before drawing conclusions.

    Args:
        directions: Directions at one site, of one width: by name, or a list. Layers at which one is
            zero, as below an adapter, are left out.
        *more: Further directions without names: `compare(a, b)`.

    Returns:
        The cosines, with chance bands and a correction for sampling error. The corrected cosine
        divides by the root of both reliabilities (Spearman's correction for attenuation) and lies
        in [-1, 1]; noise that two readings of the same text share is subtracted. Random directions
        fall within about `2 / sqrt(d)` in 95%; those of shuffled labels spread wider, since
        activations vary in few directions.

    Raises:
        ValueError: If there are fewer than two, sites or widths differ, or no two share a layer.

    Examples:
        >>> emlens.compare({"medical": medical, "finance": finance}).plot()
    """
    named = checked(directions, *more)
    rows = []
    for first, second in combinations(named, 2):
        shared = set(moved(named[first])) & set(moved(named[second]))
        rows += [_row(named, first, second, layer) for layer in sorted(shared)]
    if not rows:
        raise ValueError("the directions have no layer in common at which they are not zero")
    some = next(iter(named.values()))
    return Comparison(
        names=tuple(named),
        constructions={name: d.provenance.construction for name, d in named.items()},
        rows=tuple(rows),
        null=null_band(some.d_model),
        site=some.site,
    )


def checked(directions: Named, *more: Directions) -> dict[str, Directions]:
    """Names for directions that can be compared.

    Raises:
        ValueError: If there are fewer than two, two have one name, or sites or widths differ.
    """
    if more:
        first = directions if isinstance(directions, Mapping) else by_name(directions)
        directions = [*first.values(), *more]
    if not isinstance(directions, Mapping):
        directions = by_name(directions)
    if len(directions) < 2:
        raise ValueError("compare needs at least two named directions")
    sites = {name: d.site for name, d in directions.items()}
    widths = {name: d.d_model for name, d in directions.items()}
    if len(set(sites.values())) > 1 or len(set(widths.values())) > 1:
        raise ValueError(f"directions to compare differ in site {sites} or width {widths}")
    return dict(directions)


def moved(directions: Directions) -> tuple[int, ...]:
    """The layers at which directions are not zero."""
    return tuple(layer for layer, norm in directions.norms.items() if norm > 0)


@guarded
def null_band(d_model: int, level: float | None = None) -> tuple[float, float]:
    """Return the central band of the cosine between two random directions of width `d_model`.

    The squared cosine is Beta(1/2, (d-1)/2) distributed.
    """
    from scipy.stats import beta

    edge = float(np.sqrt(beta.ppf(level or level_in_force(), 0.5, (d_model - 1) / 2)))
    return -edge, edge


def draws_of(directions: Directions, layer: int) -> Tensor | None:
    """Directions under shuffled labels, `[draws, d_model]`; zero where they are only rounding.

    A push that is the same in every conversation leaves nothing to shuffle at its own layer.
    """
    draws = directions.shuffled.get(layer)
    if draws is None:
        return None
    real = draws.norm(dim=-1, keepdim=True) > ROUNDING * directions.vectors[layer].norm()
    return draws * real


def chance_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of draws that do not belong together, `[pairs, ...]`.

    Args:
        first: Directions under shuffled labels, `[draws, n, d_model]`.
        second: The same of others, `[draws, m, d_model]`.

    Returns:
        `[pairs, n, m]`; draws of one number may share their shuffle, and are left out.
    """
    units = [draws / draws.norm(dim=-1, keepdim=True).clamp(min=1e-30) for draws in (first, second)]
    found = torch.einsum("knd,jmd->kjnm", *units)
    apart = ~torch.eye(len(first), len(second), dtype=torch.bool)
    return found[apart]


def _row(named: Mapping[str, Directions], first: str, second: str, layer: int) -> dict:
    a, b = named[first], named[second]
    same = _same_data(a, b)
    corrected = Corrected(note="share part of their text: errors not independent")
    if same or not set(a.provenance.data.values()) & set(b.provenance.data.values()):
        estimates = Estimate.of(a, layer), Estimate.of(b, layer)
        corrected = corrected_cosine(*estimates, (first, second), same)
    ours, theirs = draws_of(a, layer), draws_of(b, layer)
    low = high = labels = None
    if ours is not None and theirs is not None:
        chance = chance_cosines(ours[:, None], theirs[:, None]).flatten()
        low, high = torch.quantile(chance, torch.tensor(tails())).tolist()
        if same and len(ours) == len(theirs):
            labels = float(torch.nn.functional.cosine_similarity(ours, theirs).mean())
    values = (corrected.value, corrected.low, corrected.high, low, high, labels, corrected.note)
    own = cosine(a.vectors[layer], b.vectors[layer])
    return dict(zip(_COLUMNS, (first, second, layer, own, *values), strict=True))


def _same_data(first: Directions, second: Directions) -> bool:
    a, b = first.provenance, second.provenance
    return bool(a.data) and a.data == b.data and a.seed == b.seed


@guarded
def projection(directions: Directions, onto: Directions) -> dict[int, Interval]:
    """Return the component of directions along others, with 95% intervals, layer by layer.

    The length of the component along `onto` (taken as known), in units of the residual stream.
    Its error is estimated from the directions under shuffled labels, since coordinates are
    correlated and their standard errors are not enough.

    Args:
        directions: Directions with shuffled labels, as `mean_diff` gives.
        onto: The axes; only their directions matter.

    Raises:
        ValueError: If sites differ, no layer is shared, or no shuffled labels are known.
    """
    if onto.d_model != directions.d_model:
        raise ValueError(
            f"onto has width {onto.d_model}, and the directions have {directions.d_model}"
        )
    directions._cosines(onto)
    found = {}
    for layer in directions.layers:
        if layer not in onto:
            continue
        estimate = Estimate.of(directions, layer)
        if estimate.draws is None:
            raise ValueError(
                f"nothing is known of the noise of {directions!r} at layer {layer}; mean_diff, "
                "model_diff and edit_diff keep what shuffled labels give"
            )
        axis = onto.vectors[layer].double().numpy()
        axis = axis / np.linalg.norm(axis)
        along = float(estimate.vector @ axis)
        reach = estimate.reach(axis)
        found[layer] = Interval(along, along - reach, along + reach)
    return found
