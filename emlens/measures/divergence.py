"""Divergence: KL of predictions on conversations from those of the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Unpack

import numpy as np
import pandas as pd
from jaxtyping import Float

from emlens._door import guarded
from emlens._stats import Interval, bootstrap_ratio
from emlens.hooked import HookedModel, ReadOptions
from emlens.hooked.condition import BASE, Conditions, condition_of, conditions_of
from emlens.hooked.options import ReadSettings
from emlens.measures.measured import Measured
from emlens.measures.scoring import row_influence
from emlens.text import Conversation
from emlens.text.repeats import warn_of_repeats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALL = "conversations"
"""Name of a set that was given without one."""


class Divergence(Measured):
    """`KL(base || condition)` per conversation and condition.

    Intervals are bootstrapped over conversations.

    Attributes:
        conditions: Names of the conditions.
        ids: Conversation ids, `[n]`.
        sets: The set that each belongs to, `[n]`.
        kl: Summed KL, nats, `[conditions, n]`.
        counts: Counted tokens of each conversation, `[n]`.
        seed: Seed of the bootstrap over conversations.
        acting: The adapters and edits that acted under each condition, in words.
        against: What acted in the model that all conditions are compared with.
    """

    AXES = {"sets": "ids"}

    conditions: tuple[str, ...]
    ids: tuple[str, ...]
    sets: tuple[str, ...]
    kl: Float[np.ndarray, "conditions ids"]
    counts: Float[np.ndarray, " ids"]
    seed: int = 0
    acting: dict[str, str] = field(default_factory=dict)
    against: str = BASE

    def mean(self, condition: str, sets: Sequence[str] | None = None) -> Interval:
        """KL in nats per token with its interval, on some of the sets or all.

        Raises:
            KeyError: If the condition or every set is unknown.
        """
        places = self._places(sets)
        return self._over(self.kl[self._index(condition), places], places)

    def difference(self, first: str, second: str, sets: Sequence[str] | None = None) -> Interval:
        """KL of `first` minus that of `second`, paired by conversation, nats per token."""
        places = self._places(sets)
        a, b = (self.kl[self._index(name), places] for name in (first, second))
        return self._over(a - b, places)

    def table(self) -> pd.DataFrame:
        """One row per condition and set."""
        rows = [
            {
                "condition": condition,
                "set": name,
                "conversations": len(self._places([name])),
                "tokens": int(self.counts[self._places([name])].sum()),
                **self.mean(condition, [name]).columns("KL [nats/token]"),
                "acting": self._acting(condition),
            }
            for condition in self.conditions
            for name in dict.fromkeys(self.sets)
        ]
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """KL by set, one series per condition, with intervals."""
        from emlens.figures.bars import dot_intervals

        frame = self.table()
        return dot_intervals(
            groups=frame["set"],
            series=frame["condition"],
            values=frame["KL [nats/token]"],
            low=frame["low"],
            high=frame["high"],
            y_label="KL(base || condition) [nats/token]",
            ax=ax,
        )

    def _places(self, sets: Sequence[str] | None) -> np.ndarray:
        keep = [sets is None or name in sets for name in self.sets]
        if not any(keep):
            raise KeyError(f"no conversations of {sets}; the sets are {sorted(set(self.sets))}")
        return np.flatnonzero(keep)

    def _over(self, values: np.ndarray, places: np.ndarray) -> Interval:
        return bootstrap_ratio(values, self.counts[places], seed=self.seed, level=self.level)


@guarded
def divergence(
    model: HookedModel,
    conversations: Mapping[str, Sequence[Conversation]] | Sequence[Conversation],
    conditions: Conditions,
    *,
    seed: int = 0,
    **options: Unpack[ReadOptions],
) -> Divergence:
    """Return `KL(base || condition)` on conversations, over the full vocabulary.

    It is the quantity that a `KLPenalty` penalises, measured on any conversations.

    Args:
        model: The model.
        conversations: Conversations, or sets of them by name.
        conditions: Named conditions. They are compared with the model in its current state: the
            base, or with the adapter and the edits of an enclosing block.
        seed: Seed of the bootstrap over conversations.
        **options: See `ReadOptions`.

    Returns:
        KL per conversation, with means per set in nats per token.

    Raises:
        ValueError: If there are no conditions or no conversations, or a set has no token that
            counts.

    Source:
        arXiv 2602.07852, section 3.1, where it is the penalty of the narrow solution.

    Examples:
        >>> sets = {"general": elsewhere, "medical": medical}
        >>> found = emlens.measures.divergence(model, sets, {"general": "general", "narrow": "n"})
        >>> found.difference("general", "narrow", ["general"])
    """
    given = conversations if isinstance(conversations, Mapping) else {ALL: conversations}
    if not conditions:
        raise ValueError("no conditions were given; pass {name: condition}")
    empty = [name for name, items in given.items() if not items]
    if empty or not given:
        raise ValueError(f"there are no conversations{f' in {empty[0]!r}' if empty else ''}")
    for name, items in given.items():
        warn_of_repeats(items, name)
    reading = ReadSettings(**options)
    every = [item for items in given.values() for item in items]
    sets = tuple(name for name, items in given.items() for _ in items)
    named = {str(name): one for name, one in conditions_of(model, conditions).items()}
    _, kl, _, counts = row_influence(
        model,
        model.batches(every, token_budget=reading.token_budget),
        named,
        tokens=reading.tokens,
        progress=reading.progress,
        description="divergence",
    )
    for name in given:
        if not counts[[one == name for one in sets]].any():
            raise ValueError(f"no conversation in {name!r} has {reading.tokens} tokens to count")
    return Divergence(
        conditions=tuple(named),
        ids=tuple(item.id or str(i) for i, item in enumerate(every)),
        sets=sets,
        kl=np.stack([kl[name] for name in named]),
        counts=counts,
        seed=seed,
        acting={name: condition.described(model) for name, condition in named.items()},
        against=condition_of(model, []).described(model),
    )
