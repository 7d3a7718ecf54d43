"""Projections of answers onto directions, one number per conversation and direction."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Self, Unpack

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emlens._distributed import shared
from emlens._progress import bar
from emlens.directions import Directions, residual_norm
from emlens.hooked import HookedModel, ReadOptions, pools
from emlens.hooked.options import ReadSettings
from emlens.hooked.sites import Site, check_layers, check_site
from emlens.text import Conversation, TokenBatch, TokenMask, pack, tokenize
from emlens.text.tokens import TokenRow

AnyDirections = Directions | Mapping[str, Directions]
"""Directions of any number of layers, or several of them by name."""

ONE = "direction"
"""The name of directions that were given without one."""


@dataclass(frozen=True, eq=False)
class Readout:
    """A weighted sum of projections, each at one layer, in units of the median residual norm.

    The projection of a conversation is the mean over its answer tokens of `h . u / m`, `u` the
    unit direction and `m` the median residual norm at that layer.

    Attributes:
        names: Name of the direction of each column, `[k]`.
        layers: Layer of each column, `[k]`.
        vectors: `u / m` of each column, `[k, d_model]`.
        weights: Weight of each column in the score, `[k]`.
        offset: Added to the score.
        site: Where the residual is read.
        model: Name of the model that the columns belong to.
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]
    vectors: Float[Tensor, "k d_model"]
    weights: Float[np.ndarray, " k"]
    offset: float
    site: Site
    model: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Name of each column: its layer, with the name of the direction if there are several."""
        several = len(set(self.names)) > 1
        return tuple(
            f"{name}, layer {layer}" if several else f"layer {layer}"
            for name, layer in zip(self.names, self.layers, strict=True)
        )

    def score(self, projections: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
        """The weighted sum of each row."""
        return projections @ self.weights + self.offset

    def keeping(self, columns: Sequence[int], weights: Sequence[float], offset: float = 0) -> Self:
        """Some of the columns, with new weights."""
        chosen = list(columns)
        return replace(
            self,
            names=tuple(self.names[i] for i in chosen),
            layers=tuple(self.layers[i] for i in chosen),
            vectors=self.vectors[chosen],
            weights=np.asarray(weights, dtype=float),
            offset=float(offset),
        )

    def check(self, model: HookedModel) -> None:
        """Refuse a model that does not fit these columns.

        Raises:
            ValueError: If width, layers or site differ.
        """
        width = self.vectors.shape[1]
        if width != model.d_model:
            raise ValueError(
                f"the directions have width {width}, the residual stream of {model.name} has "
                f"width {model.d_model}: they belong to another model ({self.model})"
            )
        model.check_site(self.site, check_layers(self.layers, model.n_layers))

    @torch.no_grad()
    def read(
        self,
        model: HookedModel,
        conversations: Sequence[Conversation],
        *,
        answer_tokens: int | None = None,
        max_tokens: int | None = None,
        description: str = "projections",
        **options: Unpack[ReadOptions],
    ) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, " n"]]:
        """Return the projections of each conversation, and how many tokens counted.

        One pass, batched, pooled on the device; blocks above the highest layer do not run.

        Args:
            model: The model.
            conversations: What it reads.
            answer_tokens: Count only the last answer of each conversation, and of it this many
                tokens from its start.
            max_tokens: Cut longer conversations at their end; with `answer_tokens`,
                a last answer that begins beyond it is an error.
            description: Name in the progress bar and in errors.
            **options: See `ReadOptions`.

        Raises:
            ValueError: If a conversation has no token that counts; it is named.
            NonFiniteError: If a residual is not finite.
        """
        self.check(model)
        reading = ReadSettings(**options)
        tokens, layers = reading.tokens, sorted(set(self.layers))
        if answer_tokens is None:
            rows = tokenize(conversations, model.template, max_tokens=max_tokens, truncate=True)
        else:
            # counted tokens do not depend on what follows
            whole = tokenize(conversations, model.template)
            rows = [_cut(row, answer_tokens, max_tokens) for row in whole]
        batches = pack(rows, token_budget=reading.token_budget, pad_id=model.pad_id)

        def run(batches: Sequence[TokenBatch]) -> np.ndarray:
            table = np.zeros((len(conversations), 1 + len(self.layers)))
            total = sum(batch.n_tokens for batch in batches)
            with bar(total=total, desc=description, unit="tok", shown=reading.progress) as shown:
                for batch in batches:
                    mask = batch.mask(tokens)
                    if answer_tokens is not None:
                        mask = _start_of_last_answer(mask, answer_tokens)
                    _check_counted(mask, batch, tokens)
                    found = self._pooled(model, batch, mask, layers)
                    table[list(batch.index)] = np.column_stack([mask.sum(1).numpy(), found])
                    shown.update(batch.n_tokens)
            return table

        what = f"{description} of {tokens} tokens at {self.site}, {', '.join(self.columns)}"
        table = reduce(np.add, shared(model, batches, run, what))
        return table[:, 1:], table[:, 0].astype(int)

    def _pooled(
        self, model: HookedModel, batch: TokenBatch, mask: Tensor, layers: Sequence[int]
    ) -> np.ndarray:
        # a pool does not know its layer, so all columns are read at every layer; only those
        # of the layer are kept
        read = model.residuals(batch, layers, self.site, pools.mean_along(mask, self.vectors))
        columns = [read[layer][:, i].cpu() for i, layer in enumerate(self.layers)]
        return torch.stack(columns, dim=1).numpy()


def readout_of(
    model: HookedModel,
    directions: AnyDirections,
    conversations: Sequence[Conversation],
    **options: Unpack[ReadOptions],
) -> Readout:
    """Return one column per direction and layer, each with weight 0, checked against the model.

    Args:
        model: The model.
        directions: Directions of any number of layers, or several by name, all at one site.
        conversations: Text on which the median residual norm is measured, at layers whose
            directions do not include it.
        **options: See `ReadOptions`.

    Raises:
        ValueError: If there are none, sites differ, a vector is zero, or they do not fit the
            model.
    """
    named = {ONE: directions} if isinstance(directions, Directions) else dict(directions)
    if not named:
        raise ValueError("no directions were given; pass directions, or {name: directions}")
    sites = {name: one.site for name, one in named.items()}
    if len(set(sites.values())) > 1:
        raise ValueError(f"the directions lie at different sites: {sites}; use those of one site")
    places = [(name, layer) for name, one in named.items() for layer in one]
    units = [named[name].at([layer]).unit().vectors[layer] for name, layer in places]
    widths = {name: one.d_model for name, one in named.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"the directions have different widths: {widths}")
    found = Readout(
        names=tuple(name for name, _ in places),
        layers=tuple(layer for _, layer in places),
        vectors=torch.stack(units),
        weights=np.zeros(len(places)),
        offset=0.0,
        site=check_site(next(iter(sites.values()))),
        model=model.name,
    )
    found.check(model)
    _note_origins(model, named)
    sizes = _sizes(model, named, found, conversations, ReadSettings(**options))
    scale = torch.tensor([sizes[place] for place in places])
    return replace(found, vectors=found.vectors / scale[:, None])


def _sizes(
    model: HookedModel,
    named: Mapping[str, Directions],
    readout: Readout,
    conversations: Sequence[Conversation],
    reading: ReadSettings,
) -> dict[tuple[str, int], float]:
    """The median residual norm for each column: the directions' own, or measured here."""
    places = list(zip(readout.names, readout.layers, strict=True))
    missing = sorted({at for name, at in places if at not in named[name].residual_norms})
    measured: dict[int, float] = {}
    if missing:
        measured = residual_norm(
            model,
            conversations,
            missing,
            site=readout.site,
            tokens=reading.tokens,
            token_budget=reading.token_budget,
        )
    return {
        (name, layer): named[name].residual_norms.get(layer, measured.get(layer, float("nan")))
        for name, layer in places
    }


def _note_origins(model: HookedModel, named: Mapping[str, Directions]) -> None:
    for name, one in named.items():
        origin = one.provenance.model
        if origin not in (None, model.name):
            warnings.warn(
                f"{name} was made in {origin!r}, but this model is {model.name!r}; if both are the "
                "same model, give wrap or load the same name",
                stacklevel=5,
            )


def _cut(row: TokenRow, n: int, max_tokens: int | None) -> TokenRow:
    """The row up to the first `n` tokens of its last answer, and to `max_tokens` in all.

    Raises:
        ValueError: If nothing of that answer is within `max_tokens`.
    """
    after = zip((False, *row.response), row.response, strict=False)
    starts = [i for i, (before, here) in enumerate(after) if here and not before]
    end = starts[-1] + n if starts else len(row)
    if max_tokens is not None:
        if starts and starts[-1] >= max_tokens:
            raise ValueError(
                f"max_tokens={max_tokens} leaves nothing of the last answer of {row.name}, which "
                f"begins at token {starts[-1]}; raise it, or leave the conversation out"
            )
        end = min(end, max_tokens)
    return row.cut(end)


def _start_of_last_answer(mask: Bool[Tensor, "batch pos"], n: int) -> Bool[Tensor, "batch pos"]:
    """The first `n` tokens of the last run of counted tokens in each row."""
    before = torch.zeros_like(mask)
    before[:, 1:] = mask[:, :-1]
    run = (mask & ~before).cumsum(1)
    last = mask & (run == run.amax(dim=1, keepdim=True))
    return last & (last.cumsum(1) <= n)


def _check_counted(mask: Tensor, batch: TokenBatch, tokens: TokenMask) -> None:
    empty = (mask.sum(1) == 0).nonzero()
    if len(empty):
        name = batch.names[int(empty[0])]
        raise ValueError(f"{name} has no {tokens} tokens to project; leave it out")
