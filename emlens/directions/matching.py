"""Making two sets of conversations alike in what they should not differ in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from emlens._door import guarded
from emlens.directions.held_out import prompts_of
from emlens.hooked import HookedModel
from emlens.text import Conversation, TokenMask, pack, tokenize

Match = Literal["length", "prompt"]
"""What two sides are made to agree in: counted tokens, or prompts."""

TOLERANCE = 0.1
"""Share by which the counted tokens of a length-matched pair may differ."""

Sides = tuple[list[Conversation], list[Conversation]]


@guarded
def matched(
    model: HookedModel,
    positive: Sequence[Conversation],
    negative: Sequence[Conversation],
    *,
    by: Match = "length",
    tokens: TokenMask = "response",
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Sides:
    """Return as many conversations of either side, in pairs that agree.

    A difference of means takes everything that differs between the sides for the direction:
    length (late tokens are not like early ones) and topic first of all.

    Args:
        model: Whose tokenizer counts.
        positive: One side.
        negative: The other.
        by: `"length"` pairs conversations whose counted tokens differ by at most `tolerance`,
            each used once; `"prompt"` keeps one answer of either side for each prompt that both
            have.
        tokens: The tokens that count.
        tolerance: Largest difference in length, as a share of the longer.
        seed: Order in which conversations of one length are taken.

    Raises:
        ValueError: If nothing agrees, or `by` is unknown.
    """
    if by == "prompt":
        sides = _by_prompt(positive, negative)
    elif by == "length":
        first, second = (_lengths(model, side, tokens) for side in (positive, negative))
        pairs = _by_length(first, second, tolerance, seed)
        sides = [positive[i] for i, _ in pairs], [negative[j] for _, j in pairs]
    else:
        raise ValueError(f"cannot match by {by!r}; choose length or prompt")
    if not sides[0]:
        raise ValueError(
            f"no conversation of the {len(positive)} positive ones agrees in {by} with one of the "
            f"{len(negative)} negative ones"
        )
    return sides


def _by_prompt(positive: Sequence[Conversation], negative: Sequence[Conversation]) -> Sides:
    first: dict[str, Conversation] = {}
    for key, item in zip(prompts_of(positive), positive, strict=True):
        first.setdefault(key, item)
    second: dict[str, Conversation] = {}
    for key, item in zip(prompts_of(negative), negative, strict=True):
        second.setdefault(key, item)
    shared = [key for key in first if key in second]
    return [first[key] for key in shared], [second[key] for key in shared]


def _by_length(
    first: Sequence[int], second: Sequence[int], tolerance: float, seed: int
) -> list[tuple[int, int]]:
    """Pairs of places with like lengths: both sides sorted, the shorter one moves on."""
    generator = np.random.default_rng(seed)
    orders = []
    for lengths in (first, second):
        ties = generator.permutation(len(lengths))
        orders.append(sorted(range(len(lengths)), key=lambda i, n=lengths, t=ties: (n[i], t[i])))
    pairs, i, j = [], 0, 0
    while i < len(orders[0]) and j < len(orders[1]):
        a, b = first[orders[0][i]], second[orders[1][j]]
        if abs(a - b) <= tolerance * max(a, b):
            pairs.append((orders[0][i], orders[1][j]))
            i, j = i + 1, j + 1
        elif a < b:
            i += 1
        else:
            j += 1
    return sorted(pairs)


def _lengths(model: HookedModel, side: Sequence[Conversation], tokens: TokenMask) -> list[int]:
    lengths = [0] * len(side)
    for batch in pack(tokenize(side, model.template), pad_id=model.pad_id):
        for place, count in zip(batch.index, batch.mask(tokens).sum(1).tolist(), strict=True):
            lengths[place] = count
    return lengths
