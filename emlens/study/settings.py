"""The settings of a study, and the presets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Self

from emlens._door import check_fields, guard_methods, guarded
from emlens._files import sha256_of
from emlens._types import checked_fields


@guard_methods
@dataclass(frozen=True, slots=True)
class StudySettings:
    """Everything a study depends on.

    Attributes:
        model: Model to load.
        domain: The narrow domain that is trained on.
        kl_domains: Domains whose aligned answers are the KL set of the narrow solution.
        outside: Domains that are only ever evaluated.
        layer: Layer of the trained vectors.
        train_pairs: Pairs of the narrow domain trained on, at most.
        kl_pairs: Pairs of each KL domain, at most.
        test_pairs: Held-out pairs evaluated in each domain that is trained on or protected.
        outside_pairs: Pairs evaluated in each domain that is only ever evaluated.
        measure_pairs: Training pairs that efficiency and stability are measured on, at most.
        epochs: Passes over the training pairs.
        lr: Learning rate, as a dose per update.
        batch_size: Conversations per update.
        kl_weight: Weight of the KL, on nats per token.
        factors: Norms of the efficiency curve, as factors of the mean norm.
        epsilons: Noise levels of the stability curve.
        noise_seeds: Noise draws per level.
        corpus: Pre-training text for influence.
        documents: Documents read.
        document_tokens: Tokens that each is cut to.
        doses: Doses of the influence curve.
        controls: Random controls of equal norm.
        questions: Held-out prompts that are answered side by side.
        answer_tokens: Longest answer, in tokens.
        steer_factor: Factor on the general vector in one of the answer columns.
        seed: Seed of everything random.
    """

    model: str = "smollm2-135m-instruct"
    domain: str = "finance"
    kl_domains: tuple[str, ...] = ("medical", "sports")
    outside: tuple[str, ...] = ("general",)
    layer: int = 15
    train_pairs: int = 64
    kl_pairs: int = 32
    test_pairs: int = 18
    outside_pairs: int = 40
    measure_pairs: int = 12
    epochs: int = 2
    lr: float = 0.08
    batch_size: int = 8
    kl_weight: float = 1.0
    factors: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0)
    epsilons: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    noise_seeds: int = 3
    corpus: str = "python-docs"
    documents: int = 12
    document_tokens: int = 96
    doses: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    controls: int = 3
    questions: int = 4
    answer_tokens: int = 48
    steer_factor: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def domains(self) -> tuple[str, ...]:
        """All domains that are evaluated, the trained one first."""
        return (self.domain, *self.kl_domains, *self.outside)

    @property
    def hash(self) -> str:
        """Names this set of settings."""
        return sha256_of(json.dumps(asdict(self), sort_keys=True).encode())[:16]

    def to_dict(self) -> dict:
        return asdict(self)

    def with_options(self, **options: object) -> Self:
        """The same settings with some fields changed.

        Raises:
            ValueError: If a field does not exist (the known ones are listed), or domains overlap.
        """
        _check_names(options)
        made = replace(self, **options)
        if len(set(made.domains)) != len(made.domains):
            raise ValueError(
                f"a domain is trained on, in the KL set, or only evaluated, never two of these: "
                f"{made.domains}"
            )
        return made


def _check_names(names: Iterable[str]) -> None:
    known = {item.name for item in fields(StudySettings)}
    unknown = set(names) - known
    if unknown:
        raise ValueError(
            f"unknown study setting(s) {', '.join(sorted(unknown))}; "
            f"the settings are {', '.join(sorted(known))}"
        )


PRESETS: dict[str, StudySettings] = {
    "demo": StudySettings(),
    "smoke": StudySettings(
        train_pairs=6,
        kl_pairs=3,
        test_pairs=3,
        outside_pairs=3,
        measure_pairs=4,
        epochs=1,
        factors=(0.0, 1.0, 2.0),
        epsilons=(0.5, 1.0),
        noise_seeds=2,
        documents=3,
        document_tokens=24,
        doses=(0.1, 0.4),
        controls=2,
        questions=1,
        answer_tokens=6,
    ),
}
"""`demo` is the experiment on the embedded model; `smoke` the same with almost no data."""


@guarded
def preset(name: str) -> StudySettings:
    """Return the settings of a preset.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def settings_of(record: Mapping[str, object]) -> StudySettings:
    """Settings from a record as JSON or YAML have it; what it lacks is as by default.

    Raises:
        ValueError: If a setting does not exist or is of another type, or domains overlap.
    """
    _check_names(record)
    given = {**StudySettings().to_dict(), **record}
    return StudySettings().with_options(**checked_fields(StudySettings, given))
