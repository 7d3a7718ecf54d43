"""The overlap of the spans of two sets of directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emlens._door import guarded
from emlens._results import Result
from emlens._stats import level_in_force
from emlens.directions.direction import Directions

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

DRAWS = 200


class SubspaceOverlap(Result):
    """Overlap of two subspaces, per layer.

    Attributes:
        layers: The layers.
        overlap: Mean squared cosine of the principal angles: 1 if the smaller subspace lies in the
            larger, 0 if they are orthogonal.
        angles: The principal angles, in degrees, smallest first, per layer.
        chance: 95th percentile of the overlap of random subspaces of these dimensions.
    """

    HOLDS_ENDS = True

    AXES = {"overlap": "layers", "angles": "layers", "chance": "layers"}

    layers: tuple[int, ...]
    overlap: tuple[float, ...]
    angles: tuple[tuple[float, ...], ...]
    chance: tuple[float, ...]

    def _verify(self) -> None:
        if not all(self.angles):
            raise ValueError("angles has a layer without an angle; two subspaces have at least one")

    def table(self) -> pd.DataFrame:
        """One row per layer."""
        import pandas as pd

        return pd.DataFrame(
            {
                "layer": self.layers,
                "overlap": self.overlap,
                "chance (95%)": self.chance,
                "smallest angle (degrees)": [angles[0] for angles in self.angles],
                "largest angle (degrees)": [angles[-1] for angles in self.angles],
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Overlap against layer, over that of random subspaces."""
        from emlens.figures.lines import layer_curves

        chance = [0.0] * len(self.layers), list(self.chance)
        return layer_curves(
            {"overlap": (self.layers, self.overlap)},
            null=chance,
            y_label="overlap of the subspaces [0 to 1]",
            ax=ax,
        )


@guarded
def subspace_overlap(first: Sequence[Directions], second: Sequence[Directions]) -> SubspaceOverlap:
    """Return the overlap of the spans of two sets of directions, layer by layer.

    `||P Q||^2 / min(ranks)` for orthonormal bases `P` and `Q`: the mean squared cosine of the
    principal angles. Directions that are linear combinations of the others add no rank.

    Args:
        first: Directions that span one subspace, e.g. several seeds of one finetune.
        second: Those that span the other.

    Raises:
        ValueError: If a side is empty, sites or widths differ, or no layer is shared by all.
    """
    everything = [*first, *second]
    if len({(d.site, d.d_model) for d in everything}) > 1:
        places = sorted({f"{d.site}, width {d.d_model}" for d in everything})
        raise ValueError(f"the directions live in different places: {'; '.join(places)}")
    layers = [n for n in everything[0].layers if all(n in d for d in everything)]
    if not layers:
        raise ValueError("the directions have no layer in common")
    overlaps, angles, chances = [], [], []
    for layer in layers:
        bases = [_basis([d.vectors[layer] for d in side]) for side in (first, second)]
        cosines = torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(max=1)
        overlaps.append(float((cosines**2).mean()))
        angles.append(tuple(torch.rad2deg(torch.acos(cosines)).tolist()))
        chances.append(_chance(everything[0].d_model, *(basis.shape[1] for basis in bases)))
    return SubspaceOverlap(tuple(layers), tuple(overlaps), tuple(angles), tuple(chances))


def _basis(vectors: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack([v.double() / v.double().norm().clamp(min=1e-30) for v in vectors], dim=1)
    left, sizes, _ = torch.linalg.svd(stacked, full_matrices=False)
    rank = int((sizes > 1e-6 * sizes[0]).sum())
    return left[:, :rank]


def _chance(d_model: int, first: int, second: int) -> float:
    """By symmetry one of both subspaces may be the first coordinates."""
    generator = torch.Generator().manual_seed(0)
    small, large = sorted((first, second))
    found = []
    for _ in range(DRAWS):
        basis, _ = torch.linalg.qr(torch.randn(d_model, small, generator=generator))
        found.append((basis[:large] ** 2).sum() / small)
    return float(torch.stack(found).quantile(level_in_force()))
