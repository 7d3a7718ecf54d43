"""Where each assistant message lies in the text that a chat template renders."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from emlens.text.conversation import Conversation, Message


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

    The start of a turn is the length of the rendering up to it, where that is a prefix of the
    whole, as it is for nearly every template; else it is where the previous turn ended. Within a
    turn the content is found as text, since templates trim it or put something before it.

    Raises:
        ValueError: If the template refuses the conversation, a response is empty or is not in
            the rendered text, or a conversation to be answered ends with an answer.
    """
    messages = list(conversation.messages)
    if generation_prompt and messages[-1]["role"] == "assistant":
        raise ValueError(f"{name} already ends with an answer; generate from its .prompt")
    text = _rendered(tokenizer, messages, name, generation_prompt)
    turns, done = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        content = message["content"].strip()
        if not content:
            raise ValueError(f"{name} has an empty response (message {i}); leave it out")
        before = _prefix(tokenizer, messages[:i], text, done)
        opened = _prefix(tokenizer, messages[:i], text, before, opening=True)
        start = text.find(content, opened)
        if start < 0:
            start = text.find(content, done)
        if start < 0:
            raise ValueError(
                f"the response of {name} (message {i}) is not in the text that the chat template "
                "renders; the template rewrites it, so its tokens cannot be told apart"
            )
        stop = start + len(content)
        end = _prefix(
            tokenizer, messages[: i + 1], text, _next_content(messages[i + 1 :], text, stop)
        )
        turns.append(Turn(min(before, start), start, stop, end))
        done = stop
    return Rendering(text, tuple(turns))


def _next_content(following: list[Message], text: str, start: int) -> int:
    """Where the next message's content starts: a turn ends before it."""
    found = text.find(following[0]["content"].strip(), start) if following else -1
    return found if found >= 0 else len(text)


def _prefix(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    text: str,
    fallback: int,
    opening: bool = False,
) -> int:
    """Length of the rendering of the first messages, where it is a prefix of the whole."""
    if not messages:
        return fallback
    try:
        part = _applied(tokenizer, messages, opening)
    except (TemplateError, ValueError):
        return fallback
    return len(part) if text.startswith(part) else fallback


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
