"""What is trained on, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from emlens.text import Conversation, TokenMask

Schedule = Literal["linear", "constant"]


@dataclass(frozen=True, slots=True)
class KLPenalty:
    """A penalty on changing predictions elsewhere: `weight * KL(base || trained)`.

    Attributes:
        conversations: The KL set: texts of other domains than the one trained on.
        weight: Multiplies nats per token. `paper_kl_weight` converts the papers' weights.
        tokens: Tokens on which the KL counts; the papers take all of them.
        batch_size: Conversations per update; as many as of the training set by default.

    Raises:
        ValueError: If the set is empty or the weight is not above zero.
    """

    conversations: Sequence[Conversation]
    weight: float
    tokens: TokenMask = "response"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not self.conversations:
            raise ValueError("the KL penalty needs conversations; the set is empty")
        if not self.weight > 0:
            raise ValueError(
                f"the KL weight must be above 0, not {self.weight}; leave kl out to train without"
            )


@dataclass(frozen=True, slots=True)
class VectorSettings:
    """How a vector is trained in place.

    Attributes:
        epochs: Passes over the training set.
        lr: AdamW's learning rate on the parameter. With the default `alpha` it is the dose that
            one update can move the vector by, so the same value means the same on any model.
        batch_size: Conversations per update.
        alpha: What is added is `alpha * parameter`; None takes the median residual norm over
            `sqrt(d_model)`. The papers' vectors have 256.
        warmup: Updates over which the learning rate rises from zero.
        schedule: `"linear"` decays it to zero, `"constant"` keeps it.
        weight_decay: AdamW's weight decay.
        clip: Gradient norm to clip to, or None.
        seed: Seed of the order of the data.
        tokens: Tokens that the loss counts.
    """

    epochs: int = 3
    lr: float = 0.08
    batch_size: int = 8
    alpha: float | None = None
    warmup: int = 5
    schedule: Schedule = "linear"
    weight_decay: float = 0.0
    clip: float | None = None
    seed: int = 0
    tokens: TokenMask = "response"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                f"epochs and batch_size must be at least 1, not {self.epochs}, {self.batch_size}"
            )
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if self.schedule not in ("linear", "constant"):
            raise ValueError(f"unknown schedule {self.schedule!r}; choose 'linear' or 'constant'")

    def rate(self, step: int, total: int) -> float:
        """The learning rate of update `step` of `total`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        return self.lr * (total - step) / max(1, total - self.warmup)


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
