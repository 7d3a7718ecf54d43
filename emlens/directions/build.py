"""What the constructions of directions share: reading two sides, and their difference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor

from emlens.directions.counting import Counting
from emlens.directions.direction import Directions
from emlens.directions.held_out import (
    Groups,
    held_out_auroc,
    shuffled_differences,
)
from emlens.directions.moments import Moments
from emlens.directions.provenance import Provenance
from emlens.directions.reader import Reader, Reading, side_of
from emlens.directions.vectors import Evidence
from emlens.hooked import Condition, HookedModel
from emlens.hooked.sites import Layers, SiteName, check_layers
from emlens.text import Conversation
from emlens.text.conversation import content_hash
from emlens.text.tokens import template_hash


def reader_of(model: HookedModel, site: SiteName, layers: Layers, counting: Counting) -> Reader:
    """A reader for layers and a site that the model has."""
    wanted = check_layers(layers, model.n_layers)
    return Reader(wanted, model.check_site(site, wanted), counting)


def read_sides(
    model: HookedModel,
    positive: Sequence[Conversation],
    negative: Sequence[Conversation],
    site: SiteName,
    layers: Layers,
    counting: Counting,
) -> tuple[Reader, tuple[Reading, Reading]]:
    """Read both sides in one model as it is: one pass that several constructions can share."""
    reader, side = reader_of(model, site, layers, counting), side_of(model)
    first = reader.read(side, positive, "positive")
    return reader, (first, reader.read(side, negative, "negative"))


def provenance(
    construction: str,
    model: HookedModel,
    counting: Counting,
    **data: Sequence[Conversation],
) -> Provenance:
    """Where a direction that is read from conversations comes from."""
    return Provenance(
        construction=construction,
        model=model.name,
        revision=model.revision,
        adapter=model.active_adapter,
        tokens=counting.tokens,
        weighting=counting.weighting,
        data={role: content_hash(items) for role, items in data.items()},
        template=template_hash(model.template),
        n={role: len(items) for role, items in data.items()},
        seed=counting.seed,
        settings={**counting.record(), **model.template.record},
        identity=model.identity,
        condition=Condition(model.adapters_in_force, tuple(counting.edits)).identity(model),
    )


def difference(
    reader: Reader,
    positive: Reading,
    negative: Reading,
    made: Provenance,
    groups: Groups,
    paired: Reading | None = None,
) -> Directions:
    """The difference of two sides with what can be said of its error.

    Args:
        reader: What read them.
        positive: The head of the arrow.
        negative: Its tail.
        made: Its provenance.
        groups: The prompt of each conversation, by side.
        paired: The reading of the differences, where both sides are the same text.
    """
    if positive.parts[0].total.device != negative.parts[0].total.device:
        positive, negative = positive.to("cpu"), negative.to("cpu")
    pos, neg = positive.moments, negative.moments
    variance = paired.moments.variance if paired else pos.variance + neg.variance
    weighting, seed = reader.counting.weighting, reader.counting.seed
    noisy = (positive, negative) if paired is None else (paired,)
    shuffled = shuffled_differences(noisy, weighting, seed)

    def by_layer(values: Iterable | None) -> dict:
        return {} if values is None else dict(zip(reader.layers, values, strict=True))

    known = Evidence(
        residual_norms=reader.median_norms(),
        standard_errors=by_layer(variance.sqrt().cpu() if min(pos.n, neg.n) > 1 else None),
        split_half=by_layer(split_half(positive.parts, negative.parts)),
        means=by_layer(((pos.mean + neg.mean) / 2).cpu()),
        shuffled=by_layer(None if shuffled is None else shuffled.transpose(0, 1).cpu()),
        auroc=by_layer(held_out_auroc(positive, negative, groups, weighting, seed)),
    )
    return Directions(by_layer((pos.mean - neg.mean).cpu()), reader.site, made, known)


def split_half(positive: Sequence[Moments], negative: Sequence[Moments]) -> list[float] | None:
    """Mean cosine of the directions of two halves, per layer, over the ways to halve the parts.

    A side of few conversations leaves parts empty; splits with an empty half do not count.
    """
    n = len(positive)
    halves = [half for half in combinations(range(n), n // 2) if 0 in half]
    inside = torch.zeros(len(halves), n, dtype=torch.float64)
    for row, half in enumerate(halves):
        inside[row, list(half)] = 1.0
    # of a half, the direction as sums of parts: the weights of each, `[splits, 2 n]`
    shares = []
    for chosen in (inside, 1 - inside):
        of_sides = []
        for side, sign in ((positive, 1), (negative, -1)):
            weight = torch.tensor([part.weight for part in side], dtype=torch.float64)
            of_sides.append(sign * chosen / (chosen @ weight)[:, None])
        shares.append(torch.cat(of_sides, dim=1))
    known = torch.stack(shares).isfinite().all(-1).all(0)
    if not bool(known.any()):
        return None
    # away from a mean that both sides share, so that their products keep their digits
    centre = reduce(Moments.merged, negative).mean
    sums = torch.stack([p.total - p.weight * centre for p in (*positive, *negative)], dim=1)
    products = (sums @ sums.transpose(1, 2)).cpu()
    first, second = (of_half[known] for of_half in shares)

    def along(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("sp,lpq,sq->sl", a, products, b)

    scale = (along(first, first) * along(second, second)).sqrt()
    return (along(first, second) / scale).clamp(-1, 1).mean(0).tolist()
