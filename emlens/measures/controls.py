"""Controls of equal size: what a direction's influence is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from emlens._registry import CONTROLS
from emlens.directions import Direction, Evidence, Provenance, random_direction
from emlens.hooked import HookedModel, pools
from emlens.hooked.identity import identities
from emlens.text import Corpus

Place = tuple[str, int]
"""Site and layer."""


@dataclass(frozen=True)
class Asked:
    """What controls are drawn from.

    Attributes:
        model: The model.
        corpus: The text.
        directions: All directions that are compared.
        like: The one whose place the controls have.
        place: Which of the places it is, from 0.
        n: How many controls.
        max_tokens: Tokens that a document is cut to.
        token_budget: Padded tokens of a batch.
        seed: Seed.
    """

    model: HookedModel
    corpus: Corpus
    directions: Mapping[str, Direction]
    like: Direction
    place: int
    n: int
    max_tokens: int
    token_budget: int
    seed: int


@dataclass(frozen=True)
class Control:
    """A kind of controls; `emlens._registry.CONTROLS` lists them.

    Attributes:
        draw: Returns the controls at a place; empty if there are none.
        none: Error message if no place has any.
    """

    draw: Callable[[Asked], list[Direction]]
    none: str = "there are no such controls"


def kinds_of(controls: int | Mapping[str, int]) -> dict[str, int]:
    """How many controls of which kind; a number alone is that of random directions.

    Raises:
        ValueError: If there is no such kind.
    """
    given: Mapping = {"random": controls} if isinstance(controls, int) else controls
    for kind in given:
        CONTROLS[kind]
    return {kind: n for kind, n in given.items() if n}


def control_directions(
    model: HookedModel,
    corpus: Corpus,
    directions: Mapping[str, Direction],
    kinds: Mapping[str, int],
    *,
    max_tokens: int,
    token_budget: int,
    seed: int,
) -> dict[str, dict[str, Direction]]:
    """Controls at every place that a direction is added at, `{group: {name: control}}`.

    Their norm does not matter: they are scaled to that of the directions they are compared with.

    Raises:
        ValueError: If shuffled labels are asked for and no direction carries them.
    """
    places: dict[Place, Direction] = {}
    for direction in directions.values():
        places.setdefault((direction.site, direction.layer), direction)
    found: dict[str, dict[str, Direction]] = {}
    for kind, n in kinds.items():
        control: Control = CONTROLS[kind]
        made: dict[str, dict[str, Direction]] = {}
        for i, (place, like) in enumerate(places.items()):
            group = kind if len(places) == 1 else f"{kind}, {place[0]} {place[1]}"
            drawn = control.draw(
                Asked(model, corpus, directions, like, i, n, max_tokens, token_budget, seed)
            )
            if drawn:
                short, tail = kind.split()[0], group.removeprefix(kind)
                made[group] = {f"{short} {j}{tail}": x for j, x in enumerate(drawn)}
        if not made:
            raise ValueError(control.none)
        found |= made
    return found


def _random(asked: Asked) -> list[Direction]:
    # the draws of the first place do not depend on other places
    first = asked.seed + 1000 * asked.place
    return [random_direction(asked.like, first + j) for j in range(asked.n)]


def _differences(asked: Asked) -> list[Direction]:
    """Residuals of random tokens, one minus another, at the place of a direction."""
    model, like, n, seed = asked.model, asked.like, asked.n, asked.seed
    tokens: list[Tensor] = []
    for batch in model.batches(
        asked.corpus, token_budget=asked.token_budget, max_tokens=asked.max_tokens
    ):
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


def _shuffled(asked: Asked) -> list[Direction]:
    """Of every direction that carries them, in turn."""
    place, n = (asked.like.site, asked.like.layer), asked.n
    drawn: list[Sequence[Direction]] = []
    for direction in asked.directions.values():
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


RANDOM = Control(_random)
DIFFERENCES = Control(_differences)
SHUFFLED = Control(
    _shuffled,
    "no direction carries directions under shuffled labels; mean differences do "
    "(emlens.mean_diff), trained and derived ones do not",
)
