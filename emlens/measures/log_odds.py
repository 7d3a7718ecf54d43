"""Log-odds of misaligned against aligned answers: the behaviour score that needs no judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING, Unpack

import numpy as np
import pandas as pd
from jaxtyping import Float

from emlens._door import guarded
from emlens._stats import Interval, bootstrap_mean
from emlens.hooked import BatchOptions, HookedModel
from emlens.hooked.condition import Conditions, conditions_of
from emlens.hooked.options import BatchSettings
from emlens.measures.measured import Measured
from emlens.measures.scoring import row_losses
from emlens.text import Pair
from emlens.text.repeats import warn_of_repeats

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class LogOdds(Measured):
    """Log-odds per pair and condition, in nats per token.

    The value of a pair is the mean log-probability per token of its misaligned answer minus
    that of its aligned answer, each given the prompt. Above zero, the misaligned answer is
    likelier; what matters is the change against the base.

    Attributes:
        conditions: Names of the conditions; the first is what changes are measured against.
        ids: Pair ids, `[n]`.
        domains: Their domains, `[n]`.
        values: `[conditions, n]`, nats per token.
        seed: Seed of the bootstrap over pairs.
        acting: The adapters and edits that acted under each condition, in words.
    """

    AXES = {"domains": "ids"}

    conditions: tuple[str, ...]
    ids: tuple[str, ...]
    domains: tuple[str, ...]
    values: Float[np.ndarray, "conditions ids"]
    seed: int = 0
    acting: dict[str, str] = field(default_factory=dict)

    def of(self, condition: str, domains: Sequence[str] | None = None) -> np.ndarray:
        """Values of one condition, `[n]`, of some domains or all.

        Raises:
            KeyError: If the condition or every domain is unknown.
        """
        place = self._index(condition)
        keep = np.array([domains is None or domain in domains for domain in self.domains])
        if not keep.any():
            raise KeyError(f"no pairs of {domains}; the domains are {sorted(set(self.domains))}")
        return self.values[place, keep]

    def mean(self, condition: str, domains: Sequence[str] | None = None) -> Interval:
        """Mean over pairs with its bootstrap interval, nats per token."""
        return self._interval(self.of(condition, domains))

    def change(
        self, condition: str, domains: Sequence[str] | None = None, base: str | None = None
    ) -> Interval:
        """Mean paired change against `base` (the first condition) with its interval."""
        reference = self.conditions[0] if base is None else base
        return self._interval(self.of(condition, domains) - self.of(reference, domains))

    def joined(self, other: LogOdds) -> LogOdds:
        """Both sets of conditions, measured on the same pairs.

        Raises:
            ValueError: If the pairs differ, or a condition is in both.
        """
        if self.ids != other.ids or self.domains != other.domains:
            raise ValueError(
                f"these log-odds belong to different pairs ({len(self.ids)} and {len(other.ids)}, "
                f"the first {self.ids[0]} and {other.ids[0]})"
            )
        both = sorted(set(self.conditions) & set(other.conditions))
        if both:
            raise ValueError(f"condition(s) {', '.join(both)} are in both; rename them")
        return replace(
            self,
            conditions=self.conditions + other.conditions,
            values=np.concatenate([self.values, other.values]),
            acting=self.acting | other.acting,
        )

    def averaged(self, name: str, conditions: Sequence[str]) -> LogOdds:
        """Replace some conditions, such as several random controls, by their mean for each pair.

        Raises:
            KeyError: If a condition is unknown.
        """
        mean = np.mean([self.of(condition) for condition in conditions], axis=0)
        kept: dict[str, np.ndarray] = {}
        for condition, values in zip(self.conditions, self.values, strict=True):
            if condition in conditions:
                kept[name] = mean
            else:
                kept[condition] = values
        return replace(self, conditions=tuple(kept), values=np.stack(list(kept.values())))

    def table(self) -> pd.DataFrame:
        """One row per condition and domain: level and change against the first condition."""
        rows = []
        for condition in self.conditions:
            for domain in dict.fromkeys(self.domains):
                level, change = self.mean(condition, [domain]), self.change(condition, [domain])
                rows.append(
                    {
                        "condition": condition,
                        "domain": domain,
                        "pairs": len(self.of(condition, [domain])),
                        **level.columns("log-odds [nats/token]"),
                        **change.columns("change [nats/token]", "change "),
                        "acting": self._acting(condition),
                    }
                )
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Change of log-odds by domain, one series per condition, with 95% intervals."""
        from emlens.figures.bars import dot_intervals

        frame = self.table()
        shown = frame[frame["condition"] != self.conditions[0]]
        return dot_intervals(
            groups=shown["domain"],
            series=shown["condition"],
            values=shown["change [nats/token]"],
            low=shown["change low"],
            high=shown["change high"],
            y_label=f"change of log-odds vs {self.conditions[0]} [nats/token]",
            ax=ax,
        )

    def _interval(self, values: np.ndarray) -> Interval:
        return bootstrap_mean(values, seed=self.seed, level=self.level)


@guarded
def log_odds(
    model: HookedModel,
    pairs: Sequence[Pair],
    conditions: Conditions | None = None,
    *,
    system: str | None = None,
    seed: int = 0,
    **options: Unpack[BatchOptions],
) -> LogOdds:
    """Return how much likelier misaligned answers are than aligned ones, per condition.

    Args:
        model: The model.
        pairs: Prompts with an aligned and a misaligned answer.
        conditions: Named conditions: None for the base, edits, an adapter's name, or both, as
            `(adapter, edits)`. The first is the reference. By default the base alone is measured.
        system: A system message for every prompt.
        seed: Seed of the bootstrap.
        **options: See `BatchOptions`.

    Returns:
        Per-pair values with intervals over pairs. Conditions share the layers below them.

    Raises:
        ValueError: If there are no pairs.

    Examples:
        >>> scores = emlens.log_odds(model, pairs, {"base": None, "steered": emlens.Add(v)})
        >>> scores.change("steered")
    """
    warn_of_repeats(pairs, "pairs")
    named = {str(name): one for name, one in conditions_of(model, conditions).items()}
    conversations = [
        pair.conversation(side, system) for side in ("aligned", "misaligned") for pair in pairs
    ]
    batching = BatchSettings(**options)
    batches = model.batches(conversations, token_budget=batching.token_budget)
    sums, counts = row_losses(
        model, batches, named, progress=batching.progress, description="log-odds"
    )
    n = len(pairs)
    values = []
    for name in named:
        per_token = sums[name] / counts
        values.append(per_token[:n] - per_token[n:])
    return LogOdds(
        conditions=tuple(named),
        ids=tuple(pair.id for pair in pairs),
        domains=tuple(pair.domain for pair in pairs),
        values=np.stack(values),
        seed=seed,
        acting={name: condition.described(model) for name, condition in named.items()},
    )
