"""What a LoRA adapter writes into the residual stream: directions, and their strength per token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from emlens._door import guard_methods, guarded
from emlens._progress import bar
from emlens._results import Shown
from emlens.directions.direction import Directions
from emlens.directions.provenance import Provenance
from emlens.hooked import Condition, HookedModel, ReadOptions, pools
from emlens.hooked.architecture import writes
from emlens.hooked.options import ReadSettings
from emlens.hooked.sites import Site, SiteName, check_site
from emlens.text import Conversation

if TYPE_CHECKING:
    import pandas as pd

_ELSEWHERE: Mapping[Site, str] = dict.fromkeys(
    ("resid_pre", "resid_mid", "resid_post"), "what it adapts adds at attn_out or mlp_out"
)


@guard_methods
@dataclass(frozen=True, repr=False)
class AdapterScalars(Shown):
    """How strongly an adapter acts at each token.

    Attributes:
        adapter: The adapter.
        site: Where it writes.
        scalars: `A . h` at each counted token and adapted layer, before the adapter's scale:
            what it adds to the stream is `scalar * vector`, with the vectors of
            `adapter_vectors`. `{layer: [tokens]}`.
        conversations: The conversation of each token, `[tokens]`.
        positions: Its position in the conversation, `[tokens]`.
        token_ids: The token, `[tokens]`.
        names: Name of each conversation.
    """

    adapter: str
    site: Site
    scalars: Mapping[int, Float[Tensor, " tokens"]]
    conversations: Tensor
    positions: Tensor
    token_ids: Tensor
    names: tuple[str, ...]

    def table(self) -> pd.DataFrame:
        """One row per token and layer."""
        import pandas as pd

        tokens = pd.DataFrame(
            {
                "conversation": [self.names[i] for i in self.conversations.tolist()],
                "position": self.positions.tolist(),
                "token id": self.token_ids.tolist(),
            }
        )
        layers = [
            tokens.assign(layer=layer, scalar=values.tolist())
            for layer, values in self.scalars.items()
        ]
        return pd.concat(layers, ignore_index=True)

    def _said(self) -> str:
        layers = ", ".join(map(str, self.scalars))
        return f"{self.adapter} at {len(self.token_ids)} tokens, {self.site}, layers {layers}"


@guarded
def adapter_vectors(
    model: HookedModel, adapter: str, *, site: SiteName | None = None, column: int | None = None
) -> Directions:
    """Return the columns of `B` by which an adapter writes into the residual stream.

    They include the adapter's scale, `alpha / r` or `alpha / sqrt(r)` (rsLoRA): a rank-1 adapter
    adds `(A . h) * vector`, with `A . h` from `adapter_scalars` (arXiv 2506.11618, section 4).

    Args:
        model: A model with adapters.
        adapter: Its name.
        site: `attn_out` or `mlp_out`; needed where the adapter writes at both.
        column: The column of `B`, for an adapter of higher rank.

    Returns:
        One vector per adapted layer.

    Raises:
        ValueError: If there is no such adapter, it writes nowhere or not directly into the
            stream, has a higher rank and no column is given, or is not plain LoRA.
    """
    at, layers = _writers(model, adapter, site)
    vectors = {}
    for number, (path, layer) in layers.items():
        weight = layer.lora_B[adapter].weight.detach()
        kept = choose_column(weight.shape[1], column, adapter, path)
        vectors[number] = layer.scaling[adapter] * weight[:, kept].float().cpu()
    made = Provenance(
        construction="LoRA B",
        model=model.name,
        revision=model.revision,
        adapter=adapter,
        settings={"modules": [path for path, _ in layers.values()], "column": column or 0},
        identity=model.identity,
        condition=Condition((adapter,)).identity(model),
    )
    return Directions(vectors, at, made)


@torch.no_grad()
@guarded
def adapter_scalars(
    model: HookedModel,
    conversations: Sequence[Conversation],
    adapter: str,
    *,
    site: SiteName | None = None,
    column: int | None = None,
    **options: Unpack[ReadOptions],
) -> AdapterScalars:
    """Return `A . h` at every counted token, for every layer that an adapter writes at.

    Read with the adapter active, so that upper layers see what lower ones have added.

    Args:
        model: A model with adapters.
        conversations: Text to read.
        adapter: The adapter's name.
        site: `attn_out` or `mlp_out`; needed where the adapter writes at both.
        column: The row of `A`, for an adapter of higher rank.
        **options: See `ReadOptions`.

    Raises:
        ValueError: If there are no conversations, or as `adapter_vectors`.
    """
    reading = ReadSettings(**options)
    at, layers = _writers(model, adapter, site)
    rows = {
        number: choose_column(layer.lora_A[adapter].weight.shape[0], column, adapter, path)
        for number, (path, layer) in layers.items()
    }
    found: list[tuple[Tensor, ...]] = []
    with model.adapter(adapter), _products(layers, adapter) as products:
        batches = model.batches(conversations, token_budget=reading.token_budget)
        for batch in bar(batches, desc="scalars", unit="batch", shown=reading.progress):
            model.residuals(batch, max(layers), pool=pools.first_token)
            counted = batch.mask(reading.tokens)
            places = torch.tensor(batch.index)[:, None].expand_as(counted)
            # positions of a left-padded row begin after its padding
            positions = batch.position_ids
            values = [products[n][..., rows[n]].float().cpu()[counted] for n in layers]
            found.append(
                (
                    places[counted],
                    positions[counted],
                    batch.input_ids[counted],
                    torch.stack(values),
                )
            )
    if not sum(len(part[0]) for part in found):
        raise ValueError(
            f"conversations: no token of the {len(conversations)} is counted "
            f"(tokens={reading.tokens!r}); do they have answers?"
        )
    where, position, ids = (torch.cat([part[i] for part in found]) for i in range(3))
    order = torch.argsort(where * (int(position.max()) + 1) + position)
    scalars = torch.cat([part[3] for part in found], dim=1)[:, order]
    return AdapterScalars(
        adapter,
        at,
        dict(zip(layers, scalars, strict=True)),
        where[order],
        position[order],
        ids[order],
        tuple(item.id or f"conversation {i}" for i, item in enumerate(conversations)),
    )


@contextmanager
def _products(layers: Mapping[int, tuple[str, Any]], adapter: str) -> Iterator[dict[int, Tensor]]:
    """`A h` of the last forward pass, `[batch, pos, r]`, as it comes out of each layer's `A`."""
    seen: dict[int, Tensor] = {}

    def keep(number: int):
        return lambda _module, _inputs, output: seen.__setitem__(number, output)

    hooks = [
        layer.lora_A[adapter].register_forward_hook(keep(number))
        for number, (_, layer) in layers.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _writers(
    model: HookedModel, adapter: str, site: SiteName | None
) -> tuple[Site, dict[int, tuple[str, Any]]]:
    """The layers of an adapter that write into the stream at one site, by block."""
    layers = model.lora_layers(adapter)
    places = {path: _place(model, path) for path in layers}
    at, paths = choose_writers(adapter, places, site)
    for path in paths.values():
        dora = bool(getattr(layers[path], "use_dora", {}).get(adapter))
        check_plain(adapter, path, dora, bool(getattr(layers[path], "lora_bias", {}).get(adapter)))
    return at, {number: (path, layers[path]) for number, path in paths.items()}


def choose_writers(
    adapter: str, places: Mapping[str, tuple[int, Site] | None], site: SiteName | None
) -> tuple[Site, dict[int, str]]:
    """Return the modules of an adapter that write into the stream at one site.

    Args:
        adapter: What errors call it.
        places: The block and site that each module writes at, by its path; None if it does not.
        site: The site, where the adapter writes at both.

    Returns:
        The site, and the path at each block.

    Raises:
        ValueError: If it does not write into the stream, or not at one place.
    """
    asked = None if site is None else check_site(site, _ELSEWHERE, f"adapter {adapter!r}")
    found: dict[Site, dict[int, str]] = {}
    for path, place in places.items():
        if place is None:
            continue
        number, at = place
        if number in found.setdefault(at, {}):
            raise ValueError(
                f"adapter {adapter!r} writes at {at} of layer {number} more than once "
                f"({found[at][number]}, {path}), as in a mixture of experts; there is no one "
                "vector"
            )
        found[at][number] = path
    if not found:
        raise ValueError(
            f"adapter {adapter!r} does not write into the residual stream directly: "
            f"{next(iter(places))} is read by the rest of its block, or normed before it is "
            "added; its effect can be read with model.residuals or edit_diff"
        )
    if asked is None and len(found) > 1:
        raise ValueError(
            f"adapter {adapter!r} writes at {' and '.join(found)}; name one with site="
        )
    at = asked or next(iter(found))
    if at not in found:
        raise ValueError(f"adapter {adapter!r} writes at {', '.join(found)}, not at {at}")
    return at, dict(sorted(found[at].items()))


def _place(model: HookedModel, path: str) -> tuple[int, Site] | None:
    """The block and site that a module writes at; None if it does not."""
    parts = model.architecture
    inside = re.fullmatch(rf"{re.escape(parts.blocks)}\.(\d+)\.(.+)", path)
    if inside is None or not writes(path):
        return None
    number, rest = int(inside[1]), inside[2]
    if rest.startswith(f"{parts.attn_out}."):
        return number, "attn_out"
    if rest.startswith(f"{parts.mlp_out}."):
        return number, "mlp_out"
    return None


def check_plain(adapter: str, path: str, dora: bool, bias: bool) -> None:
    """Refuse a module to which an adapter does more than add `B A h`.

    Raises:
        ValueError: If it does.
    """
    if dora:
        raise ValueError(
            f"adapter {adapter!r} is DoRA at {path}: it rescales the weight as well, so what it "
            "adds is no multiple of a column of B"
        )
    if bias:
        raise ValueError(f"adapter {adapter!r} has a bias at {path}, which B alone does not give")


def choose_column(rank: int, column: int | None, adapter: str, path: str) -> int:
    """Return the column of `B` to take; of several, one has to be named.

    Raises:
        ValueError: If it has to be and is not, or there is no such column.
    """
    if column is None and rank > 1:
        raise ValueError(
            f"adapter {adapter!r} has rank {rank} at {path}, so B has {rank} columns; name one "
            "with column="
        )
    if column is not None and not 0 <= column < rank:
        raise ValueError(
            f"adapter {adapter!r} has rank {rank} at {path}: there is no column {column}"
        )
    return column or 0
