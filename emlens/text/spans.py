"""Where each assistant message lies in the text that a chat template renders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

from emlens.text.conversation import Conversation, Message, counts
from emlens.text.template import REFUSALS, Template
from emlens.text.thinking import leading, thoughts

Shown = Callable[[list[Message]], str]
"""How messages are rendered: closed, with an answer opened, or within a begun one."""

_RARE = ("developer", "tool")
"""Roles that a template may pass over without a word."""

# which call an answer of a tool belongs to is said by its place as well
_NO_NEED = frozenset({"role", "content", "weight", "train", "tool_call_id"})

Spans = dict[int, tuple[int, int]]
"""Where the content of each message starts and ends, by the place of the message."""


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn, in characters of the rendered text.

    Attributes:
        header: Where its header starts.
        content: Where its content starts, thinking before it left out.
        content_end: Where its content ends.
        end: Where the turn ends, end-of-turn marker and what follows it included.
        thinking: Where each thinking part starts and ends, its tags included.
        counts: Whether the message counts as a response.
    """

    header: int
    content: int
    content_end: int
    end: int
    thinking: tuple[tuple[int, int], ...] = ()
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered conversation and its assistant turns."""

    text: str
    turns: tuple[Turn, ...]


def render(
    template: Template,
    conversation: Conversation,
    name: str,
    *,
    generation_prompt: bool = False,
    continue_final_message: bool = False,
    thinking: bool = True,
) -> Rendering:
    """Render a conversation and find its assistant turns.

    Contents are found by rendering the conversation a second time with a marker in the place of
    each: what stands between the markers is the template's own text, and the contents are what
    lies between it in the real rendering. Where a template reacts to the content itself, so that
    the two renderings differ, contents are searched for as text, in order.

    Args:
        template: The template.
        conversation: The conversation.
        name: What errors call it.
        generation_prompt: Open an answer at the end.
        continue_final_message: Stop within an answer that it ends with, instead of refusing it.
        thinking: Without it, what is opened is past the thinking.

    Raises:
        ValueError: If the template refuses the conversation or drops what a message has beside
            role and content, a response is empty or is not in the rendered text, or a
            conversation to be answered ends with an answer.
    """
    messages = list(conversation.messages)
    begun = messages[-1]["role"] == "assistant"
    if generation_prompt and begun and not continue_final_message:
        raise ValueError(
            f"{name} already ends with an answer, which a generation prompt cannot follow; "
            "generate from its .prompt, or pass continue_final_message=True to continue it"
        )
    shown = template.apply
    if generation_prompt:
        shown = (
            partial(template.apply, continued=True)
            if begun
            else partial(template.opened, thinking=thinking)
        )
    text = _rendered(shown, template, messages, name)
    _check_used(template, messages, name)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers:
        if not messages[i]["content"].strip() and not messages[i].get("tool_calls"):
            raise ValueError(f"{name} has an empty response (message {i}); leave it out")
    if not answers:
        return Rendering(text, ())
    spans = _aligned(shown, messages, text)
    if spans is None:
        spans = _searched(template, messages, text, name)
    closed = not generation_prompt
    turns = tuple(_turn(template, messages, i, text, spans, closed) for i in answers)
    return Rendering(text, turns)


def _aligned(shown: Shown, messages: list[Message], text: str) -> Spans | None:
    """Where contents lie, by a rendering of markers; None where it does not fit the real one."""
    # The others stay as they are: some templates move the system message, merge it into another,
    # or write what a tool gave as JSON.
    said = [i for i, message in enumerate(messages) if message["role"] in ("user", "assistant")]
    marks = {i: f"\ue000{i}\ue001" for i in said}
    # So does thinking before an answer: some templates write it in their own way, or drop it.
    heads = {i: leading(messages[i]) for i in marks}
    marked = [
        cast(Message, {**m, "content": heads[i] + marks[i] if i in marks else m["content"]})
        for i, m in enumerate(messages)
    ]
    try:
        rest = shown(marked)
    except REFUSALS:
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
        content = messages[i]["content"].removeprefix(heads[i])
        for written in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(written + following, position):
                break
        else:
            return None
        start = position + len(written) - len(written.lstrip())
        spans[i] = (start, max(start, position + len(written.rstrip())))
        position += len(written) + len(following)
    return spans if position == len(text) else None


def _searched(template: Template, messages: list[Message], text: str, name: str) -> Spans:
    """Where contents lie, each searched for after the one before it."""
    spans, done = {}, 0
    for i, message in enumerate(messages):
        if message["role"] not in ("user", "assistant"):
            continue
        head, opened = leading(message), done
        content = message["content"].removeprefix(head).strip()
        if message["role"] == "assistant":
            opened = max(done, _prefix(template, messages[:i], text, opening=True) or 0)
        thought = text.find(head.strip(), opened)
        start = text.find(content, opened if thought < 0 else thought + len(head.strip()))
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
    template: Template, messages: list[Message], i: int, text: str, spans: Spans, closed: bool
) -> Turn:
    """The turn of message `i`: its header before the content, its end after it.

    `closed` says that the text is the whole of the messages, and nothing is opened after them.
    """
    start, stop = spans[i]
    header = _prefix(template, messages[:i], text)
    if header is None or header > start:
        opener = _opener(template, messages[: i or 1])
        header = start - len(opener) if text[:start].endswith(opener) else start
    whole = i == len(messages) - 1 and closed
    end = len(text) if whole else _prefix(template, messages[: i + 1], text)
    if end is None or end < stop:
        end = min((spans[j][0] for j in spans if j > i), default=len(text))
    if messages[i].get("tool_calls"):
        # calls follow the content, up to what ends a turn
        _, after = template.around()
        stop = end - len(after) if after and text[:end].endswith(after) else end
    before = max((spans[j][1] for j in spans if j < i), default=0)
    thinking = tuple(thoughts(messages[i], text, before, start, stop))
    header = min([header, *(a for a, _ in thinking)])
    return Turn(header, start, stop, end, thinking, counts(messages[i]))


def _opener(template: Template, messages: list[Message]) -> str:
    """What the template puts after messages to have them answered."""
    try:
        closed, opened = template.apply(messages), template.apply(messages, opening=True)
    except REFUSALS:
        return ""
    return opened.removeprefix(closed) if opened.startswith(closed) else ""


def _prefix(
    template: Template, messages: list[Message], text: str, opening: bool = False
) -> int | None:
    """Length of the rendering of the first messages, where it is a prefix of the whole."""
    if not messages:
        return None
    try:
        part = template.apply(messages, opening=opening)
    except REFUSALS:
        return None
    return len(part) if text.startswith(part) else None


def _check_used(template: Template, messages: list[Message], name: str) -> None:
    """Refuse what a message has beside role and content if the template does not use it.

    So are the roles that not every template renders.
    """
    for i, message in enumerate(messages):
        if message["role"] in _RARE and not _renders(template, messages, i):
            raise ValueError(
                f"the chat template of {template.name} does not render message {i} of {name}, of "
                f"the role {message['role']!r}; leave it out, or use a model whose template does"
            )
        for key in sorted(set(message) - _NO_NEED):
            if template.apply(messages) != _without(template, messages, i, key):
                continue
            # some templates show the thinking of the last answer alone
            upto = messages[: i + 1]
            if template.apply(upto) == _without(template, upto, i, key):
                raise ValueError(
                    f"message {i} of {name} has {key!r}, which the chat template of "
                    f"{template.name} does not use; leave it out, or use a model whose template "
                    "does"
                )


def _renders(template: Template, messages: list[Message], i: int) -> bool:
    """Whether the rendering follows what a message says."""
    other = cast(Message, {**messages[i], "content": f"{messages[i]['content']}\ue005"})
    try:
        return template.apply([*messages[:i], other, *messages[i + 1 :]]) != template.apply(
            messages
        )
    except REFUSALS:
        return False


def _without(template: Template, messages: list[Message], i: int, key: str) -> str | None:
    kept: Mapping = {k: v for k, v in messages[i].items() if k != key}
    try:
        return template.apply([*messages[:i], cast(Message, kept), *messages[i + 1 :]])
    except REFUSALS:
        return None


def _rendered(shown: Shown, template: Template, messages: list[Message], name: str) -> str:
    try:
        return shown(messages)
    except REFUSALS as error:
        if messages[0]["role"] == "system":
            raise ValueError(
                f"the chat template of {template.name} refuses {name}: {error}. It may have no "
                "system role: put the system message into the user message"
            ) from error
        raise ValueError(f"the chat template of {template.name} refuses {name}: {error}") from error
