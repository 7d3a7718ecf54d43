"""Where each assistant message lies in the text that a chat template renders."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from emlens.text.conversation import Conversation, Message

Spans = dict[int, tuple[int, int]]
"""Where the content of each message starts and ends, by the place of the message."""


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn, in characters of the rendered text.

    Attributes:
        header: Where its header starts.
        content: Where its content starts.
        content_end: Where its content ends.
        end: Where the turn ends, end-of-turn marker and what follows it included.
    """

    header: int
    content: int
    content_end: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered conversation and its assistant turns."""

    text: str
    turns: tuple[Turn, ...]


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    name: str,
    generation_prompt: bool = False,
) -> Rendering:
    """Render a conversation and find its assistant turns.

    Contents are found by rendering the conversation a second time with a marker in the place of
    each: what stands between the markers is the template's own text, and the contents are what
    lies between it in the real rendering. Where a template reacts to the content itself, so that
    the two renderings differ, contents are searched for as text, in order.

    Raises:
        ValueError: If the template refuses the conversation, a response is empty or is not in
            the rendered text, or a conversation to be answered ends with an answer.
    """
    messages = list(conversation.messages)
    if generation_prompt and messages[-1]["role"] == "assistant":
        raise ValueError(f"{name} already ends with an answer; generate from its .prompt")
    text = _rendered(tokenizer, messages, name, generation_prompt)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers:
        if not messages[i]["content"].strip():
            raise ValueError(f"{name} has an empty response (message {i}); leave it out")
    if not answers:
        return Rendering(text, ())
    spans = _aligned(tokenizer, messages, text, generation_prompt)
    if spans is None:
        spans = _searched(tokenizer, messages, text, name)
    return Rendering(text, tuple(_turn(tokenizer, messages, i, text, spans) for i in answers))


def _aligned(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str, generation_prompt: bool
) -> Spans | None:
    """Where contents lie, by a rendering of markers; None where it does not fit the real one."""
    # The system message stays as it is: some templates move it, or merge it into another.
    marks = {i: f"\ue000{i}\ue001" for i, m in enumerate(messages) if m["role"] != "system"}
    marked: list[Message] = [
        {"role": m["role"], "content": marks.get(i, m["content"])} for i, m in enumerate(messages)
    ]
    try:
        rest = _applied(tokenizer, marked, generation_prompt)
    except (TemplateError, ValueError):
        return None
    pieces = []
    for mark in marks.values():
        piece, found, rest = rest.partition(mark)
        if not found:
            return None
        pieces.append(piece)
    if not text.startswith(pieces[0]):
        return None
    spans, position = {}, len(pieces[0])
    for i, following in zip(marks, [*pieces[1:], rest], strict=True):
        content = messages[i]["content"]
        for shown in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(shown + following, position):
                break
        else:
            return None
        start = position + len(shown) - len(shown.lstrip())
        spans[i] = (start, max(start, position + len(shown.rstrip())))
        position += len(shown) + len(following)
    return spans if position == len(text) else None


def _searched(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str, name: str
) -> Spans:
    """Where contents lie, each searched for after the one before it."""
    spans, done = {}, 0
    for i, message in enumerate(messages):
        if message["role"] == "system":
            continue
        content, opened = message["content"].strip(), done
        if message["role"] == "assistant":
            opened = max(done, _prefix(tokenizer, messages[:i], text, opening=True) or 0)
        start = text.find(content, opened)
        if start >= 0:
            done = start + len(content)
            spans[i] = (start, done)
        elif message["role"] == "assistant":
            raise ValueError(
                f"the response of {name} (message {i}) is not in the text that the chat template "
                "renders; the template rewrites it, so its tokens cannot be told apart"
            )
    return spans


def _turn(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], i: int, text: str, spans: Spans
) -> Turn:
    """The turn of message `i`: its header before the content, its end after it."""
    start, stop = spans[i]
    header = _prefix(tokenizer, messages[:i], text)
    if header is None or header > start:
        opener = _opener(tokenizer, messages[: i or 1])
        header = start - len(opener) if text[:start].endswith(opener) else start
    end = _prefix(tokenizer, messages[: i + 1], text)
    if end is None or end < stop:
        end = min((spans[j][0] for j in spans if j > i), default=len(text))
    return Turn(header, start, stop, end)


def _opener(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """What the template puts after messages to have them answered."""
    try:
        closed, opened = (_applied(tokenizer, messages, opening) for opening in (False, True))
    except (TemplateError, ValueError):
        return ""
    return opened.removeprefix(closed) if opened.startswith(closed) else ""


def _prefix(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str, opening: bool = False
) -> int | None:
    """Length of the rendering of the first messages, where it is a prefix of the whole."""
    if not messages:
        return None
    try:
        part = _applied(tokenizer, messages, opening)
    except (TemplateError, ValueError):
        return None
    return len(part) if text.startswith(part) else None


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    name: str,
    generation_prompt: bool,
) -> str:
    try:
        text = _applied(tokenizer, messages, generation_prompt)
    except (TemplateError, ValueError) as error:
        model = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
        if messages[0]["role"] == "system":
            raise ValueError(
                f"the chat template of {model} refuses {name}: {error}. It may have no system "
                "role: put the system message into the user message"
            ) from error
        raise ValueError(f"the chat template of {model} refuses {name}: {error}") from error
    return text


def _applied(tokenizer: PreTrainedTokenizerBase, messages: list[Message], opening: bool) -> str:
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=opening))
