"""Cosines between the directions of every layer and those of every other."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from emlens._door import guarded
from emlens._results import ROWS, Result
from emlens._stats import central
from emlens.directions.compare import (
    Named,
    chance_cosines,
    checked,
    draws_of,
    moved,
    null_band,
)
from emlens.directions.direction import Directions
from emlens.directions.vectors import nonzero

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


class LayerComparison(Result):
    """Signed cosines between layers of named directions.

    Attributes:
        names: The directions compared.
        layers: The layers of each.
        cosine: `[n, n]`, the layers of all directions one after the other.
        low: Lower end of what chance gives, `[n, n]`: the wider of random directions and of
            shuffled labels of the same data.
        high: Upper end.
        site: Their site.
    """

    AXES = {"layers": "names"}
    HOLDS_ENDS = True

    names: tuple[str, ...]
    layers: tuple[tuple[int, ...], ...]
    cosine: Float[np.ndarray, "rows rows"]
    low: Float[np.ndarray, "rows rows"]
    high: Float[np.ndarray, "rows rows"]
    site: str

    def matrix(self, first: str | None = None, second: str | None = None) -> pd.DataFrame:
        """Cosines of all with all, or of the layers of one with those of another."""
        import pandas as pd

        places = pd.MultiIndex.from_tuples(self._places(), names=["name", "layer"])
        rows, columns = self._chosen(first), self._chosen(second)
        values = self.cosine[np.ix_(rows, columns)]
        return pd.DataFrame(values, index=places[rows], columns=places[columns])

    def table(self) -> pd.DataFrame:
        """One row per pair of names, first layer and second layer."""
        import pandas as pd

        places = self._places()
        rows = [
            {
                "first": one,
                "first layer": i,
                "second": other,
                "second layer": j,
                "cosine": float(self.cosine[a, b]),
                "chance low": float(self.low[a, b]),
                "chance high": float(self.high[a, b]),
            }
            for a, (one, i) in enumerate(places)
            for b, (other, j) in enumerate(places)
            if a < b
        ]
        return pd.DataFrame(rows)

    def _summary(self) -> tuple[pd.DataFrame, str]:
        """One row per pair of names, those that agree best first."""
        import pandas as pd

        n = len(self.cosine)
        if n * (n - 1) // 2 <= ROWS:
            return self.table(), ""
        rows = []
        for one, other in combinations(self.names, 2):
            block = self.cosine[np.ix_(self._chosen(one), self._chosen(other))]
            i, j = np.unravel_index(int(np.abs(block).argmax()), block.shape)
            places = [self.layers[self.names.index(name)] for name in (one, other)]
            at = {"first layer": places[0][i], "second layer": places[1][j]}
            rows.append({"first": one, "second": other, "strongest": block[i, j], **at})
        if not rows:
            return super()._summary()
        table = pd.DataFrame(rows).sort_values("strongest", key=abs, ascending=False)
        note = f"The strongest cosine of each pair; table() has all {n * (n - 1) // 2:,} rows."
        return table.head(ROWS), note

    def plot(
        self, ax: Axes | None = None, *, first: str | None = None, second: str | None = None
    ) -> Axes:
        """All with all, or the layers of one against those of another; cells within chance are
        hatched."""
        from emlens.figures import heatmap
        from emlens.figures.labels import told_apart

        rows, columns = self._chosen(first), self._chosen(second)
        block = np.ix_(rows, columns)
        values, low, high = (part[block] for part in (self.cosine, self.low, self.high))
        labels = [str(layer) for _, layer in self._places()]
        shared, short = told_apart(self.names)
        whole = first is None and second is None and len(self.names) > 1
        return heatmap(
            values,
            [labels[place] for place in rows],
            [labels[place] for place in columns],
            null_band=(low, high),
            blocks=dict(zip(short, map(len, self.layers), strict=True)) if whole else None,
            title=f"all names begin with {shared}" if shared and whole else None,
            x_label="layer" if whole else f"layer of {second or 'all'}",
            y_label="layer" if whole else f"layer of {first or 'all'}",
            ax=ax,
        )

    def _places(self) -> list[tuple[str, int]]:
        return [
            (name, layer)
            for name, layers in zip(self.names, self.layers, strict=True)
            for layer in layers
        ]

    def _chosen(self, name: str | None) -> list[int]:
        """The rows of one of the directions, or all."""
        if name is not None and name not in self.names:
            raise KeyError(f"no directions {name!r}; there are {', '.join(self.names)}")
        return [i for i, (own, _) in enumerate(self._places()) if name in (None, own)]


@guarded
def compare_layers(
    directions: Named, *more: Directions, layers: range | list[int] | None = None
) -> LayerComparison:
    """Return the cosine of every layer of every direction with every other.

    If a direction is carried along the residual stream, neighbouring layers agree; two finetunes
    share it from the layer on at which their cosines exceed chance.

    Args:
        directions: Two or more directions at one site, of one width: named, or a list.
        *more: Further ones without names.
        layers: The layers to compare; by default those at which all are nonzero.

    Raises:
        ValueError: As `compare`, or if a vector is zero.
        KeyError: If one of them lacks a layer.
    """
    named = checked(directions, *more)
    chosen = {
        name: moved(found) if layers is None else found.at(layers).layers
        for name, found in named.items()
    }
    nothing = [name for name, held in chosen.items() if not held]
    if nothing:
        raise ValueError(f"{', '.join(nothing)} is zero at every layer: it has no direction")
    units = torch.cat(
        [
            torch.stack([nonzero(named[name].vectors[layer], layer) for layer in held])
            for name, held in chosen.items()
        ]
    ).double()
    units = units / units.norm(dim=-1, keepdim=True)
    values = (units @ units.T).numpy()
    low, high = (np.full_like(values, edge) for edge in null_band(units.shape[1]))
    starts = np.cumsum([0, *(len(held) for held in chosen.values())])
    for i, one in enumerate(named):
        for j, other in enumerate(named):
            draws = [_draws(named[name], chosen[name]) for name in (one, other)]
            if draws[0] is None or draws[1] is None:
                continue
            block = slice(starts[i], starts[i + 1]), slice(starts[j], starts[j + 1])
            chance = chance_cosines(draws[0], draws[1]).numpy()
            edges = central(chance)
            low[block] = np.minimum(low[block], edges[0])
            high[block] = np.maximum(high[block], edges[1])
    return LayerComparison(
        names=tuple(named),
        layers=tuple(chosen.values()),
        cosine=values,
        low=low,
        high=high,
        site=next(iter(named.values())).site,
    )


def _draws(directions: Directions, layers: tuple[int, ...]) -> torch.Tensor | None:
    found = [draws for layer in layers if (draws := draws_of(directions, layer)) is not None]
    return torch.stack(found, dim=1) if len(found) == len(layers) else None
