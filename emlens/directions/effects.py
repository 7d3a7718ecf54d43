"""The downstream effects of edits and adapters on the residual stream, and their similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Unpack

from emlens._door import guarded
from emlens._stats import central
from emlens.directions.build import difference, provenance, reader_of
from emlens.directions.compare import Comparison, compare
from emlens.directions.counting import Counting, CountingOptions
from emlens.directions.direction import Directions
from emlens.directions.held_out import prompts_of
from emlens.directions.vectors import cosine
from emlens.hooked import HookedModel
from emlens.hooked.condition import (
    ConditionLike,
    Conditions,
    by_name,
    condition_of,
    conditions_of,
)
from emlens.hooked.sites import Layers, SiteName
from emlens.text import Conversation

ONE = "edited"
"""The name of an only condition."""


@guarded
def edit_diff(
    model: HookedModel,
    conversations: Sequence[Conversation],
    condition: ConditionLike,
    *,
    site: SiteName = "resid_post",
    layers: Layers = "all",
    **options: Unpack[CountingOptions],
) -> Directions:
    """Return how far a condition moves the mean residual, at every layer it reaches.

    The mean residual under the condition minus that under `[]`, on the same text. Edits that look
    unrelated where they act can be compared by this downstream difference (arXiv 2506.11618, App.
    D); see `convergence`.

    Args:
        model: The model to read.
        conversations: Text to read.
        condition: Edits, an adapter, or both.
        site: Where in each block.
        layers: Layers to read; those that the condition does not move are left out.
        **options: See `CountingOptions`.

    Raises:
        ValueError: If there are no conversations, or no layer moves.
    """
    counting = Counting(**options)
    return _effects(model, conversations, {ONE: condition}, site, layers, counting)[ONE]


@guarded
def convergence(
    model: HookedModel,
    conversations: Sequence[Conversation],
    conditions: Conditions,
    *,
    controls: Sequence[ConditionLike] = (),
    site: SiteName = "resid_post",
    layers: Layers = "all",
    **options: Unpack[CountingOptions],
) -> Comparison:
    """Return the cosines between the changes of the mean residual under several conditions.

    Vectors that are nearly orthogonal at their layer may push the stream in one direction
    downstream (arXiv 2506.11618, App. D). Any two perturbations may do so: give controls, such as
    random vectors of the same norms, for a chance band.

    Args:
        model: The model.
        conversations: Text that is read under each condition and without.
        conditions: Two or more, by name.
        controls: Conditions that should be unrelated to them.
        site: Where in each block.
        layers: Layers to read; those that a condition does not move are left out.
        **options: See `CountingOptions`.

    Returns:
        Cosines by pair and layer. The chance band contains the cosines of both members of a pair
        with the controls, and of the controls with each other.

    Raises:
        ValueError: If there are fewer than two conditions, or one moves no layer.
    """
    conditions = by_name(conditions)
    if len(conditions) < 2:
        raise ValueError(f"convergence needs at least two conditions, not {len(conditions)}")
    counting = Counting(**options)
    named = {**conditions, **{f"control {i}": one for i, one in enumerate(controls)}}
    if len(named) != len(conditions) + len(controls):
        raise ValueError("the names control 0, control 1, ... are those of the controls")
    moved = _effects(model, conversations, named, site, layers, counting)
    chance = [moved.pop(name) for name in list(named)[len(conditions) :]]
    found = compare(moved)
    rows = []
    for row in found.rows:
        band = _band(moved[row["first"]], moved[row["second"]], chance, row["layer"])
        rows.append({**row, **band})
    return replace(found, rows=tuple(rows), chance="control conditions")


def _effects(
    model: HookedModel,
    conversations: Sequence[Conversation],
    conditions: Conditions,
    site: SiteName,
    layers: Layers,
    counting: Counting,
) -> dict[str, Directions]:
    """The difference that each condition causes; the text is read without any once."""
    reader, named = reader_of(model, site, layers, counting), conditions_of(model, conditions)
    without = condition_of(model, [])
    sides = [(model, condition) for condition in (*named.values(), without)]
    readings, paired = reader.read_together(sides, conversations, "conversations")
    groups, found = prompts_of(conversations), {}
    for (name, condition), edited, shift in zip(named.items(), readings[:-1], paired, strict=True):
        with model.under(condition):
            made = provenance(
                "difference caused by edits", model, counting, conversations=conversations
            ).with_settings({"edits": [repr(edit) for edit in condition.edits]})
        whole = difference(reader, edited, readings[-1], made, (groups, groups), shift)
        moved = tuple(layer for layer, norm in whole.norms.items() if norm > 0)
        if not moved:
            whose = "" if name == ONE else f" of {name}"
            raise ValueError(f"the condition{whose} moves none of the layers {reader.layers}")
        found[name] = whole.at(moved)
    return found


def _band(
    first: Directions, second: Directions, controls: Sequence[Directions], layer: int
) -> dict[str, float]:
    there = [control.vectors[layer] for control in controls if layer in control]
    pairs = list(combinations(there, 2))
    pairs += [(side.vectors[layer], other) for side in (first, second) for other in there]
    if not pairs:
        return {}
    low, high = central([cosine(*pair) for pair in pairs])
    return {"chance low": float(low), "chance high": float(high)}
