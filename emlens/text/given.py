"""What users may give for conversations, pairs and text: one reader of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from emlens._arguments import is_list, shown, texts
from emlens._kinds import check_of, kind, made_with, some
from emlens.text.batches import TokenBatch
from emlens.text.conversation import Conversation, Pair
from emlens.text.corpus import Corpus, of_texts

_CONVERSATION = (
    "give emlens.Conversation objects, lists of {'role': ..., 'content': ...}, or the user's words"
)


def conversations_of(given: Any, name: str = "conversations") -> list[Conversation]:
    """Return the conversations that were meant.

    A string is a user's message, a list of messages is one conversation; a generator is read once.

    Args:
        given: Conversations, or one of them.
        name: What errors call them.

    Raises:
        TypeError: If something is not a conversation; its place is named.
        ValueError: If there are none, or a message is not as it must be.
    """
    if isinstance(given, Mapping) and "role" in given:
        given = [[given]]
    if isinstance(given, (str, Conversation)) or _is_messages(given):
        given = [given]
    if not is_list(given):
        raise TypeError(f"{name} must be conversations, not {shown(given)}; {_CONVERSATION}")
    found = [_conversation(item, f"{name}[{i}]") for i, item in enumerate(given)]
    if not found:
        raise ValueError(f"{name} is empty; give at least one conversation")
    return found


def _conversation(item: Any, place: str) -> Conversation:
    if isinstance(item, Conversation):
        return item
    try:
        if isinstance(item, str):
            return Conversation.of(item)
        if isinstance(item, (list, tuple)):
            return Conversation(tuple(item))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{place}: {error}") from None
    if isinstance(item, Pair):
        raise TypeError(
            f"{place} is a Pair, which has two sides; take one of them, e.g. "
            "pair.conversation('aligned')"
        )
    raise TypeError(f"{place} must be a conversation, not {shown(item)}; {_CONVERSATION}")


def _is_messages(given: Any) -> bool:
    """Whether a list is the messages of one conversation."""
    return isinstance(given, (list, tuple)) and bool(given) and isinstance(given[0], Mapping)


def _named(reader: Any, name: str, value: Any) -> Any:
    return reader(value, name)


@kind(Corpus | Sequence[Conversation], words="a corpus or conversations")
def _text(name: str, value: Any) -> Any:
    return value if isinstance(value, Corpus) else conversations_of(value, name)


kind(Sequence[Conversation], words="conversations")(partial(_named, conversations_of))
made_with(Pair, "make one with emlens.Pair(...), or read them with emlens.load_pairs")
kind(Sequence[Pair], words="pairs")(partial(some, Pair))
made_with(Corpus, "make one with emlens.corpus(...)")
_corpus = check_of(Corpus)


@kind(Corpus)
def _corpus_of(name: str, value: Any) -> Any:
    """A corpus, or a list of texts."""
    if is_list(value) and not isinstance(value, Corpus):
        return of_texts(texts(name, value))
    return _corpus and _corpus(name, value)


made_with(TokenBatch, "make them with model.batches(...)")
