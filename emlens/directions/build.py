"""What the constructions of directions share: reading two sides, and their difference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import combinations

import numpy as np

from emlens.directions.direction import Directions
from emlens.directions.held_out import (
    Groups,
    held_out_auroc,
    shuffled_differences,
)
from emlens.directions.moments import Moments
from emlens.directions.provenance import Provenance
from emlens.directions.reader import Counting, Reader, Reading, side_of
from emlens.directions.vectors import Evidence, cosine
from emlens.hooked import Condition, HookedModel, Layers, SiteName, check_layers
from emlens.text import Conversation, content_hash, template_hash


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
    pos, neg = positive.moments, negative.moments
    vectors = pos.mean - neg.mean
    variance = paired.moments.variance if paired else pos.variance + neg.variance
    places = list(enumerate(reader.layers))
    weighting, seed = reader.counting.weighting, reader.counting.seed
    auroc = held_out_auroc(positive, negative, groups, weighting, seed)
    noisy = (positive, negative) if paired is None else (paired,)
    shuffled = shuffled_differences(noisy, weighting, seed)
    enough = min(pos.n, neg.n) > 1
    known = Evidence(
        residual_norms={layer: reader.median_norm(layer) for layer in reader.layers},
        standard_errors={layer: variance[i].sqrt() for i, layer in places} if enough else {},
        split_half=_split_half(reader.layers, positive.parts, negative.parts),
        means={layer: (pos.mean[i] + neg.mean[i]) / 2 for i, layer in places},
        shuffled={} if shuffled is None else {layer: shuffled[:, i] for i, layer in places},
        auroc={} if auroc is None else {layer: auroc[i] for i, layer in places},
    )
    return Directions({layer: vectors[i] for i, layer in places}, reader.site, made, known)


def _split_half(
    layers: tuple[int, ...], positive: Sequence[Moments], negative: Sequence[Moments]
) -> dict[int, float]:
    """Mean cosine of the directions of two halves, over the ways to halve the parts.

    A side of few conversations leaves parts empty; splits with an empty half do not count.
    """
    places, found = range(len(positive)), []
    for chosen in combinations(places, len(positive) // 2):
        if 0 not in chosen:
            continue
        halves = []
        for half in (chosen, tuple(set(places) - set(chosen))):
            sides = [
                reduce(Moments.merged, (side[i] for i in half)) for side in (positive, negative)
            ]
            if not all(side.n for side in sides):
                break
            halves.append(sides[0].mean - sides[1].mean)
        if len(halves) == 2:
            found.append([cosine(a, b) for a, b in zip(*halves, strict=True)])
    if not found:
        return {}
    return dict(zip(layers, np.mean(found, axis=0).tolist(), strict=True))
