"""Where in a block the residual stream can be read or edited."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from emlens._arguments import shown, text, wholes
from emlens._kinds import kind

Site = Literal["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
"""A place in a decoder block.

`resid_pre` is the block's input, `attn_out` and `mlp_out` are what attention and MLP add to
the stream (after a post-norm, where the architecture has one), `resid_mid` is
`resid_pre + attn_out`, and `resid_post` is the block's output, never after the final norm.
"""

SITES: tuple[Site, ...] = get_args(Site)
"""All sites, in the order in which a forward pass reaches them."""

SiteName = Site | str
"""A site, by its own name or by TransformerLens': `resid_post`, `hook_resid_post`,
`blocks.{l}.hook_resid_post`; with a number for `{l}`, it has to be the layer asked for."""

_HOOK = re.compile(r"(?:blocks\.(?P<layer>\d+|\*|\{\w+\})\.)?hook_(?P<site>\w+)")

Layers = int | Iterable[int] | Literal["all"]
"""One layer, several, or `"all"`. Negative numbers count from the end."""

kind(SiteName, words="a site")(text)


@kind(Layers, words="layers")
def _layers(name: str, value: Any) -> Any:
    """Layers before the model is known, which says how many there are."""
    if isinstance(value, str) and value == "all":
        return value
    found = named_layers(value, name)
    return (
        found if isinstance(value, Iterable) and getattr(value, "shape", None) != () else found[0]
    )


def check_site(
    site: SiteName,
    missing: Mapping[Site, str] | None = None,
    model: str = "this model",
    layers: Iterable[int] | None = None,
) -> Site:
    """Return the site that `site` names, unless the model does not have it.

    Args:
        site: The name to check, emlens' own or TransformerLens'.
        missing: The sites that do not exist, and why.
        model: The model's name, for the error.
        layers: The layers it is used with; a TransformerLens name may contain one.

    Raises:
        ValueError: If the site is unknown, the architecture does not have it, or the name
            carries another layer.
    """
    if not isinstance(site, str):
        raise TypeError(f"site must be text, e.g. 'resid_post', not {shown(site)}")
    missing = missing or {}
    hook = _HOOK.fullmatch(site)
    plain = hook["site"] if hook else site
    for name in SITES:
        if name == plain:
            if name in missing:
                there = ", ".join(one for one in SITES if one not in missing)
                raise ValueError(f"{model} has no site {site!r}: {missing[name]}; it has {there}")
            if hook and (hook["layer"] or "").isdigit():
                _check_numbered(site, int(hook["layer"]), layers)
            return name
    raise ValueError(
        f"unknown site {site!r}; the sites are {', '.join(SITES)}, or TransformerLens' names of "
        "them, e.g. hook_resid_post"
    )


def hook_name(layer: int, site: Site) -> str:
    """TransformerLens' name of a site: `blocks.15.hook_resid_post`."""
    return f"blocks.{layer}.hook_{site}"


def _check_numbered(site: str, layer: int, layers: Iterable[int] | None) -> None:
    wanted = None if layers is None else set(layers)
    if wanted != {layer}:
        asked = "no layer is" if wanted is None else f"layers {sorted(wanted)} are"
        raise ValueError(
            f"site {site!r} names layer {layer}, but {asked} asked for; write "
            f"'hook_{site.rsplit('hook_')[-1]}' and give the layers separately"
        )


def check_layers(layers: Layers, n_layers: int) -> tuple[int, ...]:
    """Return `layers` as a sorted tuple of unique indices in `0 .. n_layers - 1`.

    Raises:
        ValueError: If a layer is not a whole number or out of range, or there are none.
    """
    if isinstance(layers, str) and layers == "all":
        return tuple(range(n_layers))
    wanted = named_layers(layers)
    for layer in wanted:
        if not -n_layers <= layer < n_layers:
            raise ValueError(
                f"layer {layer} is out of range: the model has {n_layers} layers, "
                f"0 to {n_layers - 1}"
            )
    return tuple(sorted({layer % n_layers for layer in wanted}))


def named_layers(layers: int | Iterable[int] | str, name: str = "layers") -> tuple[int, ...]:
    """Return the layers that were named, in the order given, where the model is not known yet.

    Raises:
        ValueError: If one is not a whole number, or there are none.
    """
    if isinstance(layers, str) and layers == "all":
        raise ValueError(
            f"{name} 'all' needs a model, which says how many there are; name them, e.g. "
            "range(model.n_layers)"
        )
    if isinstance(layers, (str, bytes, Mapping)):
        raise ValueError(f"{name} must be whole numbers, or 'all', not {shown(layers)}")
    return wholes(name, layers)
