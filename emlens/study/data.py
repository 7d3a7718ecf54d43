"""Which pairs a study trains on, protects, and evaluates."""

from __future__ import annotations

from dataclasses import dataclass

from emlens.study.settings import StudySettings
from emlens.text import Conversation, Pair, load_pairs, split_pairs


@dataclass(frozen=True, slots=True)
class StudyData:
    """The pairs of a study, split by id before anything else.

    Attributes:
        train: Training pairs of the narrow domain.
        kl: Pairs of the KL domains.
        other: Training pairs of the second general solution, of which the KL set may have some.
        test: Held-out pairs of the domain and pairs outside, none of which any other part has.
    """

    train: tuple[Pair, ...]
    kl: tuple[Pair, ...]
    other: tuple[Pair, ...]
    test: tuple[Pair, ...]

    @classmethod
    def of(cls, settings: StudySettings) -> StudyData:
        """Split the embedded sets with the study's seed."""
        named = (settings.domain, *settings.kl_domains, *settings.outside, settings.other)
        splits = {name: split_pairs(load_pairs(name), seed=settings.seed) for name in named}
        held_out = list(splits[settings.domain].test[: settings.test_pairs])
        for domain in settings.outside:
            # nothing of it is ever trained on, so only the validation pairs are set aside
            never_seen = (*splits[domain].test, *splits[domain].train)
            held_out += never_seen[: settings.outside_pairs]
        return cls(
            train=tuple(splits[settings.domain].train[: settings.train_pairs]),
            kl=tuple(
                pair
                for domain in settings.kl_domains
                for pair in splits[domain].train[: settings.kl_pairs]
            ),
            other=tuple(splits[settings.other].train[: settings.train_pairs]),
            test=tuple(held_out),
        )

    def misaligned(self, limit: int | None = None) -> list[Conversation]:
        """Training conversations with the misaligned answers."""
        return [pair.conversation("misaligned") for pair in self.train[:limit]]

    def aligned(self, limit: int | None = None) -> list[Conversation]:
        """The same prompts with the aligned answers."""
        return [pair.conversation("aligned") for pair in self.train[:limit]]

    def kl_text(self) -> list[Conversation]:
        """Answers of both kinds in the KL domains."""
        return [pair.conversation(side) for pair in self.kl for side in ("aligned", "misaligned")]

    def elsewhere(self) -> list[Conversation]:
        """Misaligned answers of the second general solution's domain."""
        return [pair.conversation("misaligned") for pair in self.other]

    def questions(self, settings: StudySettings) -> list[tuple[str, str]]:
        """Held-out prompts to answer, `(domain, prompt)`: half in the domain, half outside."""

        def prompts(domain: str, n: int) -> list[tuple[str, str]]:
            return [(p.domain, p.prompt) for p in self.test if p.domain == domain][:n]

        outside = settings.questions // 2
        inside = settings.questions - outside
        return prompts(settings.domain, inside) + prompts(settings.outside[0], outside)

    def record(self) -> dict:
        """Ids of every part, for the record."""
        return {
            part: [pair.id for pair in getattr(self, part)]
            for part in ("train", "kl", "other", "test")
        }
