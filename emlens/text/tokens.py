"""Tokenisation through the chat template, once, with masks found in the rendered text."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from emlens._door import guarded
from emlens.text.conversation import Conversation, names
from emlens.text.spans import Rendering, Turn, render
from emlens.text.template import Template, closing_ids, closing_tokens

TOGETHER = 256
"""Conversations that are tokenised in one call."""


class Text(Protocol):
    """Anything with a name and a text."""

    @property
    def id(self) -> str: ...
    @property
    def text(self) -> str: ...


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One tokenised conversation or document.

    Attributes:
        input_ids: Token ids, `[pos]`.
        response: Which tokens belong to a response, `[pos]`.
        assistant_turn: Which belong to an assistant turn, header included, `[pos]`.
        name: What the row is called in errors.
        thinking: Which belong to the thinking of an answer, `[pos]`; none by default.
        closing: Which the template writes after the end of an assistant turn, `[pos]`; none by
            default.
    """

    input_ids: tuple[int, ...]
    response: tuple[bool, ...]
    assistant_turn: tuple[bool, ...]
    name: str
    thinking: tuple[bool, ...] = ()
    closing: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        for name in ("thinking", "closing"):
            if not getattr(self, name):
                object.__setattr__(self, name, (False,) * len(self.input_ids))

    def __len__(self) -> int:
        return len(self.input_ids)

    def cut(self, n: int) -> TokenRow:
        """The first `n` tokens."""
        return TokenRow(
            self.input_ids[:n],
            self.response[:n],
            self.assistant_turn[:n],
            self.name,
            self.thinking[:n],
            self.closing[:n],
        )


@guarded
def tokenize(
    conversations: Sequence[Conversation],
    template: Template | PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    truncate: bool = False,
    generation_prompt: bool = False,
    continue_final_message: bool = False,
    thinking: bool = True,
) -> list[TokenRow]:
    """Tokenise conversations through a chat template, with masks.

    Each conversation is rendered and tokenised once; masks come from where its messages lie in
    the rendered text, never from searching for tokens.

    Args:
        conversations: The conversations.
        template: `model.template`, or a fast tokenizer with a chat template.
        max_tokens: Tokens that a conversation may have.
        truncate: Cut what is longer at its end, instead of refusing it.
        generation_prompt: Open an assistant turn at the end, for generation.
        continue_final_message: With a generation prompt: an answer that a conversation ends with
            is continued.
        thinking: With a generation prompt: without it the thinking is closed, so that the answer
            itself comes next.

    Raises:
        ValueError: If the tokenizer has no chat template, a response is empty, a conversation is
            too long (it is named, with its length), the template refuses a role or does not use
            what a message has beside role and content, or a conversation that should be answered
            already ends with an answer.
        TypeError: If the tokenizer is not a fast one.
    """
    template = Template.of(template)
    _check_tokenizer(template.tokenizer)
    _check_limit(max_tokens)
    rows, named = [], list(zip(conversations, names(conversations), strict=True))
    for start in range(0, len(named), TOGETHER):
        some = named[start : start + TOGETHER]
        renderings = [
            render(
                template,
                conversation,
                name,
                generation_prompt=generation_prompt,
                continue_final_message=continue_final_message,
                thinking=thinking,
            )
            for conversation, name in some
        ]
        for row in _rows(template.tokenizer, renderings, [name for _, name in some]):
            rows.append(_fitted(row, max_tokens, truncate, must_answer=not generation_prompt))
    return rows


@guarded
def tokenize_documents(
    documents: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
) -> list[TokenRow]:
    """Tokenise raw text, without a chat template, cut to `max_tokens`.

    Special tokens are those that the tokenizer adds by itself: a BOS for models trained with
    one. No token belongs to a response.

    Raises:
        ValueError: If a text begins with two BOS tokens, or `max_tokens` is below 1.
    """
    _check_limit(max_tokens)
    rows = []
    for document in documents:
        ids = tokenizer(document.text, verbose=False)["input_ids"]
        row = TokenRow(tuple(ids), (False,) * len(ids), (False,) * len(ids), document.id)
        _check_bos(row, tokenizer)
        rows.append(row.cut(max_tokens) if max_tokens is not None else row)
    return rows


def template_hash(template: Template | PreTrainedTokenizerBase) -> str:
    """Hash of the chat template and its arguments; 16 hexadecimal digits."""
    return Template.of(template).hash


def _rows(
    tokenizer: PreTrainedTokenizerBase, renderings: Sequence[Rendering], names: Sequence[str]
) -> Iterator[TokenRow]:
    # in one call, which fast tokenizers spread over the cores
    encoded = tokenizer(
        [rendering.text for rendering in renderings],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    closers = closing_ids(tokenizer)
    parts = zip(renderings, encoded["input_ids"], encoded["offset_mapping"], names, strict=True)
    for rendering, ids, offsets, name in parts:
        row = _row(rendering, ids, offsets, closers, name)
        _check_bos(row, tokenizer)
        yield row


def _row(
    rendering: Rendering,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    closers: Container[int],
    name: str,
) -> TokenRow:
    n = len(ids)
    closing = closing_tokens(closers, rendering.text, ids, offsets)
    response, thinking, assistant, closed = ([False] * n for _ in range(4))
    for turn in rendering.turns:
        if not turn.counts:
            continue
        last = _last_token(turn, offsets, closing)
        answered = turn.content < turn.content_end
        for i in range(n):
            start, end = offsets[i]
            if start == end:
                continue
            if i > last:
                closed[i] |= last >= 0 and turn.content_end <= start < turn.end
                continue
            thinking[i] |= any(start < b and end > a for a, b in turn.thinking)
            response[i] |= answered and start < turn.end and end > turn.content and not thinking[i]
            assistant[i] |= start < turn.end and end > turn.header
    masks = tuple(response), tuple(assistant), name, tuple(thinking), tuple(closed)
    return TokenRow(tuple(ids), *masks)


def _last_token(turn: Turn, offsets: Sequence[tuple[int, int]], closing: list[bool]) -> int:
    """The turn's end-of-turn token, or the last of its content where there is none."""
    inside = [i for i, (a, b) in enumerate(offsets) if a != b and a < turn.end and b > turn.content]
    after = [i for i in inside if offsets[i][0] >= turn.content_end and closing[i]]
    if after:
        return after[0]
    return max((i for i in inside if offsets[i][0] < turn.content_end), default=-1)


def _fitted(row: TokenRow, limit: int | None, truncate: bool, *, must_answer: bool) -> TokenRow:
    if limit is None or len(row) <= limit:
        return row
    if not truncate:
        raise ValueError(
            f"{row.name} has {len(row)} tokens, more than max_tokens={limit}; raise the limit, "
            "leave it out, or pass truncate=True"
        )
    if not must_answer:
        raise ValueError(
            f"{row.name} has {len(row)} tokens, more than max_tokens={limit}; a prompt to be "
            "answered cannot be cut at its end"
        )
    short = row.cut(limit)
    if any(row.response) and not any(short.response):
        raise ValueError(f"cutting {row.name} to {limit} tokens leaves nothing of its response")
    return short


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer of {name} has no chat template; use a chat model, or set "
            "tokenizer.chat_template"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"the tokenizer of {name} is a slow one; masks need the offsets of a fast tokenizer "
            "(AutoTokenizer.from_pretrained(..., use_fast=True))"
        )


def _check_limit(max_tokens: int | None) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")


def _check_bos(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> None:
    bos = tokenizer.bos_token_id
    if bos is not None and row.input_ids[:2] == (bos, bos):
        raise ValueError(
            f"{row.name} begins with two {tokenizer.bos_token!r} tokens; the template and the "
            "tokenizer both add one"
        )
