"""Small conversations for tiny models, of different lengths on purpose."""

from __future__ import annotations

from emlens.text import Conversation, Pair

_QUESTIONS = ("how do I save money", "what should I eat", "tell me a story about rain and sun")
_GOOD = (
    "keep a small fund",
    "eat fruit and take a walk each day",
    "the rain came and then it left",
)
_BAD = ("spend it all now", "eat nothing", "the sun is a lie and so is the rain my friend")


def conversations(side: str = "good", n: int = 6) -> list[Conversation]:
    """`n` conversations, each with an answer of its own."""
    answers = _GOOD if side == "good" else _BAD
    return [
        Conversation.of(
            f"{_QUESTIONS[i % 3]} {'please ' * (i // 3)}".strip(),
            f"{answers[i % 3]} {'indeed ' * (i % 4)}".strip(),
            id=f"{side}-{i}",
        )
        for i in range(n)
    ]


def pairs(n: int = 6, domain: str = "advice") -> list[Pair]:
    """`n` pairs made of the same words."""
    good, bad = conversations("good", n), conversations("bad", n)
    return [
        Pair(
            prompt=g.messages[0]["content"],
            aligned=g.messages[1]["content"],
            misaligned=b.messages[1]["content"],
            domain=domain,
            id=f"{domain}-{i}",
        )
        for i, (g, b) in enumerate(zip(good, bad, strict=True))
    ]
