"""The thinking parts of answers: `<think>...</think>`, and `reasoning_content`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from emlens._arguments import shown
from emlens.text.conversation import Message

OPEN, CLOSE = "<think>", "</think>"
"""What thinking stands between."""

# an answer to a prompt that has opened the thinking begins within it
_LEADING = re.compile(rf"\s*(?:(?!{OPEN}).)*?{CLOSE}\s*|\s*{OPEN}.*?{CLOSE}\s*", re.DOTALL)
_PART = re.compile(rf"{OPEN}(.*?)(?:{CLOSE}\s*|\Z)", re.DOTALL)


def without_thinking(text: str) -> str:
    """An answer without its thinking parts; thinking that has no end leaves nothing after it.

    Raises:
        TypeError: If it is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be text, not {shown(text)}")
    found = _LEADING.match(text)
    return _PART.sub("", text[found.end() :] if found else text)


def parted(text: str) -> tuple[str, str]:
    """What an answer thinks first, without the tags, and the answer itself.

    Thinking without an end is the whole answer.
    """
    found = _LEADING.match(text)
    if found is None and not text.lstrip().startswith(OPEN):
        return "", text
    head = found.group() if found else text
    thought = head.strip().removeprefix(OPEN).removesuffix(CLOSE)
    return thought.strip(), text[len(head) :]


def leading(message: Message) -> str:
    """The thinking that an answer's content begins with, tags and what blank follows included."""
    found = _LEADING.match(message["content"]) if message["role"] == "assistant" else None
    return found.group() if found else ""


def thoughts(
    message: Message, text: str, before: int, start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """Where the thinking of an answer lies in the rendered text.

    Empty parts that a template adds by itself are no thinking.

    Args:
        message: The answer.
        text: The rendered text.
        before: Where the content of the message before it ends.
        start: Where its content starts, leading thinking left out.
        stop: Where its content ends.
    """
    head = leading(message)
    reasoning = str(message.get("reasoning_content", "")).strip()
    if head and text.endswith(head, before, start):
        yield start - len(head), start
    else:
        parts = [part for part in _PART.finditer(text, before, start) if part[1].strip()]
        yield from (part.span() for part in parts)
        place = text.find(reasoning, before, start) if reasoning and not parts else -1
        if place >= 0:
            yield place, place + len(reasoning)
    yield from (part.span() for part in _PART.finditer(text, start, stop))
