"""Directions as differences of means, in one model or between two."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from emlens._distributed import shared
from emlens._door import guarded
from emlens.directions.build import difference, provenance, read_sides, reader_of
from emlens.directions.counting import Counting, CountingOptions
from emlens.directions.direction import Direction, Directions
from emlens.directions.held_out import prompts_of
from emlens.directions.provenance import Provenance
from emlens.directions.reader import Side, first_batches, medians, side_of
from emlens.directions.sides import Match, both_sides, matched
from emlens.directions.vectors import Evidence
from emlens.hooked import HookedModel, pools
from emlens.hooked.condition import ConditionLike
from emlens.hooked.options import BatchSettings
from emlens.hooked.sites import Layers, SiteName, check_layers
from emlens.text import (
    Conversation,
    Corpus,
    Pair,
    TokenBatch,
    TokenMask,
    tokenize,
)

ROUNDING = 1e-5
"""Share of the residual norm that two readings of the same text may differ by."""


@guarded
def mean_diff(
    model: HookedModel,
    positive: Sequence[Conversation] | Sequence[Pair],
    negative: Sequence[Conversation] | None = None,
    *,
    site: SiteName = "resid_post",
    layers: Layers = "all",
    match: Match | None = None,
    **options: Unpack[CountingOptions],
) -> Directions:
    """Return the difference of mean residuals, `positive - negative`, at every layer.

    One pass over both sets; memory does not grow with the data. The papers take misaligned answers
    as positive and aligned ones as negative, both read in the misaligned model (arXiv 2506.11618,
    section 3.1); their token mask is `"paper"`.

    Args:
        model: The model to read.
        positive: Conversations that the direction points to; or pairs, whose misaligned answers it
            points to.
        negative: Conversations that it points away from; not with pairs.
        site: Where in each block.
        layers: Layers to read.
        match: Leave conversations out until the sides agree: `"length"` pairs answers of similar
            length, `"prompt"` keeps prompts that both sides answer; see `matched`.
        **options: See `CountingOptions`.

    Returns:
        Directions with standard errors (over conversations, the two sets taken as independent),
        split-half cosine, the mean activation, differences under shuffled labels, the AUROC of
        the projection on held-out conversations, and the median residual norm of the counted
        tokens.

    Raises:
        ValueError: If a set is empty or has no tokens that count, or a setting is unknown.
        NonFiniteError: If an activation is not finite; condition, conversation and layer are
            named.

    Examples:
        >>> directions = emlens.mean_diff(model, pairs)
        >>> directions[15].vector.shape == (model.d_model,)
        True
    """
    positive, negative = both_sides(positive, negative)
    counting = Counting(**options)
    tokens, sides = counting.tokens, (positive, negative)
    if match is not None:
        sides = matched(model, *sides, by=match, tokens=tokens, seed=counting.seed)
    reader, readings = read_sides(model, *sides, site, layers, counting)
    made = provenance("mean-diff", model, counting, positive=sides[0], negative=sides[1])
    if match is not None:
        made = made.with_settings({"match": match})
    found = difference(reader, *readings, made, (prompts_of(sides[0]), prompts_of(sides[1])))
    size = found.residual_norms
    if all(float(v.norm()) <= ROUNDING * size.get(n, 0.0) for n, v in found.vectors.items()):
        warnings.warn(
            f"the two sides have the same mean at every layer: their {tokens!r} tokens see the "
            "same text on both; give the sides other answers, or count the tokens that differ",
            stacklevel=3,
        )
    return found


@guarded
def model_diff(
    positive: HookedModel | tuple[HookedModel, ConditionLike],
    negative: HookedModel | tuple[HookedModel, ConditionLike],
    conversations: Sequence[Conversation],
    *,
    site: SiteName = "resid_post",
    layers: Layers = "all",
    **options: Unpack[CountingOptions],
) -> Directions:
    """Return how two models differ in their mean residual on the same text.

    Args:
        positive: The finetuned model: a model, or `(model, condition)`, where the condition is an
            adapter's name, edits, or both.
        negative: The model it is compared with: a model, or `(model, None)` for the base of its
            adapters.
        conversations: Text that both read.
        site: Where in each block.
        layers: Layers to read.
        **options: See `CountingOptions`.

    Returns:
        Directions whose standard errors are those of the paired differences.

    Raises:
        ValueError: If the models differ in shape or tokenise differently, or as `mean_diff`.

    Examples:
        >>> model = emlens.load(base, adapters={"medical": folder})
        >>> emlens.directions.model_diff((model, "medical"), (model, None), conversations)
    """
    counting = Counting(**options)
    sides = side_of(positive), side_of(negative)
    _check_alike(sides[0][0], sides[1][0], conversations)
    reader = reader_of(sides[0][0], site, layers, counting)
    made = _made("model-diff", sides, counting, conversations=conversations)
    readings, paired = reader.read_together(sides, conversations, "conversations")
    groups = prompts_of(conversations)
    return difference(reader, readings[0], readings[1], made, (groups, groups), paired[0])


@guarded
def both_diff(
    positive: HookedModel | tuple[HookedModel, ConditionLike],
    positive_conversations: Sequence[Conversation],
    negative: HookedModel | tuple[HookedModel, ConditionLike],
    negative_conversations: Sequence[Conversation],
    *,
    site: SiteName = "resid_post",
    layers: Layers = "all",
    **options: Unpack[CountingOptions],
) -> Directions:
    """Return the difference of mean residuals of two models, each on its own text.

    The variant of the papers' code that reads misaligned answers in the misaligned model and
    aligned ones in the aligned model (arXiv 2506.11618, section 3.1).

    Args:
        positive: A model, or `(model, condition)`.
        positive_conversations: The text that it reads.
        negative: Another model, or the same under another condition.
        negative_conversations: The text that it reads.
        site: Where in each block.
        layers: Layers to read.
        **options: See `CountingOptions`.

    Raises:
        ValueError: If the models differ in shape, or as `mean_diff`.
    """
    counting = Counting(**options)
    sides = side_of(positive), side_of(negative)
    _check_shapes(sides[0][0], sides[1][0])
    reader = reader_of(sides[0][0], site, layers, counting)
    data = {"positive": positive_conversations, "negative": negative_conversations}
    made = _made("both-diff", sides, counting, **data)
    readings = (
        reader.read(sides[0], positive_conversations, "positive_conversations"),
        reader.read(sides[1], negative_conversations, "negative_conversations"),
    )
    groups = prompts_of(positive_conversations), prompts_of(negative_conversations)
    return difference(reader, *readings, made, groups)


@guarded
def residual_norm(
    model: HookedModel,
    data: Sequence[Conversation] | Corpus,
    layers: Layers,
    *,
    site: SiteName = "resid_post",
    tokens: TokenMask = "all",
    max_tokens: int | None = None,
    token_budget: int = BatchSettings.token_budget,
) -> dict[int, float]:
    """Return the median norm of the residual over the counted tokens, per layer.

    Reads batches until `NORM_TOKENS` tokens are counted.

    Raises:
        ValueError: If a layer, site or mask does not exist, or no token counts.
    """
    wanted = check_layers(layers, model.n_layers)
    at = model.check_site(site, wanted)
    batches = model.batches(data, token_budget=token_budget, max_tokens=max_tokens)

    def read(batches: Sequence[TokenBatch]) -> list[Tensor]:
        norms = []
        for batch in batches:
            mask = batch.mask(tokens).to(model.device)
            of_layers = model.residuals(batch, wanted, at, pools.counted_norms(mask))
            norms.append(torch.stack([of_layers[layer].cpu() for layer in wanted]))
        return norms

    first = first_batches(batches, lambda batch: batch.mask(tokens))
    parts = shared(model, first, read, f"norms at {at} of {tokens} tokens")
    norms = [norm for part in parts for norm in part]
    return dict(zip(wanted, medians(norms), strict=True))


@guarded
def random_direction(like: Direction, seed: int = 0) -> Direction:
    """Return a random direction with the layer, site and norm of another: its matched control."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(like.d_model, generator=generator)
    return Direction(
        {like.layer: vector / vector.norm() * like.norm},
        like.site,
        Provenance("random", model=like.provenance.model, seed=seed),
        Evidence(like.residual_norms),
    )


def _made(
    construction: str, sides: tuple[Side, Side], counting: Counting, **data: Sequence[Conversation]
) -> Provenance:
    """The provenance of a difference of two models: of the first, `against` the second."""
    (model, condition), (other, against) = sides
    with model.under(condition):
        made = provenance(construction, model, counting, **data)
    if condition.edits:
        made = made.with_settings({"edits": [repr(edit) for edit in condition.edits]})
    record: dict[str, object] = {
        "model": other.name,
        "adapter": "+".join(against.names) or None,
        "identity": other.identity,
        "condition": against.identity(other),
    }
    if against.edits:
        record["edits"] = [repr(edit) for edit in against.edits]
    return made.with_settings({"against": record})


def _check_shapes(first: HookedModel, second: HookedModel) -> None:
    shapes = [(model.n_layers, model.d_model) for model in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{first.name} has {shapes[0][0]} layers of width {shapes[0][1]}, {second.name} "
            f"{shapes[1][0]} of width {shapes[1][1]}: their residual streams cannot be subtracted"
        )


def _check_alike(
    first: HookedModel, second: HookedModel, conversations: Sequence[Conversation]
) -> None:
    _check_shapes(first, second)
    if first is second:
        return
    rows = [tokenize(conversations[:8], model.template) for model in (first, second)]
    for ours, theirs in zip(*rows, strict=True):
        if ours.input_ids != theirs.input_ids:
            raise ValueError(
                f"{first.name} and {second.name} tokenise {ours.name} differently; the same text "
                "has to be the same tokens for both"
            )
