"""One streaming pass over conversations: what every construction of a direction is made of."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emlens._distributed import shared, world
from emlens._progress import bar
from emlens.directions.counting import Counting
from emlens.directions.moments import Moments, sums_of
from emlens.hooked import Condition, HookedModel, pools
from emlens.hooked.condition import ConditionLike, condition_of
from emlens.hooked.finite import late_checks
from emlens.hooked.sites import Site
from emlens.text import Conversation, TokenBatch
from emlens.text.batches import sent
from emlens.text.repeats import warn_of_repeats

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

    def to(self, device: torch.device | str) -> Sample:
        return Sample(self.places, self.means.to(device), self.counts)

    def rows(self, chosen: Tensor) -> Sample:
        """Some of the conversations, by a mask `[n]`."""
        rows = chosen.nonzero()[:, 0]
        means = self.means.index_select(1, rows.to(self.means.device))
        return Sample(self.places[rows], means, self.counts[rows])

    def merged(self, other: Sample) -> Sample:
        """Both, in the order of the set."""
        places = torch.cat([self.places, other.places])
        order = places.argsort()
        means = torch.cat([self.means, other.means], dim=1)[:, order]
        return Sample(places[order], means, torch.cat([self.counts, other.counts])[order])


@dataclass(frozen=True)
class Reading:
    """What one pass over a set of conversations gave, on the device that it ran on.

    Attributes:
        parts: Moments of random parts of the set, as even as they go.
        norms: Residual norms of counted tokens, `[layers, n]` each.
        sample: Means of single conversations.
    """

    parts: tuple[Moments, ...]
    norms: list[Tensor]
    sample: Sample

    @cached_property
    def moments(self) -> Moments:
        return reduce(Moments.merged, self.parts)

    def to(self, device: torch.device | str) -> Reading:
        parts = tuple(part.to(device) for part in self.parts)
        norms = [norm.to(device) for norm in self.norms]
        return Reading(parts, norms, self.sample.to(device))

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
            readings = self._pass(sides, batches, part, kept, norms, label)
            return readings if world()[1] == 1 else [one.to("cpu") for one in readings]

        done = f"{label}: moments at {self.site} of {self.counting.tokens} tokens"
        shares = shared(model, batches, read, done)
        readings = [reduce(Reading.merged, group) for group in zip(*shares, strict=True)]
        if not any(part.weight for part in readings[len(sides) - 1].parts):
            raise ValueError(
                f"{label}: none of its {len(conversations)} conversation(s) has tokens that count "
                f"(tokens={self.counting.tokens!r}, skip_first={self.counting.skip_first}); give "
                "them answers, or count other tokens, e.g. tokens='all'"
            )
        self._norms += readings[len(sides) - 1].norms
        return readings[: len(sides)], readings[len(sides) :]

    def median_norms(self) -> dict[int, float]:
        """Median norm of the residual over the counted tokens of what was read, by layer."""
        return dict(zip(self.layers, medians(self._norms), strict=True))

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
        tallies = [_Tally(part, mine, self.counting) for _ in range(2 * len(sides) - 1)]
        total = sum(batch.n_tokens for batch in batches) * len(sides)
        progress = self.counting.progress
        with bar(total=total, desc=label, unit="tok", shown=progress) as shown, late_checks():
            for batch in batches:
                counted, found = self.counting.mask(batch), []
                for model, condition in sides:
                    with model.under(condition):
                        found.append(self._means(model, batch, counted, batch.index in norms))
                    shown.update(batch.n_tokens)
                last = found[-1][0]
                found += [(means - last.to(means.device), []) for means, _ in found[:-1]]
                for tally, (means, sizes) in zip(tallies, found, strict=True):
                    tally.take(batch.index, counted.sum(1).double(), means)
                    tally.norms += sizes
        return [tally.reading(len(self.layers), sides[-1][0].d_model) for tally in tallies]

    def _means(
        self, model: HookedModel, batch: TokenBatch, counted: Tensor, keep_norms: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Means of the counted tokens, `[layers, batch, d_model]`, and norms of each of them."""
        batch = batch.to(model.device)
        mask = self.counting.mask(batch)
        pool = pools.robust_mean(
            mask, self.counting.winsorize, self.counting.drop_massive, with_norms=keep_norms
        )
        read = model.residuals(batch, self.layers, self.site, pool, self.counting.edits)
        home = read[self.layers[0]].device
        pooled = torch.stack([read[layer].to(home) for layer in self.layers])
        means, norms = pooled[..., : model.d_model], pooled[..., model.d_model :]
        if not keep_norms:
            return means, []
        places = sent(counted.flatten().nonzero()[:, 0], home)
        return means, [norms.flatten(1).index_select(1, places)]


class _Tally:
    """What is added up while batches go by, on the device that they ran on.

    Args:
        part: The part of each conversation.
        kept: The conversations whose means are kept.
        counting: What counts.
    """

    def __init__(self, part: Sequence[int], kept: Sequence[int], counting: Counting) -> None:
        self.norms: list[Tensor] = []
        self._part, self._weighting = torch.tensor(part), counting.weighting
        # a sample that may be larger than a GPU has room for stays on the host
        self._beside = counting.sample_bytes is None
        self._row = {place: row for row, place in enumerate(kept)}
        self._counts = torch.zeros(len(kept), dtype=torch.float64)
        self._scalars = torch.zeros(3, PARTS, dtype=torch.float64)
        self._sums = self._means = torch.empty(0)

    def take(self, places: Sequence[int], counts: Tensor, means: Tensor) -> None:
        """Take in a batch: what it is of the set, counted tokens `[batch]`, and means."""
        if not self._sums.numel():
            self._make_room(len(means), means.shape[-1], means.device)
        weights = torch.zeros(PARTS, len(places), dtype=torch.float64)
        own = counts if self._weighting == "token" else counts.sign()
        weights[self._part[list(places)], torch.arange(len(places))] = own
        self._scalars += torch.stack([w.sum(1) for w in (weights.sign(), weights, weights**2)])
        self._sums += sums_of(means, sent(weights, means.device))
        chosen = [i for i, place in enumerate(places) if place in self._row]
        if chosen:
            rows = [self._row[places[i]] for i in chosen]
            self._counts[rows] = counts[chosen]
            taken, put = sent(torch.tensor([chosen, rows]), means.device)
            kept = means.float().index_select(1, taken).to(self._means.device)
            self._means.index_copy_(1, put.to(self._means.device), kept)

    def reading(self, n_layers: int, d_model: int) -> Reading:
        """What was added up; of no batch, at these layers."""
        if not self._sums.numel():
            self._make_room(n_layers, d_model, torch.device("cpu"))
        parts = tuple(
            Moments(int(n), weight, weight2, *sums)
            for (n, weight, weight2), sums in zip(
                self._scalars.T.tolist(), self._sums.unbind(1), strict=True
            )
        )
        sample = Sample(torch.tensor(list(self._row)), self._means, self._counts)
        read = self._counts > 0
        return Reading(parts, self.norms, sample if bool(read.all()) else sample.rows(read))

    def _make_room(self, n_layers: int, d_model: int, device: torch.device) -> None:
        shape = (3, PARTS, n_layers, d_model)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        beside = device if self._beside else torch.device("cpu")
        self._means = torch.empty(n_layers, len(self._row), d_model, device=beside)


def side_of(source: HookedModel | tuple[HookedModel, ConditionLike]) -> Side:
    """A model as it is, or under a condition: `(model, condition)`."""
    if isinstance(source, tuple):
        model, given = source
        return model, condition_of(model, given)
    return source, Condition(source.adapters_in_force)


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


def medians(norms: Sequence[Tensor]) -> list[float]:
    """The median of each row of what several batches gave, `[rows, n]` each.

    Raises:
        ValueError: If they gave nothing.
    """
    found = torch.cat(list(norms), dim=1) if norms else torch.empty(0, 0)
    if not found.shape[1]:
        raise ValueError("no tokens were counted, so there is no median residual norm")
    return found.median(dim=1).values.tolist()


def _random_parts(n: int, seed: int) -> list[int]:
    order = np.random.default_rng(seed).permutation(n)
    part = np.zeros(n, dtype=int)
    part[order] = np.arange(n) % PARTS
    return part.tolist()
