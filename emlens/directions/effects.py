"""What interventions do to the residual stream further down, and whether it is the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from emlens.directions.build import difference, provenance, reader_of
from emlens.directions.compare import Comparison, compare
from emlens.directions.direction import Directions, cosine
from emlens.directions.evidence import prompts_of
from emlens.directions.reader import Counting, Weighting
from emlens.hooked import Edit, HookedModel, Layers, SiteName
from emlens.text import Conversation, TokenMask

Interventions = Mapping[str, Sequence[Edit]]

ONE = "edited"
"""The name of an only intervention."""


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
    can be compared (arXiv 2506.11618, App. D); `convergence` does that.

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
    counting = Counting(
        tokens=tokens, weighting=weighting, token_budget=token_budget, progress=progress
    )
    return _effects(model, conversations, {ONE: edits}, site, layers, counting)[ONE]


def convergence(
    model: HookedModel,
    conversations: Sequence[Conversation],
    interventions: Interventions,
    *,
    controls: Sequence[Sequence[Edit]] = (),
    tokens: TokenMask = "response",
    site: SiteName = "resid_post",
    layers: Layers = "all",
    weighting: Weighting = "token",
    token_budget: int = 2048,
    progress: bool = False,
) -> Comparison:
    """Return how alike the differences are that interventions cause in the mean residual.

    Vectors that are near orthogonal at their layer may push the stream in one direction further
    down (arXiv 2506.11618, App. D). So may any two pushes: give controls, such as random vectors
    of the same norms, whose differences are the band of chance.

    Args:
        model: The model.
        conversations: Text that is read under each intervention and without.
        interventions: Two or more, by name.
        controls: Interventions that should have nothing in common with those.
        tokens: The tokens that count.
        site: Where in each block.
        layers: Layers to read; those that an intervention leaves as they are fall away.
        weighting: See `mean_diff`.
        token_budget: Padded tokens of a batch.
        progress: Show a progress bar.

    Returns:
        Cosines by pair and layer. The band of chance holds what both of a pair give with the
        controls, and the controls with each other.

    Raises:
        ValueError: If there are fewer than two interventions, or one moves no layer.
    """
    if len(interventions) < 2:
        raise ValueError(f"convergence needs at least two interventions, not {len(interventions)}")
    counting = Counting(
        tokens=tokens, weighting=weighting, token_budget=token_budget, progress=progress
    )
    named = {**interventions, **{f"control {i}": edits for i, edits in enumerate(controls)}}
    if len(named) != len(interventions) + len(controls):
        raise ValueError("the names control 0, control 1, ... are those of the controls")
    moved = _effects(model, conversations, named, site, layers, counting)
    chance = [moved.pop(name) for name in list(named)[len(interventions) :]]
    found = compare(moved)
    rows = []
    for row in found.rows:
        band = _band(moved[row["first"]], moved[row["second"]], chance, row["layer"])
        rows.append({**row, **band})
    return replace(found, rows=tuple(rows), chance="control interventions")


def _effects(
    model: HookedModel,
    conversations: Sequence[Conversation],
    interventions: Interventions,
    site: SiteName,
    layers: Layers,
    counting: Counting,
) -> dict[str, Directions]:
    """The difference that each intervention causes; the text is read without any once."""
    reader = reader_of(model, site, layers, counting)
    sources = [*((model, edits) for edits in interventions.values()), model]
    readings, paired = reader.read_together(sources, conversations, "conversations")
    groups, found = prompts_of(conversations), {}
    for (name, edits), edited, shift in zip(
        interventions.items(), readings[:-1], paired, strict=True
    ):
        made = provenance(
            "difference caused by edits", model, counting, conversations=conversations
        )
        made.settings["edits"] = [repr(edit) for edit in edits]
        whole = difference(reader, edited, readings[-1], made, (groups, groups), shift)
        moved = tuple(layer for layer, norm in whole.norms.items() if norm > 0)
        if not moved:
            whose = "" if name == ONE else f" of {name}"
            raise ValueError(f"the edits{whose} move none of the layers {reader.layers}")
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
    low, high = np.quantile([cosine(*pair) for pair in pairs], [0.025, 0.975])
    return {"chance low": float(low), "chance high": float(high)}
