"""Where in a block the residual stream can be read or edited."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

Site = Literal["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
"""A place in a decoder block.

`resid_pre` is the block's input, `attn_out` and `mlp_out` are what attention and MLP add to
the stream (after a post-norm, where the architecture has one), `resid_mid` is
`resid_pre + attn_out`, and `resid_post` is the block's output, never after the final norm.
"""

SITES: tuple[Site, ...] = get_args(Site)
"""All sites, in the order in which a forward pass reaches them."""

Layers = int | Iterable[int] | Literal["all"]
"""One layer, several, or `"all"`. Negative numbers count from the end."""


def check_site(site: str, available: Iterable[str] = SITES, model: str = "this model") -> Site:
    """Return `site` when it is one of `available`.

    Args:
        site: The name to check.
        available: The sites that exist.
        model: The name to put into the error.

    Raises:
        ValueError: If the site is unknown, or the architecture does not have it.
    """
    known = tuple(available)
    for name in SITES:
        if name == site:
            if name not in known:
                raise ValueError(
                    f"{model} has no site {site!r} (its blocks run attention and MLP in a way "
                    f"that never forms it); it has {', '.join(known)}"
                )
            return name
    raise ValueError(f"unknown site {site!r}; the sites are {', '.join(SITES)}")


def check_layers(layers: Layers, n_layers: int) -> tuple[int, ...]:
    """Return `layers` as a sorted tuple of unique indices in `0 .. n_layers - 1`.

    Raises:
        ValueError: If a layer is out of range, or none is named.
    """
    if layers == "all":
        return tuple(range(n_layers))
    wanted = [layers] if isinstance(layers, int) else list(layers)
    if not wanted:
        raise ValueError("no layers were named; give one, several, or 'all'")
    for layer in wanted:
        if not isinstance(layer, int) or not -n_layers <= layer < n_layers:
            raise ValueError(
                f"layer {layer!r} is out of range: the model has {n_layers} layers, "
                f"0 to {n_layers - 1}"
            )
    return tuple(sorted({layer % n_layers for layer in wanted}))
