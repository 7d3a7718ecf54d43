"""Whether directions fit a model: its width, its layers, and the site that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from emlens.directions.direction import Directions
from emlens.hooked import HookedModel
from emlens.hooked.sites import Site


def check_fits(
    model: HookedModel,
    directions: Directions,
    what: str,
    *,
    site: Site | None = None,
    layers: Sequence[int] = (),
) -> None:
    """Refuse directions of another model, and those of another place than is asked for.

    Args:
        model: The model.
        directions: The directions.
        what: What errors call them.
        site: The site they have to be at; any by default.
        layers: Layers they have to have.

    Raises:
        ValueError: Naming what differs.
    """
    if directions.d_model != model.d_model:
        raise ValueError(
            f"{what} has width {directions.d_model}, but {model.name} has d_model "
            f"{model.d_model}: it comes from another model"
        )
    beyond = [layer for layer in directions.layers if layer >= model.n_layers]
    if beyond:
        raise ValueError(
            f"{what} is at layer {beyond[0]}, but {model.name} has layers 0 to "
            f"{model.n_layers - 1}: it comes from another model"
        )
    if site is not None and directions.site != site:
        raise ValueError(f"{what} is at {directions.site}, and {site} is asked for")
    missing = [layer for layer in layers if layer not in directions.layers]
    if missing:
        raise ValueError(
            f"{what} has layers {directions.layers}, but layer {missing[0]} is asked for; for the "
            "same vector at another layer give Direction.of(vector, layer)"
        )
