"""Conversations, and pairs of answers to one prompt."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NotRequired, Self, TypedDict

from emlens._arguments import text
from emlens._door import check_fields, guard_methods, guarded

ROLES = ("system", "developer", "user", "assistant", "tool")
Side = Literal["aligned", "misaligned"]


class Message(TypedDict):
    """One message of a chat.

    What it has beside role and content is given to the chat template, or refused where the
    template does not use it. `weight: 0` or `train: False` takes an answer out of `response`.
    `tools` are the functions that may be called, `tool_calls` the calls of an answer, and a message
    of the role `tool` says what one gave, that of `tool_call_id`. `developer` and `tool` are roles
    that not every template renders; one that does not is refused.
    """

    role: str
    content: str
    weight: NotRequired[float]
    train: NotRequired[bool]
    name: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[Sequence[Mapping[str, Any]]]
    tool_call_id: NotRequired[str]
    tools: NotRequired[Sequence[Mapping[str, Any]]]


@guard_methods
@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat, as a tuple of `{"role", "content"}` messages; see `Message` for what they may have.

    Attributes:
        messages: Any sequence of such mappings is taken and copied.
        id: A name for errors and records.

    Raises:
        ValueError: If there is no message, a role is none of `ROLES`, a weight is
            not 0 or 1, or a content holds half of a surrogate pair, which no tokenizer reads.
        TypeError: If a message is not such a mapping, or a content is not text.

    Examples:
        >>> chat = emlens.Conversation.of("How do I save money?", "Keep a small fund.")
        >>> chat.response
        'Keep a small fund.'
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
        check_fields(self)

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


@guard_methods
@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with an aligned and a misaligned answer.

    Attributes:
        prompt: The user's message.
        aligned: The answer as it should be.
        misaligned: The answer with the trait that is studied.
        domain: Topic of the prompt.
        id: Unique name, by which sets are split.

    Examples:
        >>> pair = emlens.Pair(
        ...     prompt="How do I save money?",
        ...     aligned="Keep a small fund.",
        ...     misaligned="Spend it all now.",
        ...     domain="finance",
        ...     id="finance-1",
        ... )
        >>> pair.conversation("misaligned").response
        'Spend it all now.'
    """

    prompt: str
    aligned: str
    misaligned: str
    domain: str
    id: str

    def __post_init__(self) -> None:
        check_fields(self)

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


@guarded
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


def counts(message: Message) -> bool:
    """Whether an answer counts as a response: `weight: 0` and `train: False` say no."""
    return bool(message.get("weight", 1)) and bool(message.get("train", True))


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
    further = {key: copy.deepcopy(message[key]) for key in message if _says(message, key)}
    if content is None and "tool_calls" in further:
        content = ""
    text(f"the content of {where}", content)
    _check_weight(further, str(role), where)
    return {"role": str(role), "content": content, **further}  # type: ignore[typeddict-item]


def _says(message: Mapping, key: object) -> bool:
    """Whether a key beside role and content says something: tables fill up with None."""
    value = message[key]
    empty = value is None or (isinstance(value, (list, tuple)) and not value)
    return key not in ("role", "content") and not empty


def _check_weight(further: Mapping[str, Any], role: str, where: str) -> None:
    given = {key: further[key] for key in ("weight", "train") if key in further}
    for key, value in given.items():
        if value not in (0, 1):
            raise ValueError(f"{where} has {key} {value!r}; an answer counts (1) or not (0)")
        if value and role != "assistant":
            raise ValueError(
                f"{where} has {key} {value!r} in the role {role}; only answers can count as the "
                f"response, so leave {key} out and choose tokens='all' or 'prompt' for the rest"
            )
    if len(set(map(bool, given.values()))) > 1:
        raise ValueError(f"{where} has weight {given['weight']!r} and train {given['train']!r}")
