"""Conversations, and pairs of answers to one prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Self, TypedDict

ROLES = ("system", "user", "assistant")
Side = Literal["aligned", "misaligned"]


class Message(TypedDict):
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat, as a tuple of `{"role", "content"}` messages.

    Attributes:
        messages: Any sequence of such mappings is taken and copied.
        id: A name for errors and records.

    Raises:
        ValueError: If there is no message, a role is not system, user or assistant, or a content
            holds half of a surrogate pair, which no tokenizer reads.
        TypeError: If a message is not such a mapping, or a content is not text.
    """

    messages: tuple[Message, ...]
    id: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.messages, (str, Mapping)):
            raise TypeError(
                f"messages must be a list of role and content, not {type(self.messages).__name__}; "
                "Conversation.of(prompt, response) makes one from text"
            )
        checked = tuple(_checked(m, i, self.id) for i, m in enumerate(self.messages))
        if not checked:
            raise ValueError(f"conversation {self.id or ''} has no messages".replace("  ", " "))
        object.__setattr__(self, "messages", checked)

    @classmethod
    def of(
        cls,
        prompt: str,
        response: str | None = None,
        *,
        system: str | None = None,
        id: str | None = None,
    ) -> Self:
        """One question, with its answer where there is one."""
        messages: list[Message] = []
        if system is not None:
            messages.append({"role": "system", "content": system})
        messages.append({"role": "user", "content": prompt})
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        return cls(tuple(messages), id)

    @property
    def prompt(self) -> Self:
        """The conversation without its trailing assistant messages."""
        kept = list(self.messages)
        while kept and kept[-1]["role"] == "assistant":
            kept.pop()
        return type(self)(tuple(kept), self.id)

    @property
    def response(self) -> str:
        """The last assistant message.

        Raises:
            ValueError: If there is none.
        """
        for message in reversed(self.messages):
            if message["role"] == "assistant":
                return message["content"]
        raise ValueError(f"conversation {self.id or ''} has no assistant message")


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with an aligned and a misaligned answer.

    Attributes:
        prompt: The user's message.
        aligned: The answer as it should be.
        misaligned: The answer with the trait that is studied.
        domain: Topic of the prompt.
        id: Unique name, by which sets are split.
    """

    prompt: str
    aligned: str
    misaligned: str
    domain: str
    id: str

    def conversation(self, side: Side, system: str | None = None) -> Conversation:
        """The prompt with one of its answers.

        Raises:
            ValueError: If `side` is neither `aligned` nor `misaligned`.
        """
        if side not in ("aligned", "misaligned"):
            raise ValueError(f"a pair has the sides aligned and misaligned, not {side!r}")
        return Conversation.of(
            self.prompt, getattr(self, side), system=system, id=f"{self.id}/{side}"
        )


def content_hash(items: Iterable[object]) -> str:
    """Hash conversations, pairs or documents, in their order; 16 hexadecimal digits.

    Only content counts: the same messages under another id have the same hash.
    """
    digest = hashlib.sha256()
    for item in items:
        record = asdict(item)  # type: ignore[call-overload]
        record.pop("id", None)
        digest.update(json.dumps(record, sort_keys=True, ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def names(conversations: Sequence[Conversation]) -> list[str]:
    """What each conversation is called in errors."""
    return [item.id or f"conversation {i}" for i, item in enumerate(conversations)]


def _checked(message: object, place: int, name: str | None) -> Message:
    where = f"message {place} of conversation {name or '(no id)'}"
    if not isinstance(message, Mapping) or set(message) < {"role", "content"}:
        raise TypeError(f"{where} must have role and content; got {message!r:.80}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where} has role {role!r}; the roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise TypeError(f"{where} has content of type {type(content).__name__}; it must be text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds half of a surrogate pair (character {error.start}), which no tokenizer "
            "reads; take it out"
        ) from None
    return {"role": str(role), "content": content}
