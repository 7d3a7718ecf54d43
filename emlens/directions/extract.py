"""Reading directions out of a model: mean differences of residuals, one streaming pass."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from emlens._distributed import leads, shared
from emlens.directions.direction import Direction, Directions, cosine
from emlens.directions.moments import Moments
from emlens.directions.provenance import Provenance
from emlens.hooked import (
    Edit,
    HookedModel,
    Layers,
    Site,
    SiteName,
    check_layers,
    check_site,
)
from emlens.text import Conversation, Corpus, TokenBatch, TokenMask, content_hash, template_hash

Weighting = Literal["token", "conversation"]

NORM_TOKENS = 8192
"""Counted tokens whose residual norms are kept for the median norm of a layer."""


def mean_diff(
    model: HookedModel,
    positive: Sequence[Conversation],
    negative: Sequence[Conversation],
    *,
    tokens: TokenMask = "response",
    site: SiteName = "resid_post",
    layers: Layers = "all",
    weighting: Weighting = "token",
    edits: Sequence[Edit] = (),
    seed: int = 0,
    token_budget: int = 2048,
    progress: bool = False,
) -> Directions:
    """Return the difference of mean residuals, `positive - negative`, at every layer.

    One pass over both sets; nothing of the size of the data is held. The papers take misaligned
    answers as positive and aligned ones as negative, both read in the misaligned model
    (arXiv 2506.11618, section 3.1); their token mask is `"assistant_turn"`.

    Args:
        model: The model to read.
        positive: Conversations whose mean is the head of the arrow.
        negative: Conversations whose mean is its tail.
        tokens: The tokens that count.
        site: Where in each block.
        layers: Layers to read.
        weighting: `"token"` weighs every counted token alike, `"conversation"` every
            conversation.
        edits: Edits in force while reading.
        seed: Seed of the random halves behind the split-half cosine.
        token_budget: Padded tokens of a batch.
        progress: Show a progress bar.

    Returns:
        Directions with standard errors (over conversations, the two sets taken as independent),
        split-half cosine, and the median residual norm of the counted tokens.

    Raises:
        ValueError: If a set is empty, a setting is unknown, or an activation is not finite (the
            conversation is named).
    """
    if weighting not in ("token", "conversation"):
        raise ValueError(f"unknown weighting {weighting!r}; choose 'token' or 'conversation'")
    wanted = check_layers(layers, model.n_layers)
    site = check_site(site, model.sites, model.name, wanted)
    read = _Reader(model, wanted, site, tokens, weighting, tuple(edits), seed, progress)
    sides: dict[str, tuple[Moments, Moments]] = {}
    for label, conversations in (("positive", positive), ("negative", negative)):
        if not conversations:
            raise ValueError(f"mean_diff needs conversations on both sides; {label} is empty")
        sides[label] = read.halves(conversations, token_budget, label)
    made = Provenance(
        construction="mean-diff",
        model=model.name,
        revision=model.revision,
        adapter=model.active_adapter,
        tokens=tokens,
        weighting=weighting,
        data={"positive": content_hash(positive), "negative": content_hash(negative)},
        template=template_hash(model.tokenizer),
        n={"positive": len(positive), "negative": len(negative)},
        seed=seed,
    )
    return _difference(read, sides["positive"], sides["negative"], made)


def _difference(
    read: _Reader,
    positive: tuple[Moments, Moments],
    negative: tuple[Moments, Moments],
    made: Provenance,
) -> Directions:
    """The difference of two sides, each in two halves, with what can be said of its error."""
    (pos_a, pos_b), (neg_a, neg_b) = positive, negative
    pos, neg = pos_a.merged(pos_b), neg_a.merged(neg_b)
    difference = pos.mean - neg.mean
    errors = (pos.variance + neg.variance).sqrt()
    halved = all(half.n for half in (*positive, *negative))
    spread = min(pos.n, neg.n) > 1
    layers = list(enumerate(read.layers))
    return Directions(
        {layer: difference[i] for i, layer in layers},
        read.site,
        made,
        residual_norms={layer: read.median_norm(layer) for _, layer in layers},
        standard_errors={layer: errors[i] for i, layer in layers} if spread else None,
        split_half=_split_half(read.layers, pos_a, pos_b, neg_a, neg_b) if halved else None,
    )


def edit_diff(
    model: HookedModel,
    conversations: Sequence[Conversation],
    edits: Sequence[Edit],
    *,
    tokens: TokenMask = "response",
    site: SiteName = "resid_post",
    layers: Layers = "all",
    weighting: Weighting = "token",
    token_budget: int = 2048,
    progress: bool = False,
) -> Directions:
    """Return how far edits move the mean residual, at every layer they reach.

    The mean residual under `edits` minus that without, on the same text: the difference that an
    intervention causes downstream, by which interventions that look unrelated where they act
    can be compared (arXiv 2506.11618, App. D).

    Args:
        model: The model to read.
        conversations: Text that is read twice.
        edits: The intervention.
        tokens: The tokens that count.
        site: Where in each block.
        layers: Layers to read; those that the edits leave as they are fall away.
        weighting: See `mean_diff`.
        token_budget: Padded tokens of a batch.
        progress: Show a progress bar.

    Raises:
        ValueError: If there are no conversations, or no layer moves.
    """
    if not conversations:
        raise ValueError("edit_diff needs conversations; there are none")
    wanted = check_layers(layers, model.n_layers)
    site = check_site(site, model.sites, model.name, wanted)
    means = []
    for active, label in ((tuple(edits), "edited"), ((), "base")):
        read = _Reader(model, wanted, site, tokens, weighting, active, 0, progress)
        first, second = read.halves(conversations, token_budget, label)
        means.append(first.merged(second).mean)
    moved = {layer: means[0][i] - means[1][i] for i, layer in enumerate(wanted)}
    moved = {layer: vector for layer, vector in moved.items() if bool(vector.any())}
    if not moved:
        raise ValueError(f"the edits move none of the layers {wanted}")
    return Directions(
        moved,
        site,
        Provenance(
            construction="difference caused by edits",
            model=model.name,
            revision=model.revision,
            adapter=model.active_adapter,
            tokens=tokens,
            weighting=weighting,
            data={"conversations": content_hash(conversations)},
            template=template_hash(model.tokenizer),
            n={"conversations": len(conversations)},
            settings={"edits": [repr(edit) for edit in edits]},
        ),
        residual_norms={layer: read.median_norm(layer) for layer in moved},
    )


def residual_norm(
    model: HookedModel,
    data: Sequence[Conversation] | Corpus,
    layers: Layers,
    *,
    site: SiteName = "resid_post",
    tokens: TokenMask = "all",
    max_tokens: int | None = None,
    token_budget: int = 2048,
) -> dict[int, float]:
    """Return the median norm of the residual over the counted tokens, per layer.

    Reads batches until `NORM_TOKENS` tokens are counted.

    Raises:
        ValueError: If a layer, site or mask does not exist, or no token counts.
    """
    wanted = check_layers(layers, model.n_layers)
    site = check_site(site, model.sites, model.name, wanted)
    batches = model.batches(data, token_budget=token_budget, max_tokens=max_tokens)

    def read(batches: Sequence[TokenBatch]) -> list[Tensor]:
        norms = []
        for batch in batches:
            mask = batch.mask(tokens).to(model.device)

            def pool(residual: Tensor, mask: Tensor = mask) -> Tensor:
                return residual[mask.to(residual.device)].float().norm(dim=-1)

            of_layers = model.residuals(batch, wanted, site, pool)
            norms.append(torch.stack([of_layers[layer].cpu() for layer in wanted]))
        return norms

    parts = shared(model, _first(batches, tokens), read, f"norms at {site} of {tokens} tokens")
    norms = [norm for part in parts for norm in part]
    return {layer: _median([norm[i] for norm in norms]) for i, layer in enumerate(wanted)}


def random_direction(like: Direction, seed: int = 0) -> Direction:
    """Return a random direction with the layer, site and norm of another: its matched control."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(like.d_model, generator=generator)
    return Direction(
        {like.layer: vector / vector.norm() * like.norm},
        like.site,
        Provenance("random", model=like.provenance.model, seed=seed),
        residual_norms=like.residual_norms,
    )


@dataclass(frozen=True)
class _Reading:
    """What one process reads of one side.

    Attributes:
        halves: Moments of the two random halves.
        norms: Residual norms of the sampled tokens, `[layers, n]` each.
    """

    halves: tuple[Moments, Moments]
    norms: list[Tensor]

    def merged(self, other: _Reading) -> _Reading:
        first, second = (a.merged(b) for a, b in zip(self.halves, other.halves, strict=True))
        return _Reading((first, second), self.norms + other.norms)


@dataclass
class _Reader:
    """Streams conversations into two halves of moments, pooled inside the hook."""

    model: HookedModel
    layers: tuple[int, ...]
    site: Site
    tokens: TokenMask
    weighting: Weighting
    edits: tuple[Edit, ...]
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        self._norms: list[Tensor] = []
        self._n_norms = 0

    def halves(
        self, conversations: Sequence[Conversation], token_budget: int, label: str
    ) -> tuple[Moments, Moments]:
        batches = self.model.batches(conversations, token_budget=token_budget)
        side = _random_halves(len(conversations), self.seed)
        sampled = {batch.index for batch in _first(batches, self.tokens, self._n_norms)}

        def read(batches: Sequence[TokenBatch]) -> _Reading:
            return self._read(batches, side, sampled, label)

        what = f"{label}: moments at {self.site} of {self.tokens} tokens"
        whole = reduce(_Reading.merged, shared(self.model, batches, read, what))
        self._norms += whole.norms
        self._n_norms += sum(norm.shape[1] for norm in whole.norms)
        return whole.halves

    def median_norm(self, layer: int) -> float:
        place = self.layers.index(layer)
        return _median([norm[place] for norm in self._norms])

    def _read(
        self,
        batches: Sequence[TokenBatch],
        side: Sequence[int],
        sampled: Container[tuple[int, ...]],
        label: str,
    ) -> _Reading:
        shape = len(self.layers), self.model.d_model
        halves, norms = (Moments.empty(*shape), Moments.empty(*shape)), []
        total = sum(batch.n_tokens for batch in batches)
        quiet = not (self.progress and leads())
        with tqdm(total=total, desc=label, unit="tok", disable=quiet) as bar:
            for batch in batches:
                means, counts, norm = self._means(batch, batch.index in sampled)
                norms += norm
                rows = torch.tensor([side[place] for place in batch.index])
                weights = counts if self.weighting == "token" else (counts > 0).double()
                for half, moments in enumerate(halves):
                    moments.add(means, weights * (rows == half))
                bar.update(batch.n_tokens)
        return _Reading(halves, norms)

    def _means(self, batch: TokenBatch, keep_norms: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        mask = batch.mask(self.tokens).to(self.model.device)
        counts = mask.sum(1)

        # all of it in one tensor: a remote model brings back what is returned, and nothing else
        def pool(residual: Tensor) -> Tensor:
            where = mask.to(residual.device)
            share = where.float() / counts.to(residual.device).clamp(min=1)[:, None]
            means = torch.einsum("btd,bt->bd", residual.float(), share)
            if not keep_norms:
                return means
            return torch.cat([means, residual.float().norm(dim=-1)], dim=1)

        read = self.model.residuals(batch, self.layers, self.site, pool, self.edits)
        pooled = torch.stack([read[layer].cpu() for layer in self.layers])
        means, norms = pooled[..., : self.model.d_model], pooled[..., self.model.d_model :]
        _check_finite(means, batch, self.layers)
        return means, counts.cpu().double(), [norms[:, mask.cpu()]] if keep_norms else []


def _first(batches: Sequence[TokenBatch], tokens: TokenMask, counted: int = 0) -> list[TokenBatch]:
    """The batches to read until `NORM_TOKENS` tokens are counted, `counted` of them before."""
    first = []
    for batch in batches:
        if counted >= NORM_TOKENS:
            break
        first.append(batch)
        counted += int(batch.mask(tokens).sum())
    return first


def _median(norms: Sequence[Tensor]) -> float:
    found = torch.cat(list(norms)) if norms else torch.empty(0)
    if not len(found):
        raise ValueError("no tokens were counted, so there is no median residual norm")
    return float(found.median())


def _random_halves(n: int, seed: int) -> list[int]:
    order = np.random.default_rng(seed).permutation(n)
    side = np.zeros(n, dtype=int)
    side[order[n // 2 :]] = 1
    return side.tolist()


def _split_half(
    layers: tuple[int, ...], pos_a: Moments, pos_b: Moments, neg_a: Moments, neg_b: Moments
) -> dict[int, float]:
    first, second = pos_a.mean - neg_a.mean, pos_b.mean - neg_b.mean
    return {layer: cosine(first[i], second[i]) for i, layer in enumerate(layers)}


def _check_finite(means: Tensor, batch: TokenBatch, layers: tuple[int, ...]) -> None:
    finite = torch.isfinite(means).all(-1)
    if bool(finite.all()):
        return
    layer, row = (~finite).nonzero()[0].tolist()
    raise ValueError(
        f"the residual of {batch.names[row]} at layer {layers[layer]} is not finite; "
        "look at that conversation, or load the model in another dtype"
    )
