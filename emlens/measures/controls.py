"""Controls of equal size: what a direction's influence is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from emlens.directions import Direction, Evidence, Provenance, random_direction
from emlens.hooked import HookedModel, identities, pools
from emlens.text import Corpus

ControlKind = Literal["random", "activation differences", "shuffled labels"]
"""Random directions; differences of the residuals of two tokens of the corpus; the direction's
own construction with shuffled labels, which a mean difference carries."""

Place = tuple[str, int]
"""Site and layer."""


def kinds_of(controls: int | Mapping[str, int]) -> dict[ControlKind, int]:
    """How many controls of which kind; a number alone is that of random directions.

    Raises:
        ValueError: If there is no such kind.
    """
    given: Mapping = {"random": controls} if isinstance(controls, int) else controls
    known = get_args(ControlKind)
    for kind in given:
        if kind not in known:
            raise ValueError(f"unknown controls {kind!r}; choose {', '.join(map(repr, known))}")
    return {kind: n for kind, n in given.items() if n}


def control_directions(
    model: HookedModel,
    corpus: Corpus,
    directions: Mapping[str, Direction],
    kinds: Mapping[ControlKind, int],
    *,
    max_tokens: int,
    token_budget: int,
    seed: int,
) -> dict[str, dict[str, Direction]]:
    """Controls at every place that a direction is added at, `{group: {name: control}}`.

    Their norm does not matter: they are put to that of what they are compared with.

    Raises:
        ValueError: If shuffled labels are asked for and no direction carries them.
    """
    places: dict[Place, Direction] = {}
    for direction in directions.values():
        places.setdefault((direction.site, direction.layer), direction)
    found: dict[str, dict[str, Direction]] = {}
    for kind, n in kinds.items():
        made: dict[str, dict[str, Direction]] = {}
        for i, (place, like) in enumerate(places.items()):
            group = kind if len(places) == 1 else f"{kind}, {place[0]} {place[1]}"
            if kind == "random":
                # the first place has the same draws whatever other places there are
                drawn = [random_direction(like, seed + j + 1000 * i) for j in range(n)]
            elif kind == "activation differences":
                drawn = _differences(
                    model, corpus, like, n, max_tokens=max_tokens, budget=token_budget, seed=seed
                )
            else:
                drawn = _shuffled(directions, place, n)
            if drawn:
                short = "random" if kind == "random" else kind.split()[0]
                tail = group.removeprefix(kind)
                made[group] = {f"{short} {j}{tail}": x for j, x in enumerate(drawn)}
        if not made:
            raise ValueError(
                "no direction carries directions under shuffled labels; mean differences do "
                "(emlens.mean_diff), trained and derived ones do not"
            )
        found |= made
    return found


def _differences(
    model: HookedModel,
    corpus: Corpus,
    like: Direction,
    n: int,
    *,
    max_tokens: int,
    budget: int,
    seed: int,
) -> list[Direction]:
    """Residuals of random tokens, one minus another, at the place of a direction."""
    tokens: list[Tensor] = []
    for batch in model.batches(corpus, token_budget=budget, max_tokens=max_tokens):
        pool = pools.counted(batch.mask("all").to(model.device))
        tokens.append(model.residuals(batch, like.layer, like.site, pool)[like.layer].cpu())
        if sum(map(len, tokens)) >= 64 * (2 * n):
            break
    pool_of = torch.cat(tokens)
    chosen = np.random.default_rng([seed, like.layer]).choice(
        len(pool_of), size=(n, 2), replace=len(pool_of) < 2 * n
    )
    made = Provenance(
        "difference of activations",
        model=model.name,
        adapter=model.active_adapter,
        seed=seed,
        **identities(model),
    )
    return [_at(like, pool_of[a] - pool_of[b], made) for a, b in chosen.tolist()]


def _shuffled(directions: Mapping[str, Direction], place: Place, n: int) -> list[Direction]:
    """Of every direction that carries them, in turn."""
    drawn: list[Sequence[Direction]] = []
    for direction in directions.values():
        draws = direction.shuffled.get(direction.layer)
        if (direction.site, direction.layer) == place and draws is not None and len(draws):
            made = direction.provenance.derived(
                f"{direction.provenance.construction}, labels shuffled"
            )
            drawn.append([_at(direction, vector, made) for vector in draws])
    turns = [of_one[j] for j in range(n) for of_one in drawn if j < len(of_one)]
    return turns[:n]


def _at(like: Direction, vector: Tensor, made: Provenance) -> Direction:
    return Direction({like.layer: vector}, like.site, made, Evidence(like.residual_norms))
