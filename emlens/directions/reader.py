"""One streaming pass over conversations: what every construction of a direction is made of."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from emlens._distributed import leads, shared
from emlens.directions.counting import Counting
from emlens.directions.moments import Moments
from emlens.hooked import Condition, ConditionLike, HookedModel, Site, condition_of
from emlens.text import Conversation, TokenBatch, warn_of_repeats

Side = tuple[HookedModel, Condition]
"""A model, and what it runs under while it is read."""

NORM_TOKENS = 8192
"""Counted tokens whose residual norms are kept for the median norm of a layer."""

PARTS = 8
"""Random parts of a set; every way to make two halves of them is a split of the data."""

SAMPLE_BYTES, SAMPLE_SHARE = 64 * 2**20, 0.02
"""Bytes that the kept means of single conversations may take, both sides together; or this share
of the model's weights, where that is more."""

FITTED_BYTES = 2 * 2**30
"""The same where a construction is fitted to single conversations: probes, PCA."""


@dataclass(frozen=True)
class Sample:
    """Means of single conversations, for what cannot be streamed.

    Attributes:
        places: Place of each conversation in its set, `[n]`, ascending.
        means: Mean of its counted activations, `[layers, n, d_model]`.
        counts: Its counted tokens, `[n]`.
    """

    places: Tensor
    means: Float[Tensor, "layers n d_model"]
    counts: Float[Tensor, " n"]

    def merged(self, other: Sample) -> Sample:
        """Both, in the order of the set."""
        places = torch.cat([self.places, other.places])
        order = places.argsort()
        means = torch.cat([self.means, other.means], dim=1)[:, order]
        return Sample(places[order], means, torch.cat([self.counts, other.counts])[order])


@dataclass(frozen=True)
class Reading:
    """What one pass over a set of conversations gave.

    Attributes:
        parts: Moments of random parts of the set, as even as they go.
        norms: Residual norms of counted tokens, `[layers, n]` each.
        sample: Means of single conversations.
    """

    parts: tuple[Moments, ...]
    norms: list[Tensor]
    sample: Sample

    @property
    def moments(self) -> Moments:
        return reduce(Moments.merged, self.parts)

    def merged(self, other: Reading) -> Reading:
        parts = tuple(a.merged(b) for a, b in zip(self.parts, other.parts, strict=True))
        return Reading(parts, self.norms + other.norms, self.sample.merged(other.sample))


@dataclass
class Reader:
    """Reads sets of conversations at the same layers, site and tokens.

    Args:
        layers: Layers to read.
        site: Where in each block.
        counting: What counts.
    """

    layers: tuple[int, ...]
    site: Site
    counting: Counting
    _norms: list[Tensor] = field(default_factory=list)

    def read(self, side: Side, conversations: Sequence[Conversation], label: str) -> Reading:
        """Read one set with one model.

        Raises:
            ValueError: If the set is empty, or no token of it counts.
            NonFiniteError: If an activation is not finite.
        """
        return self.read_together([side], conversations, label)[0][0]

    def read_together(
        self, sides: Sequence[Side], conversations: Sequence[Conversation], label: str
    ) -> tuple[list[Reading], list[Reading]]:
        """Read the same text with several models or conditions, batch by batch.

        Returns:
            The reading of each, and those of the differences of all but the last from the last,
            conversation by conversation: their standard errors know that the text was the same.
        """
        what = label if label == "conversations" else f"{label} conversations"
        warn_of_repeats(conversations, what)
        model = sides[-1][0]
        batches = model.batches(conversations, token_budget=self.counting.token_budget)
        part = _random_parts(len(conversations), self.counting.seed)
        kept = self._places(len(conversations), model)
        counted = sum(norm.shape[1] for norm in self._norms)
        norms = {batch.index for batch in first_batches(batches, self.counting.mask, counted)}

        def read(batches: Sequence[TokenBatch]) -> list[Reading]:
            return self._pass(sides, batches, part, kept, norms, label)

        done = f"{label}: moments at {self.site} of {self.counting.tokens} tokens"
        shares = shared(model, batches, read, done)
        readings = [reduce(Reading.merged, group) for group in zip(*shares, strict=True)]
        if readings[len(sides) - 1].moments.weight == 0:
            raise ValueError(
                f"{label}: none of its {len(conversations)} conversation(s) has tokens that count "
                f"(tokens={self.counting.tokens!r}, skip_first={self.counting.skip_first}); give "
                "them answers, or count other tokens"
            )
        self._norms += readings[len(sides) - 1].norms
        return readings[: len(sides)], readings[len(sides) :]

    def median_norm(self, layer: int) -> float:
        """Median norm of the residual over the counted tokens of what was read."""
        place = self.layers.index(layer)
        return median([norm[place] for norm in self._norms])

    def _places(self, n: int, model: HookedModel) -> list[int]:
        """The conversations whose means are kept: the same of two sets of one size."""
        budget = self.counting.sample_bytes
        if budget is None:
            weights = sum(weight.nbytes for weight in model.module.parameters())
            budget = max(SAMPLE_BYTES, int(SAMPLE_SHARE * weights))
        room = max(1, budget // (2 * 4 * len(self.layers) * model.d_model))
        order = np.random.default_rng([self.counting.seed, 1]).permutation(n)
        return sorted(order[:room].tolist())

    def _pass(
        self,
        sides: Sequence[Side],
        batches: Sequence[TokenBatch],
        part: Sequence[int],
        kept: Sequence[int],
        norms: Container[tuple[int, ...]],
        label: str,
    ) -> list[Reading]:
        here = {place for batch in batches for place in batch.index}
        mine = [place for place in kept if place in here]
        tallies = [
            _Tally(len(self.layers), sides[-1][0].d_model, mine) for _ in range(2 * len(sides) - 1)
        ]
        total = sum(batch.n_tokens for batch in batches) * len(sides)
        quiet = not (self.counting.progress and leads())
        with tqdm(total=total, desc=label, unit="tok", disable=quiet) as bar:
            for batch in batches:
                found = []
                for model, condition in sides:
                    with model.under(condition):
                        found.append(self._means(model, batch, batch.index in norms))
                    bar.update(batch.n_tokens)
                last = found[-1][0]
                found += [(means - last, counts, []) for means, counts, _ in found[:-1]]
                parts = torch.tensor([part[place] for place in batch.index])
                for tally, (means, counts, sizes) in zip(tallies, found, strict=True):
                    weights = counts if self.counting.weighting == "token" else counts.sign()
                    tally.take(means, counts, weights, parts, batch.index)
                    tally.norms += sizes
        return [tally.reading() for tally in tallies]

    def _means(
        self, model: HookedModel, batch: TokenBatch, keep_norms: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        mask = self.counting.mask(batch).to(model.device)
        counts = mask.sum(1)
        pool = _pool(mask, self.counting.winsorize, self.counting.drop_massive, keep_norms)
        read = model.residuals(batch, self.layers, self.site, pool, self.counting.edits)
        pooled = torch.stack([read[layer].cpu() for layer in self.layers])
        means, norms = pooled[..., : model.d_model], pooled[..., model.d_model :]
        return means, counts.cpu().double(), [norms[:, mask.cpu()]] if keep_norms else []


class _Tally:
    """What is added up while batches go by; room for the sample is taken at once."""

    def __init__(self, n_layers: int, d_model: int, kept: Sequence[int]) -> None:
        self.parts = tuple(Moments.empty(n_layers, d_model) for _ in range(PARTS))
        self.norms: list[Tensor] = []
        self._row = {place: row for row, place in enumerate(kept)}
        self._means = torch.empty(n_layers, len(kept), d_model)
        self._counts = torch.zeros(len(kept), dtype=torch.float64)

    def take(
        self, means: Tensor, counts: Tensor, weights: Tensor, parts: Tensor, places: Sequence[int]
    ) -> None:
        for part in parts.unique().tolist():
            self.parts[part].add(means[:, parts == part], weights[parts == part])
        chosen = [i for i, place in enumerate(places) if place in self._row]
        rows = [self._row[places[i]] for i in chosen]
        self._means[:, rows] = means[:, chosen].float()
        self._counts[rows] = counts[chosen]

    def reading(self) -> Reading:
        places, read = torch.tensor(list(self._row)), self._counts > 0
        if bool(read.all()):
            sample = Sample(places, self._means, self._counts)
        else:
            sample = Sample(places[read], self._means[:, read], self._counts[read])
        return Reading(self.parts, self.norms, sample)


def side_of(source: HookedModel | tuple[HookedModel, ConditionLike]) -> Side:
    """A model as it is, or under a condition: `(model, condition)`."""
    if isinstance(source, tuple):
        model, given = source
        return model, condition_of(model, given)
    return source, Condition(source.adapters_in_force)


def _pool(
    mask: Tensor, winsorize: float | None, drop_massive: float | None, keep_norms: bool
) -> Callable[[Tensor], Tensor]:
    """Means over the counted tokens; all that is wanted in one tensor.

    A remote model brings back what a pool returns, and nothing else.
    """

    def pool(residual: Tensor) -> Tensor:
        values = residual.float()
        where = mask.to(values.device)
        norms = values.norm(dim=-1)
        share = where.float()
        if drop_massive is not None:
            usual = norms.masked_fill(~where, torch.nan).nanmedian(dim=1, keepdim=True).values
            share = share * (norms <= drop_massive * usual)
        if winsorize is not None:
            place = max(1, round(winsorize * values.shape[-1]))
            limit = values.abs().kthvalue(place, dim=-1, keepdim=True).values
            values = values.clamp(-limit, limit)
        share = share / share.sum(1, keepdim=True).clamp(min=1)
        means = torch.einsum("btd,bt->bd", values, share)
        return torch.cat([means, norms], dim=1) if keep_norms else means

    return pool


def first_batches(
    batches: Sequence[TokenBatch], mask: Callable[[TokenBatch], Tensor], counted: int = 0
) -> list[TokenBatch]:
    """The batches to read until `NORM_TOKENS` tokens are counted, `counted` of them before."""
    first = []
    for batch in batches:
        if counted >= NORM_TOKENS:
            break
        first.append(batch)
        counted += int(mask(batch).sum())
    return first


def median(norms: Sequence[Tensor]) -> float:
    """The median of what several batches gave.

    Raises:
        ValueError: If they gave nothing.
    """
    found = torch.cat(list(norms)) if norms else torch.empty(0)
    if not len(found):
        raise ValueError("no tokens were counted, so there is no median residual norm")
    return float(found.median())


def _random_parts(n: int, seed: int) -> list[int]:
    order = np.random.default_rng(seed).permutation(n)
    part = np.zeros(n, dtype=int)
    part[order] = np.arange(n) % PARTS
    return part.tolist()
