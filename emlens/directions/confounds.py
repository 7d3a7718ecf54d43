"""How a mean difference changes when both sides agree in length, or in their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from emlens._door import guarded
from emlens.directions.compare import Comparison, compare
from emlens.directions.counting import CountingOptions
from emlens.directions.direction import Directions
from emlens.directions.extract import mean_diff
from emlens.directions.sides import Match, both_sides, matched
from emlens.hooked import HookedModel
from emlens.hooked.sites import Layers, SiteName
from emlens.text import Conversation, Pair
from emlens.text.repeats import repeats_told

_VARIANTS: dict[str, Match] = {"length-matched": "length", "same prompts": "prompt"}


@guarded
def confounds(
    model: HookedModel,
    positive: Sequence[Conversation] | Sequence[Pair],
    negative: Sequence[Conversation] | None = None,
    *,
    site: SiteName = "resid_post",
    layers: Layers = "all",
    **options: Unpack[CountingOptions],
) -> tuple[Comparison, dict[str, Directions]]:
    """Compare the mean difference with its length-matched and same-prompt variants.

    If a variant points elsewhere, the plain difference is partly length or topic. A variant without
    any conversations left is skipped, unless all are.

    Args:
        model: The model to read.
        positive: Conversations that the direction points to; or pairs, as in `mean_diff`.
        negative: Conversations that it points away from; not with pairs.
        site: Where in each block.
        layers: Layers to read.
        **options: See `CountingOptions`.

    Returns:
        The cosines, and the directions by name: `mean-diff` and its variants. No cosine is
        corrected: the variants share conversations, so their errors are not independent.

    Raises:
        ValueError: If no variant can be built, or as `mean_diff`.
    """
    positive, negative = both_sides(positive, negative)
    found = {"mean-diff": mean_diff(model, positive, negative, site=site, layers=layers, **options)}
    nothing = []
    for name, match in _VARIANTS.items():
        try:
            matched(model, positive, negative, by=match, tokens=options.get("tokens", "response"))
        except ValueError as error:
            nothing.append(str(error))
            continue
        with repeats_told():
            found[name] = mean_diff(
                model, positive, negative, site=site, layers=layers, match=match, **options
            )
    if len(found) == 1:
        raise ValueError(f"no variant can be built: {'; '.join(nothing)}")
    compared = compare(found)
    rows = [
        {**row, "corrected": None, "low": None, "high": None, "note": "share conversations"}
        for row in compared.rows
    ]
    return replace(compared, rows=tuple(rows)), found
