"""The protocol of edits of the forward pass, and where they act."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from emlens._arguments import shown
from emlens.hooked.sites import Site, check_layers, check_site
from emlens.text import TokenBatch

Where = Literal["all", "prompt", "response"]
"""The positions an edit acts on.

`"all"` is every token; `"prompt"` every token outside the response; `"response"` every
position from which a response token is predicted, or that holds one: the last prompt token
belongs to it, so that the first generated token is edited too.
"""

Formula = tuple[Callable[..., Tensor], tuple]
"""A pure function of a residual, and what it takes besides the residual."""


@runtime_checkable
class Edit(Protocol):
    """A change of the residual stream at one site of one or more layers.

    `delta` is a pure function: it maps the residual at a layer to what is added to it. Engines
    compute `residual + mask * delta(residual, layer)`, so an edit is the same arithmetic on each.

    To run remotely, where its class is not installed, an edit may have a method `formula(layer) ->
    (function, arguments)`, such that `delta(residual, layer)` is `function(residual, *arguments)`:
    a plain function of tensors and numbers that uses torch alone.
    """

    @property
    def site(self) -> Site: ...

    @property
    def layers(self) -> Sequence[int]: ...

    @property
    def where(self) -> Where: ...

    def delta(
        self, residual: Float[Tensor, "batch pos d_model"], layer: int
    ) -> Float[Tensor, "batch pos d_model"]: ...


def has_formula(edit: Edit) -> bool:
    """Whether the edit's formula belongs to its delta, and not to one that it replaced."""
    for kind in type(edit).__mro__:
        if "formula" in vars(kind):
            return True
        if "delta" in vars(kind):
            return False
    return hasattr(edit, "formula")


def deepest_prefix(edits: Iterable[Edit]) -> int | None:
    """Return the deepest layer whose output no edit changes, or None for no edits at all.

    -1 means that even the first block is affected. An edit at `resid_post` of layer `l` acts
    on that block's output, which can itself be computed once, so the answer is `l`; at any
    other site the block has to run again, so it is `l - 1`.
    """
    depths = [
        layer if check_site(edit.site) == "resid_post" else layer - 1
        for edit in edits
        for layer in edit.layers
    ]
    return min(depths) if depths else None


def where_mask(batch: TokenBatch, where: Where) -> Bool[Tensor, "batch pos"] | None:
    """Return the positions of `batch` an edit acts on; None stands for all of them.

    Raises:
        ValueError: If `where` is not one of `all`, `prompt`, `response`.
    """
    if where == "all":
        return None
    if where == "prompt":
        return batch.mask("prompt")
    if where == "response":
        # all that the model writes, its thinking included
        response = batch.mask("thinking_and_response")
        predicts = torch.zeros_like(response)
        predicts[:, :-1] = response[:, 1:]
        return response | predicts
    raise ValueError(f"unknown where {where!r}; choose all, prompt or response")


def check_edits(
    edits: Sequence[Edit],
    model: str,
    missing: Mapping[Site, str],
    n_layers: int,
    d_model: int,
) -> None:
    """Refuse edits that a model cannot carry out.

    Raises:
        TypeError: If something is not an edit, or edits are not in a sequence.
        ValueError: If a site, a layer or a width is not the model's, or a layer is negative or
            named twice.
    """
    if isinstance(edits, Edit):
        raise TypeError(f"edits must be a sequence of edits, e.g. [{type(edits).__name__}(...)]")
    if isinstance(edits, (str, Mapping)) or not isinstance(edits, Iterable):
        raise TypeError(f"edits must be a sequence of edits, not {shown(edits)}")
    for edit in edits:
        if not isinstance(edit, Edit):
            raise TypeError(
                f"{type(edit).__name__} is not an edit: it needs site, layers, where and "
                "delta(residual, layer); wrap a direction in Add, Ablate or Clamp"
            )
        check_site(edit.site, missing, model, edit.layers)
        _check_depths(edit, n_layers)
        width = getattr(edit, "d_model", d_model)
        if width != d_model:
            raise ValueError(
                f"{type(edit).__name__} has width {width}, but {model} has d_model {d_model}: "
                "the direction comes from another model"
            )


def _check_depths(edit: Edit, n_layers: int) -> None:
    """Refuse layers that an engine would pass by, or meet once where twice is asked for."""
    name, layers = type(edit).__name__, list(edit.layers)
    check_layers(layers, n_layers)
    below = [layer for layer in layers if layer < 0]
    if below:
        raise ValueError(
            f"{name} acts at layer {below[0]}, but an edit counts its layers from 0; in this model "
            f"that is layer {below[0] + n_layers}"
        )
    twice = [layer for layer in layers if layers.count(layer) > 1]
    if twice:
        raise ValueError(
            f"{name} names layer {twice[0]} more than once; for twice the effect use a larger "
            "scale, or two edits"
        )
