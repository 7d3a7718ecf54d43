"""Batches of token rows, packed by length to a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from emlens._door import guarded
from emlens.text.tokens import TokenRow

PaddingSide = Literal["left", "right"]
T = TypeVar("T")

TokenMask = Literal[
    "prompt",
    "response",
    "thinking",
    "thinking_and_response",
    "assistant_turn",
    "paper",
    "all",
    "last",
]
"""The tokens that count.

`response` is the content of assistant messages with the end-of-turn token, without thinking;
`thinking` is what they think (`<think>...</think>` with its tags, or `reasoning_content`);
`thinking_and_response` is both: all that the model writes; `assistant_turn` adds the header before
it; `paper` adds what the template writes after the end-of-turn token as well, a newline in ChatML
(what the papers average over); `prompt` is everything else than thinking and response; `all` is
every real token; `last` is the one token from which the first response token is predicted (where
there is no response, the last token). An answer that does not count (`weight: 0`) is `prompt`.
"""

TENSORS = ("input_ids", "attention_mask", "position_ids")
MARKS = ("response", "assistant_turn", "thinking", "closing")
"""The tensors of a batch: those that a model reads, and the masks that all others follow from."""


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
        if tokens not in _MASKS:
            *most, last = _MASKS
            raise ValueError(f"unknown tokens {tokens!r}; choose {', '.join(most)} or {last}")
        return self.attention_mask.bool() & _MASKS[tokens](self)

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
        moved = sent(
            torch.stack([getattr(self, name).long() for name in (*TENSORS, *MARKS)]), device
        )
        return replace(
            self,
            **{
                name: tensor.bool() if name in MARKS else tensor
                for name, tensor in zip((*TENSORS, *MARKS), moved, strict=True)
            },
        )

    def row(self, place: int) -> TokenBatch:
        """One row, without its padding."""
        real = self.attention_mask[place].bool()
        return replace(
            self,
            **{name: getattr(self, name)[place : place + 1, real] for name in (*TENSORS, *MARKS)},
            index=self.index[place : place + 1],
            names=self.names[place : place + 1],
        )


_MASKS: dict[str, Callable[[TokenBatch], Bool[Tensor, "batch pos"]]] = {
    "prompt": lambda batch: ~(batch.thinking | batch.response),
    "response": lambda batch: batch.response,
    "thinking": lambda batch: batch.thinking,
    "thinking_and_response": lambda batch: batch.thinking | batch.response,
    "assistant_turn": lambda batch: batch.assistant_turn,
    "paper": lambda batch: batch.assistant_turn | batch.closing,
    "all": lambda batch: torch.ones_like(batch.response),
    "last": lambda batch: batch._last(),
}
"""How each mask follows from a batch; padding is left out afterwards."""


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
        **{
            name: padded((getattr(row, name) for row in chosen), False, torch.bool)
            for name in MARKS
        },
        index=tuple(places),
        names=tuple(row.name for row in chosen),
        padding_side=padding_side,
    )
