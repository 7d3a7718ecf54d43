"""Per-row losses and KL of many conditions: what every measure is summed from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from tqdm.auto import tqdm

from emlens._distributed import leads, shared
from emlens.hooked import (
    BaseLogProbs,
    Conditions,
    HookedModel,
    Targets,
    sweep_hidden,
    token_losses,
    token_scores,
)
from emlens.text import TokenBatch, TokenMask

LOG_PROB_BUDGET = 512 * 2**20
"""Bytes that one batch's base log-probabilities may take while its conditions are scored."""


@torch.no_grad()
def row_losses(
    model: HookedModel,
    batches: Sequence[TokenBatch],
    conditions: Conditions,
    *,
    tokens: TokenMask = "response",
    progress: bool = False,
    description: str = "losses",
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return summed loss in nats per row and condition, and the counted tokens per row.

    Raises:
        ValueError: If a row has no counted token, or a loss is not finite (row named).
    """
    n_rows = sum(len(batch) for batch in batches)

    def score(batches: Sequence[TokenBatch]) -> np.ndarray:
        table = np.zeros((1 + len(conditions), n_rows))
        counts, sums = table[0], dict(zip(conditions, table[1:], strict=True))
        with _bar(batches, conditions, progress, description) as bar:
            for batch in batches:
                at = list(batch.index)
                targets = Targets.of(batch.to(model.device), tokens)
                counts[at] = targets.counts(len(batch)).cpu().numpy()
                _check_counted(counts[at], batch)
                for name, hidden in sweep_hidden(model, batch, conditions):
                    losses = token_losses(model, targets.predictors(hidden), targets.ids)
                    sums[name][at] = targets.per_row(losses, len(batch)).cpu().numpy()
                    _check_finite(sums[name][at], batch, name)
                    bar.update(batch.n_tokens)
        return table

    what = f"{description} on {tokens} tokens under {_listed(conditions)}"
    table = reduce(np.add, shared(model, batches, score, what))
    return dict(zip(conditions, table[1:], strict=True)), table[0]


@torch.no_grad()
def row_influence(
    model: HookedModel,
    batches: Sequence[TokenBatch],
    conditions: Conditions,
    *,
    tokens: TokenMask = "all",
    progress: bool = False,
    description: str = "influence",
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return per row and condition the summed loss and KL against the model without conditions.

    Rows without a predicted token count zero everywhere.

    Returns:
        Losses in nats per condition, `KL(base || edited)` in nats per condition, base losses,
        and counted tokens, each `[rows]`.
    """
    n_rows, n = sum(len(batch) for batch in batches), len(conditions)

    def score(batches: Sequence[TokenBatch]) -> np.ndarray:
        table = np.zeros((2 + 2 * n, n_rows))
        kept = {name: table[2 + i :: n] for i, name in enumerate(conditions)}
        with _bar(batches, conditions, progress, description) as bar:
            for batch in batches:
                at = list(batch.index)
                targets = Targets.of(batch.to(model.device), tokens)
                table[0, at] = targets.counts(len(batch)).cpu().numpy()
                log_base = None
                for name, hidden in sweep_hidden(model, batch, {"": (), **conditions}):
                    states = targets.predictors(hidden)
                    if log_base is None:
                        log_base = BaseLogProbs(model, states, LOG_PROB_BUDGET)
                        values = token_losses(model, states, targets.ids)
                        table[1, at] = targets.per_row(values, len(batch)).cpu().numpy()
                        continue
                    both = token_scores(model, log_base, states, targets.ids)
                    for i, value in enumerate(both):
                        kept[name][i, at] = targets.per_row(value, len(batch)).cpu().numpy()
                        _check_finite(kept[name][i, at], batch, name)
                    bar.update(batch.n_tokens)
        return table

    what = f"{description} on {tokens} tokens under {_listed(conditions)}"
    table = reduce(np.add, shared(model, batches, score, what))
    losses = dict(zip(conditions, table[2 : 2 + n], strict=True))
    return losses, dict(zip(conditions, table[2 + n :], strict=True)), table[1], table[0]


def _listed(conditions: Conditions) -> str:
    return ", ".join(map(repr, conditions))


def _bar(batches: Sequence[TokenBatch], conditions: Conditions, progress: bool, description: str):
    total = sum(batch.n_tokens for batch in batches) * len(conditions)
    return tqdm(total=total, desc=description, unit="tok", disable=not (progress and leads()))


def _check_counted(counts: np.ndarray, batch: TokenBatch) -> None:
    if (counts == 0).any():
        name = batch.names[int(np.flatnonzero(counts == 0)[0])]
        raise ValueError(f"{name} has no token to score; leave it out or choose another mask")


def _check_finite(values: np.ndarray, batch: TokenBatch, condition: str) -> None:
    if not np.isfinite(values).all():
        name = batch.names[int(np.flatnonzero(~np.isfinite(values))[0])]
        raise ValueError(
            f"the score of {name} under {condition!r} is not finite; a smaller dose or fp32 "
            "weights may help"
        )
