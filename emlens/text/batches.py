"""Batches of token rows, packed by length to a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from emlens._door import guarded
from emlens.text.tokens import TokenMask, TokenRow

PaddingSide = Literal["left", "right"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Rows of tokens padded to one length, with everything a forward pass must be told.

    Attributes:
        input_ids: `[batch, pos]`.
        attention_mask: 1 on real tokens, `[batch, pos]`.
        position_ids: 0, 1, ... over the real tokens of each row, `[batch, pos]`.
        response: Tokens of responses, `[batch, pos]`.
        assistant_turn: Tokens of assistant turns, `[batch, pos]`.
        thinking: Tokens of the thinking of answers, `[batch, pos]`.
        closing: Tokens that the template writes after assistant turns, `[batch, pos]`.
        index: Place of each row in the list that was packed.
        names: What each row is called in errors.
        padding_side: Where the padding is.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "batch pos"]
    response: Bool[Tensor, "batch pos"]
    assistant_turn: Bool[Tensor, "batch pos"]
    thinking: Bool[Tensor, "batch pos"]
    closing: Bool[Tensor, "batch pos"]
    index: tuple[int, ...]
    names: tuple[str, ...]
    padding_side: PaddingSide = "right"

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def shape(self) -> tuple[int, int]:
        rows, longest = self.input_ids.shape
        return rows, longest

    @property
    def n_tokens(self) -> int:
        """Real tokens, padding left out."""
        return int(self.attention_mask.sum())

    def mask(self, tokens: TokenMask) -> Bool[Tensor, "batch pos"]:
        """The tokens that count; never padding.

        Raises:
            ValueError: If `tokens` names no mask.
        """
        real = self.attention_mask.bool()
        if tokens == "all":
            return real
        if tokens == "response":
            return real & self.response
        if tokens == "assistant_turn":
            return real & self.assistant_turn
        if tokens == "paper":
            return real & (self.assistant_turn | self.closing)
        if tokens == "thinking":
            return real & self.thinking
        if tokens == "thinking_and_response":
            return real & (self.thinking | self.response)
        if tokens == "prompt":
            return real & ~(self.thinking | self.response)
        if tokens == "last":
            return real & self._last()
        raise ValueError(
            f"unknown tokens {tokens!r}; choose prompt, response, thinking, "
            "thinking_and_response, assistant_turn, paper, all or last"
        )

    def _last(self) -> Bool[Tensor, "batch pos"]:
        """The token from which the first response token is predicted, or the last of the row."""
        before = self.response.int().cumsum(1) == 0
        position = self.position_ids.masked_fill(~(before & self.attention_mask.bool()), -1)
        return position == position.amax(dim=1, keepdim=True)

    def targets(self, tokens: TokenMask) -> Bool[Tensor, "batch pos"]:
        """The mask, minus the first token of each row: nothing predicts it."""
        return self.mask(tokens) & (self.position_ids > 0)

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on a device."""
        if self.input_ids.device == torch.device(device):
            return self
        whole = [self.input_ids, self.attention_mask, self.position_ids]
        masks = [self.response, self.assistant_turn, self.thinking, self.closing]
        moved = sent(torch.stack([*whole, *(mask.long() for mask in masks)]), device)
        input_ids, attention_mask, position_ids = moved[:3]
        response, assistant_turn, thinking, closing = moved[3:].bool()
        return replace(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            response=response,
            assistant_turn=assistant_turn,
            thinking=thinking,
            closing=closing,
        )


def sent(values: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; on its way to a GPU, nothing waits for it."""
    if values.device.type != "cpu" or torch.device(device).type != "cuda":
        return values.to(device)
    # PyTorch reuses the pinned copy only when the GPU has read it
    return values.pin_memory().to(device, non_blocking=True)


@guarded
def pack(
    rows: Sequence[TokenRow],
    *,
    token_budget: int = 4096,
    max_rows: int | None = None,
    padding_side: PaddingSide = "right",
    pad_id: int = 0,
    sort: bool = True,
) -> list[TokenBatch]:
    """Pack rows into batches of at most `token_budget` tokens, padding included.

    Args:
        rows: The rows.
        token_budget: Rows times the longest of them; a row that is longer gets its own batch.
        max_rows: Rows a batch may have.
        padding_side: Where the padding goes.
        pad_id: Token to pad with.
        sort: Put rows of like length together, the longest first, so that memory runs out at
            once or never. `batch.index` and `restore` give the order back.

    Raises:
        ValueError: If a row is empty, or the budget, `max_rows` or the side is not one.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, not {token_budget}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, not {max_rows}")
    if padding_side not in ("left", "right"):
        raise ValueError(f"unknown padding side {padding_side!r}; choose 'left' or 'right'")
    for row in rows:
        if not row.input_ids:
            raise ValueError(f"{row.name} has no tokens")
    places = list(range(len(rows)))
    if sort:
        places.sort(key=lambda place: -len(rows[place].input_ids))
    groups: list[list[int]] = []
    longest = 0
    for place in places:
        length = len(rows[place].input_ids)
        group = groups[-1] if groups else []
        grown = (len(group) + 1) * max(longest, length)
        if not group or grown > token_budget or len(group) == max_rows:
            groups.append([place])
            longest = length
        else:
            group.append(place)
            longest = max(longest, length)
    return [_batch(rows, group, padding_side, pad_id) for group in groups]


def restore(values: Iterable[Sequence[T]], batches: Sequence[TokenBatch]) -> list[T]:
    """Put per-row values of packed batches back into the order of the rows.

    Raises:
        ValueError: If a batch has not as many values as rows.
    """
    placed: dict[int, T] = {}
    for batch, of_rows in zip(batches, values, strict=True):
        if len(of_rows) != len(batch):
            raise ValueError(f"{len(of_rows)} values for a batch of {len(batch)} rows")
        placed.update(zip(batch.index, of_rows, strict=True))
    return [placed[place] for place in sorted(placed)]


def _batch(
    rows: Sequence[TokenRow], places: list[int], padding_side: PaddingSide, pad_id: int
) -> TokenBatch:
    chosen = [rows[place] for place in places]
    longest = max(len(row.input_ids) for row in chosen)

    def padded(values: Iterable[Sequence], fill: object, dtype: torch.dtype) -> Tensor:
        lines = []
        for line in values:
            padding = [fill] * (longest - len(line))
            lines.append(padding + list(line) if padding_side == "left" else [*line, *padding])
        return torch.tensor(lines, dtype=dtype)

    lengths = [len(row.input_ids) for row in chosen]
    return TokenBatch(
        input_ids=padded((row.input_ids for row in chosen), pad_id, torch.long),
        attention_mask=padded(([1] * n for n in lengths), 0, torch.long),
        position_ids=padded((range(n) for n in lengths), 0, torch.long),
        response=padded((row.response for row in chosen), False, torch.bool),
        assistant_turn=padded((row.assistant_turn for row in chosen), False, torch.bool),
        thinking=padded((row.thinking for row in chosen), False, torch.bool),
        closing=padded((row.closing for row in chosen), False, torch.bool),
        index=tuple(places),
        names=tuple(row.name for row in chosen),
        padding_side=padding_side,
    )
