"""What is trained on, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Literal

from emlens._arguments import NOT_NEGATIVE, POSITIVE
from emlens._door import check_fields, guard_names, guarded
from emlens._kinds import made_with
from emlens.directions import Directions
from emlens.text import Conversation, Pair, TokenMask

Schedule = Literal["linear", "cosine", "constant"]


@guard_names
@dataclass(frozen=True, slots=True)
class KLPenalty:
    """A penalty on changing predictions elsewhere: `weight * KL(base || trained)`.

    Attributes:
        conversations: The KL set: texts of other domains than the one trained on.
        weight: Multiplies nats per token. `paper_kl_weight` converts the papers' weights.
        tokens: Tokens on which the KL counts; the papers take all of them.
        batch_size: Conversations of a forward pass, of which an update has `accumulate`; as
            many as of the training set by default.

    Raises:
        ValueError: If the set is empty, the weight is not above zero, or the batch is below 1.

    Examples:
        >>> penalty = emlens.KLPenalty(elsewhere, weight=3.0)
        >>> narrow, run = emlens.train_vector(model, conversations, layer=15, kl=penalty)
    """

    conversations: Sequence[Conversation]
    weight: float
    tokens: TokenMask = "response"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, weight=POSITIVE)


@guard_names
@dataclass(frozen=True, slots=True)
class NormPenalty:
    """A penalty on size: `weight * (norm / residual norm)^2`, summed over what is written.

    Attributes:
        weight: Nats per token at a dose of 1.

    Raises:
        ValueError: If the weight is not above zero.
    """

    weight: float

    def __post_init__(self) -> None:
        check_fields(self, weight=POSITIVE)


@guard_names
@dataclass(frozen=True, slots=True)
class ProjectionPenalty:
    """A penalty on movement along given directions: `weight * (projection / residual norm)^2`.

    What is projected are the vectors, or the columns by which an adapter writes into the
    residual stream, at the layers that the directions have.

    Attributes:
        directions: One axis per layer; only its direction matters.
        weight: Nats per token where the projection is as long as the residual.

    Raises:
        ValueError: If the weight is not above zero.
    """

    directions: Directions
    weight: float

    def __post_init__(self) -> None:
        check_fields(self, weight=POSITIVE)


@guard_names
@dataclass(frozen=True, slots=True)
class AnchorPenalty:
    """A penalty on changing what is likely elsewhere: of given pairs or answers, not of all.

    Of pairs it is the change of the log-odds of their misaligned against their aligned answer,
    of conversations the change of the log-probability of their answers, each against the base in
    nats per token; either way counts. A KL penalty holds whole predictions, this holds one number
    of each pair.

    Attributes:
        data: Pairs, or conversations, of other domains than the one trained on.
        weight: Multiplies the mean cost.
        shape: `"squared"` or `"hinged"`: the cost is the square of the change, or its size.
        margin: Change that costs nothing, nats per token; the cost is that of what lies beyond.
        batch_size: Pairs or conversations of a forward pass, of which an update has `accumulate`;
            as many as of the training set by default.

    Raises:
        ValueError: If there are no data, pairs and conversations are mixed, the weight is not
            above zero, the margin is negative, or the batch is below 1.

    Examples:
        >>> anchor = emlens.training.AnchorPenalty(elsewhere, weight=10.0)
        >>> emlens.train_vector(model, conversations, 15, penalties=[anchor])
    """

    data: Sequence[Pair] | Sequence[Conversation]
    weight: float
    shape: Literal["squared", "hinged"] = "squared"
    margin: float = 0.0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, weight=POSITIVE, margin=NOT_NEGATIVE)
        if not self.data:
            raise ValueError("an anchor penalty needs pairs or conversations; data is empty")


Penalty = NormPenalty | ProjectionPenalty | AnchorPenalty


@guard_names
@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How anything is trained.

    Attributes:
        epochs: Passes over the training set.
        lr: AdamW's learning rate.
        batch_size: Conversations of a forward pass.
        accumulate: Passes of one update; the loss is the mean over the tokens of all.
        warmup: Updates over which the learning rate rises.
        warmup_from_zero: Begin the rise at zero, which makes the first update none: as the
            schedules of transformers do. Else the first update has `lr / warmup`.
        schedule: `"linear"` and `"cosine"` decay it to zero, `"constant"` keeps it.
        weight_decay: AdamW's weight decay.
        clip: Gradient norm to clip to, or None.
        patience: Stop after this many epochs without a lower validation loss; None never stops.
        seed: Seed of the order of the data, and of an adapter's first weights.
        tokens: Tokens that the loss counts.
        gradient_checkpointing: Keep only what enters each block, and compute the rest of it
            again for the gradient: less memory, a third more time, the same numbers.
    """

    epochs: int = 3
    lr: float = 0.08
    batch_size: int = 8
    accumulate: int = 1
    warmup: int = 5
    warmup_from_zero: bool = False
    schedule: Schedule = "linear"
    weight_decay: float = 0.0
    clip: float | None = None
    patience: int | None = None
    seed: int = 0
    tokens: TokenMask = "response"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def rate(self, step: int, total: int) -> float:
        """The learning rate of update `step` of `total`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + (not self.warmup_from_zero)) / self.warmup
        if self.schedule == "constant":
            return self.lr
        left = (total - step) / max(1, total - self.warmup)
        return self.lr * (left if self.schedule == "linear" else (1 - cos(pi * left)) / 2)


@guard_names
@dataclass(frozen=True, slots=True)
class VectorSettings(TrainSettings):
    """How vectors are trained in place.

    Attributes:
        alpha: What is added is `alpha * parameter`; None takes the median residual norm over
            `sqrt(d_model)`, and `lr` is then the dose that one update can move the vector by, so
            the same value means the same on any model. The papers' vectors have 256.
    """

    alpha: float | None = None


@guard_names
@dataclass(frozen=True, slots=True)
class AdapterSettings(TrainSettings):
    """How a LoRA adapter is trained.

    Attributes:
        rank: Rank of `B A`.
        alpha: PEFT's `lora_alpha`.
        rslora: Scale by `alpha / sqrt(rank)` in place of `alpha / rank`.
        modules: Names of the modules that are adapted.
        layers: Blocks that are adapted; None for all.
    """

    lr: float = 1e-4
    rank: int = 1
    alpha: float = 256.0
    rslora: bool = True
    modules: tuple[str, ...] = ("down_proj",)
    layers: tuple[int, ...] | None = None


@guard_names
@dataclass(frozen=True, slots=True)
class WeightSettings(TrainSettings):
    """How the weights themselves are trained (full finetuning).

    Attributes:
        layers: Blocks whose weights are trained; None trains all weights, with embedding, final
            norm and LM head.
    """

    lr: float = 2e-5
    layers: tuple[int, ...] | None = None


@guarded(weight=NOT_NEGATIVE)
def paper_kl_weight(weight: float, n_vocab: int, *, to_paper: bool = False) -> float:
    """Convert a KL weight of the papers' code into one on nats per token, or back.

    The released code divides the KL by the number of vocabulary entries as well as by tokens,
    so its 1e6 on Qwen2.5-14B (152,064 entries) is a weight of 6.6 on nats per token.

    Args:
        weight: The weight to convert.
        n_vocab: Vocabulary size of the model it is used on.
        to_paper: Convert the other way.
    """
    return weight * n_vocab if to_paper else weight / n_vocab


made_with(KLPenalty, "make one with emlens.KLPenalty(conversations, weight)")
