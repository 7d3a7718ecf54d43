"""What does not change while a vector is trained: prefixes below it, and the base's predictions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.hooked import BaseLogProbs, HookedModel
from emlens.hooked.losses import Targets
from emlens.hooked.options import BatchSettings
from emlens.text import TokenBatch, TokenMask, pack
from emlens.text.batches import sent
from emlens.text.tokens import TokenRow
from emlens.training.paths.path import first_few

PREFIX_BUDGET = 1 * 2**30
"""Bytes that cached prefixes may take by default."""

ROWS_AT_ONCE = 8
"""Rows of the KL set in one forward pass of the base."""

LOG_PROB_BUDGET = 1 * 2**30
"""Bytes that cached base log-probabilities may take by default."""


class PrefixCache:
    """The residual below the trained vector, computed once per row.

    Blocks `0 .. layer` see the same input at every update, so their output is kept in the model's
    dtype while it fits into `budget`, on the CPU or on a GPU with much room; the rows beyond it are
    computed again whenever they are drawn. A layer of -1 means that nothing lies below.

    Args:
        model: The model.
        rows: Tokenised conversations.
        layer: Deepest layer that training leaves as it is.
        budget: Bytes that may be kept.
        token_budget: Padded tokens of a batch while filling the cache.
    """

    def __init__(
        self,
        model: HookedModel,
        rows: Sequence[TokenRow],
        layer: int,
        *,
        budget: int = PREFIX_BUDGET,
        token_budget: int = BatchSettings.token_budget,
    ) -> None:
        self.rows = list(rows)
        self._model = model
        self._layer = layer
        self._kept: dict[int, Float[Tensor, "pos d_model"]] = {}
        if layer >= 0:
            self._fill(budget, token_budget)

    @property
    def bytes(self) -> int:
        """Bytes kept."""
        return sum(value.nbytes for value in self._kept.values())

    @property
    def median_norm(self) -> float | None:
        """Median norm of the kept residuals over all tokens; None where rows are missing."""
        if len(self._kept) < len(self.rows):
            return None
        norms = [kept.float().norm(dim=-1) for kept in self._kept.values()]
        return float(torch.cat(norms).median())

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, places: Sequence[int]) -> tuple[TokenBatch, tuple[int, Tensor] | None]:
        """Return the rows at `places` as one batch, and what to resume it from."""
        model = self._model
        batch = self.tokens(places)
        if self._layer < 0:
            return batch, None
        if any(place not in self._kept for place in places):
            return batch, (self._layer, model.prefix(batch, self._layer)[self._layer])
        parts = [self._kept[place] for place in places]
        longest = batch.input_ids.shape[1]
        residual = parts[0].new_zeros(len(parts), longest, model.d_model)
        for row, part in zip(residual, parts, strict=True):
            row[: len(part)] = part
        return batch, (self._layer, sent(residual, model.device))

    def tokens(self, places: Sequence[int]) -> TokenBatch:
        """The rows at `places` as one batch."""
        rows = [self.rows[place] for place in places]
        longest = max(len(row.input_ids) for row in rows)
        budget = longest * len(rows)
        (batch,) = pack(rows, token_budget=budget, pad_id=self._model.pad_id, sort=False)
        return batch

    def _fill(self, budget: int, token_budget: int) -> None:
        model = self._model
        size = torch.empty(0, dtype=model.dtype).element_size() * model.d_model
        room, places = budget, []
        for place, row in enumerate(self.rows):
            room -= size * len(row.input_ids)
            if room < 0:
                break
            places.append(place)
        chosen = [self.rows[place] for place in places]
        home = _home(model, size * sum(len(row.input_ids) for row in chosen))
        for batch in pack(chosen, token_budget=token_budget, pad_id=model.pad_id):
            residual = model.prefix(batch, self._layer)[self._layer].to(home)
            for row, place in enumerate(batch.index):
                length = len(chosen[place].input_ids)
                self._kept[places[place]] = residual[row, :length].clone()


def _home(model: HookedModel, size: int) -> torch.device:
    """Where so many bytes are kept: on a GPU where they are little of what is free."""
    if model.device.type != "cuda" or 8 * size > torch.cuda.mem_get_info(model.device)[0]:
        return torch.device("cpu")
    return model.device


class BasePredictions:
    """The base model's predictions on a fixed KL set, computed once per row.

    Log-probabilities are held while they fit into `budget`; beyond it only final hidden states
    are held, and the LM head runs again.

    Args:
        model: The model, without the edit that is trained.
        prefixes: The KL set's rows and prefixes.
        tokens: Tokens on which the KL counts.
        budget: Bytes for `[tokens, vocab]` in fp32.
    """

    def __init__(
        self, model: HookedModel, prefixes: PrefixCache, tokens: TokenMask, budget: int
    ) -> None:
        self._model = model
        self._log_probs: list[BaseLogProbs] = []
        room = budget
        for start in range(0, len(prefixes), ROWS_AT_ONCE):
            places = range(start, min(start + ROWS_AT_ONCE, len(prefixes)))
            batch, resume = prefixes.batch(places)
            targets = Targets.of(batch, tokens)
            hidden = model.hidden(batch, resume=resume)
            states = targets.to(model.device).predictors(hidden)
            counts = targets.counts(len(batch)).long().tolist()
            for of_row in states.split(counts):
                log_probs = BaseLogProbs(model, of_row, room)
                room -= log_probs.bytes if log_probs.held is not None else 0
                self._log_probs.append(log_probs)

    @property
    def bytes(self) -> int:
        """Bytes that all log-probabilities take."""
        return sum(part.bytes for part in self._log_probs)

    @property
    def held(self) -> bool:
        """Whether all of them fitted into the budget."""
        return all(part.held is not None for part in self._log_probs)

    def of(self, places: Sequence[int]) -> BaseLogProbs:
        """The base log-probabilities of some rows, in their order."""
        return BaseLogProbs.joined([self._log_probs[place] for place in places])


def check_counted(rows: Sequence[TokenRow], tokens: TokenMask, what: str) -> None:
    """Refuse rows in which nothing is predicted that counts.

    Raises:
        ValueError: How many, and the first ones.
    """
    empty = [
        rows[place].name
        for batch in pack(rows)
        for place, n in zip(batch.index, Targets.of(batch, tokens).counts(len(batch)), strict=True)
        if not n
    ]
    if empty:
        raise ValueError(
            f"{what}: {len(empty)} of {len(rows)} conversations have no {tokens} tokens to count: "
            f"{first_few(empty)}; give them an answer, leave them out, or choose other tokens"
        )
