"""Per-row losses and KL of many conditions, from which every measure is summed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from emlens._distributed import shared
from emlens._progress import bar
from emlens.hooked import BaseLogProbs, Condition, HookedModel
from emlens.hooked.condition import ConditionLike, condition_of, conditions_of
from emlens.hooked.finite import check_finite, late_checks
from emlens.hooked.losses import Targets, token_losses, token_scores
from emlens.hooked.sweep import sweep
from emlens.text import Corpus, TokenBatch, TokenMask
from emlens.text.tokens import tokenize_documents

K = TypeVar("K", bound=Hashable)

LOG_PROB_BUDGET = 512 * 2**20
"""Bytes that one batch's base log-probabilities may take while its conditions are scored."""


Rows = dict[int, tuple[float, ...]]
"""Values of the tokens of each row, `[pos]`; NaN where nothing predicts a token."""


@dataclass
class TokenValues:
    """Values of single tokens, kept on request, without padding.

    Attributes:
        texts: Tokens of each row, as text.
        names: Name of each row.
        base: Loss of each token without conditions, nats.
        losses: Loss of each token, nats, by condition.
        kl: `KL(base || edited)` where it is predicted, nats, by condition.
    """

    texts: dict[int, tuple[str, ...]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    base: Rows = field(default_factory=dict)
    losses: dict[Hashable, Rows] = field(default_factory=dict)
    kl: dict[Hashable, Rows] = field(default_factory=dict)

    def note(self, model: HookedModel, batch: TokenBatch) -> None:
        """Keep the tokens of a batch as text."""
        for row, place in enumerate(batch.index):
            ids = batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
            self.texts[place] = tuple(str(model.tokenizer.decode([token])) for token in ids)
            self.names[place] = batch.names[row]

    def merge(self, other: TokenValues) -> None:
        """Add what another process has read."""
        self.texts |= other.texts
        self.names |= other.names
        self.base |= other.base
        for mine, theirs in ((self.losses, other.losses), (self.kl, other.kl)):
            for name, rows in theirs.items():
                mine.setdefault(name, {}).update(rows)


def with_tokens(model: HookedModel, corpus: Corpus) -> Corpus:
    """The corpus without documents that have no token at all.

    Raises:
        ValueError: If none is left.
    """
    blank = [document for document in corpus.documents if not document.text.strip()]
    rows = tokenize_documents(blank, model.tokenizer)
    empty = {id(one) for one, row in zip(blank, rows, strict=True) if not row.input_ids}
    kept = tuple(document for document in corpus.documents if id(document) not in empty)
    if not kept:
        raise ValueError(f"no document of corpus {corpus.name!r} has a token")
    return corpus if len(kept) == len(corpus) else Corpus(corpus.name, kept)


def by_place(batch: TokenBatch, targets: Targets, values: Tensor) -> Rows:
    """Values of the counted tokens at their places in each row, NaN elsewhere."""
    table = torch.full(batch.shape, float("nan"))
    table[targets.rows.cpu(), targets.positions.cpu()] = values.float().cpu()
    real = batch.attention_mask.bool().cpu()
    return {place: tuple(table[row][real[row]].tolist()) for row, place in enumerate(batch.index)}


@torch.no_grad()
def row_losses(
    model: HookedModel,
    batches: Sequence[TokenBatch],
    conditions: Mapping[K, ConditionLike],
    *,
    tokens: TokenMask = "response",
    progress: bool = True,
    description: str = "losses",
) -> tuple[dict[K, np.ndarray], np.ndarray]:
    """Return summed loss in nats per row and condition, and the counted tokens per row.

    Raises:
        ValueError: If there are no rows, or one has no counted token.
        NonFiniteError: If a loss is not finite; condition and row are named.
    """
    n_rows, named = sum(len(batch) for batch in batches), conditions_of(model, conditions)
    if not n_rows:
        raise ValueError("there are no conversations to measure")

    def score(batches: Sequence[TokenBatch]) -> np.ndarray:
        table = np.zeros((1 + len(named), n_rows))
        counts = table[0]
        with _bar(batches, named, progress, description) as bar, late_checks():
            for batch in batches:
                at, found = list(batch.index), []
                targets = Targets.of(batch, tokens)
                counts[at] = targets.counts(len(batch)).numpy()
                _check_counted(counts[at], batch)
                targets = targets.to(model.device)
                for name, hidden, head in sweep(model, batch, named):
                    losses = token_losses(head, targets.predictors(hidden), targets.ids)
                    of_rows = targets.per_row(losses, len(batch))
                    _check_finite(model, batch, named[name], of_rows)
                    found.append(of_rows)
                    bar.update(batch.n_tokens)
                table[1:, at] = torch.stack(found).cpu().numpy()
        return table

    what = f"{description} on {tokens} tokens under {_listed(named)}"
    table = reduce(np.add, shared(model, batches, score, what))
    return dict(zip(named, table[1:], strict=True)), table[0]


@torch.no_grad()
def row_influence(
    model: HookedModel,
    batches: Sequence[TokenBatch],
    conditions: Mapping[K, ConditionLike],
    *,
    tokens: TokenMask = "all",
    progress: bool = True,
    description: str = "influence",
    keep: TokenValues | None = None,
) -> tuple[dict[K, np.ndarray], dict[K, np.ndarray], np.ndarray, np.ndarray]:
    """Return per row and condition the summed loss, and KL against the condition `[]`.

    Rows without a predicted token count zero everywhere. `keep` is filled with
    the values of every token.

    Raises:
        NonFiniteError: If a value is not finite; condition and row are named.

    Returns:
        Losses in nats per condition, `KL(base || edited)` in nats per condition, base losses,
        and counted tokens, each `[rows]`.
    """
    n_rows, n = sum(len(batch) for batch in batches), len(conditions)
    # the base comes first, under a name that no condition can have
    measured: dict = {object(): condition_of(model, [])}
    measured |= conditions_of(model, conditions) if conditions else {}

    def score(batches: Sequence[TokenBatch]) -> tuple[np.ndarray, TokenValues | None]:
        table = np.zeros((2 + 2 * n, n_rows))
        single = None if keep is None else TokenValues()
        with _bar(batches, conditions, progress, description) as bar, late_checks():
            for batch in batches:
                at, found = list(batch.index), []
                targets = Targets.of(batch, tokens)
                table[0, at] = targets.counts(len(batch)).numpy()
                targets, log_base = targets.to(model.device), None
                for name, hidden, head in sweep(model, batch, measured):
                    states = targets.predictors(hidden)
                    if log_base is None:
                        log_base = BaseLogProbs(head, states, LOG_PROB_BUDGET)
                        values = token_losses(head, states, targets.ids)
                        base = targets.per_row(values, len(batch))
                        _check_finite(model, batch, measured[name], base)
                        found.append(base)
                        if single is not None:
                            single.note(model, batch)
                            single.base |= by_place(batch, targets, values)
                        continue
                    both = token_scores(head, log_base, states, targets.ids)
                    of_rows = [targets.per_row(value, len(batch)) for value in both]
                    _check_finite(model, batch, measured[name], *of_rows)
                    found += of_rows
                    if single is not None:
                        for kept, value in zip((single.losses, single.kl), both, strict=True):
                            kept.setdefault(name, {}).update(by_place(batch, targets, value))
                    bar.update(batch.n_tokens)
                # base, then loss and KL of each condition, for one transfer
                sums = torch.stack(found).cpu().numpy()
                table[1:, at] = np.concatenate([sums[:1], sums[1::2], sums[2::2]])
        return table, single

    what = f"{description} on {tokens} tokens under {_listed(conditions)}"
    parts = shared(model, batches, score, what)
    table = reduce(np.add, (part for part, _ in parts))
    for _, single in parts:
        if keep is not None and single is not None:
            keep.merge(single)
    losses = dict(zip(conditions, table[2 : 2 + n], strict=True))
    return losses, dict(zip(conditions, table[2 + n :], strict=True)), table[1], table[0]


def _listed(conditions: Mapping) -> str:
    return ", ".join(map(repr, conditions))


def _bar(batches: Sequence[TokenBatch], conditions: Mapping, progress: bool, description: str):
    total = sum(batch.n_tokens for batch in batches) * len(conditions)
    return bar(total=total, desc=description, unit="tok", shown=progress)


def _check_counted(counts: np.ndarray, batch: TokenBatch) -> None:
    if (counts == 0).any():
        name = batch.names[int(np.flatnonzero(counts == 0)[0])]
        raise ValueError(f"{name} has no token to score; leave it out or choose another mask")


def _check_finite(
    model: HookedModel, batch: TokenBatch, condition: Condition, *values: Tensor
) -> None:
    """Check summed losses, and KL where there is one."""
    what: tuple[str, ...] = ("the loss of {}", "the KL of {}")
    check_finite(model, dict(zip(what, values, strict=False)), batch.names, condition=condition)
