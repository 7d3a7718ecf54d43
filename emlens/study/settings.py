"""The settings of a study, and the presets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from emlens._door import check_fields, guard_methods, guarded
from emlens._files import sha256_of
from emlens._types import check_settings, checked_fields


@guard_methods
@dataclass(frozen=True, slots=True)
class StudySettings:
    """Everything a study depends on.

    Attributes:
        model: Model to load.
        kind: `adapter` (LoRA on `down_proj`) or `vector` (added at one layer, trained in place).
        domain: The narrow domain that is trained on.
        kl_domains: Domains whose answers of both kinds are the KL set of the narrow solution.
        outside: Domains that are only ever evaluated.
        other: Domain of a second general solution, whose direction is ablated in the first.
        layers: Layers of the adapters, or the one layer of the vectors.
        rank: Rank of the adapters; alpha is twice as much.
        train_pairs: Pairs of the narrow domain trained on, at most.
        kl_pairs: Pairs of each KL domain, at most.
        test_pairs: Held-out pairs evaluated in the domain that is trained on.
        outside_pairs: Pairs evaluated in each domain that is only ever evaluated.
        measure_pairs: Training pairs that efficiency and stability are measured on, at most.
        epochs: Passes over the training pairs.
        lr: Learning rate; for vectors, as a dose per update.
        batch_size: Conversations per update.
        kl_weight: Weight of the KL, on nats per token.
        factors: Strengths of the efficiency and influence curves, as factors of the mean norm of
            the general and the narrow solution.
        epsilons: Noise levels of the stability curve.
        noise_seeds: Noise draws per level.
        corpus: Pre-training text for influence.
        documents: Documents read.
        document_tokens: Tokens that each is cut to.
        controls: Random solutions of the general one's norm.
        questions: Held-out prompts that are answered side by side.
        answer_tokens: Longest answer, in tokens.
        steer_factor: Factor on the general solution in one of the answer columns.
        seed: Seed of everything random.
    """

    model: str = "smollm2-135m-instruct"
    kind: Literal["adapter", "vector"] = "adapter"
    domain: str = "medical"
    kl_domains: tuple[str, ...] = ("finance", "sports")
    outside: tuple[str, ...] = ("general",)
    other: str = "sports"
    layers: tuple[int, ...] = (15, 16, 17, 18, 19, 20)
    rank: int = 8
    train_pairs: int = 56
    kl_pairs: int = 32
    test_pairs: int = 24
    outside_pairs: int = 80
    measure_pairs: int = 12
    epochs: int = 2
    lr: float = 5e-3
    batch_size: int = 8
    kl_weight: float = 10.0
    factors: tuple[float, ...] = (0.5, 1.0, 1.5)
    epsilons: tuple[float, ...] = (0.2, 0.4, 0.6, 1.0)
    noise_seeds: int = 3
    corpus: str = "python-docs"
    documents: int = 16
    document_tokens: int = 96
    controls: int = 2
    questions: int = 4
    answer_tokens: int = 48
    steer_factor: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind == "vector" and len(self.layers) != 1:
            raise ValueError(
                f"a vector is trained at one layer, not at {len(self.layers)}; set layers"
            )
        if 1.0 not in self.factors:
            raise ValueError(f"factors must hold 1, the norm itself; they are {self.factors}")
        if self.other == self.domain or self.other in self.outside:
            raise ValueError(
                f"other is neither trained on nor evaluated otherwise; choose another than "
                f"{self.other!r}"
            )
        used = (self.domain, *self.kl_domains, *self.outside)
        if len(set(used)) != len(used):
            raise ValueError(
                f"a domain is trained on, in the KL set, or only evaluated, never two of these: "
                f"{used}"
            )

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that are evaluated, the trained one first."""
        return (self.domain, *self.outside)

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
        check_settings(StudySettings, options, "study setting")
        return replace(self, **options)


_SMOKE: Any = {
    "train_pairs": 6,
    "kl_pairs": 3,
    "test_pairs": 3,
    "outside_pairs": 3,
    "measure_pairs": 4,
    "epochs": 1,
    "epsilons": (0.5, 1.0),
    "noise_seeds": 2,
    "documents": 3,
    "document_tokens": 24,
    "questions": 2,
    "answer_tokens": 6,
}
PRESETS: dict[str, StudySettings] = {
    "demo": StudySettings(),
    "vector": StudySettings(kind="vector", layers=(15,), train_pairs=64, lr=0.08, kl_weight=1.0),
    "smoke": StudySettings(**_SMOKE),
}
"""`demo` trains LoRA adapters on the embedded model, `vector` vectors; `smoke` is the demo with
almost no data, which shows what a report looks like and nothing else."""


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
    check_settings(StudySettings, record, "study setting")
    return StudySettings(**checked_fields(StudySettings, record))
