"""Options that the trainings share, each explained once.

Those that say how something is trained have their defaults in `TrainSettings` and its kinds, those
that say what is kept in `Recording`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from emlens._arguments import COUNT
from emlens._door import check_fields
from emlens._reading import expanded
from emlens.hooked.edit import Where
from emlens.hooked.sites import SiteName
from emlens.text import Conversation, TokenMask
from emlens.training.prefix import LOG_PROB_BUDGET, PREFIX_BUDGET
from emlens.training.settings import (
    AdapterSettings,
    Penalty,
    Schedule,
    TrainSettings,
    VectorSettings,
)

Chosen = TypeVar("Chosen", bound=TrainSettings)


class RunOptions(TypedDict, total=False):
    """What is kept of a training run, and what it may take.

    Attributes:
        checkpoint: A file; an interrupted run resumes from it, with the same result.
        checkpoint_every: Updates between two checkpoints; 20 by default.
        prefix_budget: Bytes for prefixes, 1 GiB by default; what does not fit is recomputed.
        log_prob_budget: Bytes for base log-probabilities; likewise.
        progress: Show a progress bar with loss, KL and norm; on by default.
    """

    checkpoint: str | Path | None
    checkpoint_every: int
    prefix_budget: int
    log_prob_budget: int
    progress: bool


class TrainOptions(RunOptions, total=False):
    """How anything is trained: the fields of `TrainSettings`; besides, `RunOptions`.

    What is given here goes before what `settings` say.
    """

    epochs: int
    lr: float
    batch_size: int
    accumulate: int
    warmup: int
    warmup_from_zero: bool
    schedule: Schedule
    weight_decay: float
    clip: float | None
    patience: int | None
    seed: int
    tokens: TokenMask
    gradient_checkpointing: bool


class PathOptions(TrainOptions, total=False):
    """The path of what is trained; besides, `TrainOptions`.

    Attributes:
        record_every: Updates between two records of the path, 1 by default for vectors; None, the
            default for adapters, for start and end only.
        record_gradients: Record gradients, too.
    """

    record_every: int | None
    record_gradients: bool


class VectorOptions(PathOptions, total=False):
    """How vectors are trained: the fields of `VectorSettings`; besides, `PathOptions`."""

    alpha: float | None


class AdapterOptions(PathOptions, total=False):
    """How a LoRA adapter is trained: the fields of `AdapterSettings`; besides, `PathOptions`."""

    rank: int
    alpha: float
    rslora: bool
    modules: Sequence[str]
    layers: Sequence[int] | None


class WeightOptions(TrainOptions, total=False):
    """How weights are trained: the fields of `WeightSettings`; besides, `TrainOptions`."""

    layers: Sequence[int] | None


class SolutionOptions(AdapterOptions, total=False):
    """What `train_vector` or `train_adapter` takes, whichever trains; see there."""

    settings: VectorSettings | AdapterSettings | None
    penalties: Sequence[Penalty]
    validation: Sequence[Conversation]
    site: SiteName
    where: Where


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Defaults of `RunOptions` and of the path's."""

    record_every: int | None = 1
    record_gradients: bool = False
    checkpoint: Path | None = None
    checkpoint_every: int = 20
    prefix_budget: int = PREFIX_BUDGET
    log_prob_budget: int = LOG_PROB_BUDGET
    progress: bool = True

    def __post_init__(self) -> None:
        check_fields(self, record_every=COUNT)
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", expanded(self.checkpoint))


def chosen_of(
    kind: type[Chosen], settings: Chosen | None, options: Mapping[str, Any], watched: bool
) -> tuple[Chosen, Recording]:
    """How to train, and what to keep, from `settings` and the options that go before them.

    Args:
        kind: `VectorSettings`, `AdapterSettings` or `WeightSettings`.
        settings: What to start from.
        options: All options that were given.
        watched: Whether there are conversations to validate on.

    Raises:
        ValueError: If an option has no valid value, or `patience` has nothing to watch.
    """
    kept = {item.name for item in fields(Recording)}
    own = {name: value for name, value in options.items() if name not in kept}
    rest = {name: value for name, value in options.items() if name in kept}
    chosen = replace(settings or kind(), **own)
    if chosen.patience is not None and not watched:
        raise ValueError("patience watches the validation loss; give validation= conversations")
    return chosen, Recording(**rest)
