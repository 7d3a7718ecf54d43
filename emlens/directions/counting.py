"""Which activations count, and how: options that all constructions share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from emlens._door import check_fields
from emlens.hooked import Edit
from emlens.hooked.options import ReadOptions, ReadSettings
from emlens.text import TokenBatch

Weighting = Literal["token", "conversation"]


class CountingOptions(ReadOptions, total=False):
    """What counts when activations are averaged; includes `ReadOptions`.

    Attributes:
        weighting: `"token"`, the default, gives every counted token the same weight,
            `"conversation"` every conversation.
        skip_first: Counted tokens to leave out at the start of each conversation; none by default.
        winsorize: Clip each token's coordinates at this quantile of their size, e.g. 0.99, to limit
            massive coordinates.
        drop_massive: Leave out tokens whose norm at a layer is more than this multiple of the
            median of their conversation; a conversation keeps its weight.
        edits: Edits that act while reading.
        seed: Seed of the random splits, of the shuffled labels and of the folds; 0 by default.
        sample_bytes: Memory for the means of single conversations behind the shuffled labels and
            the held-out AUROC; beyond it a random sample is kept. By default 64 MiB, or 2% of the
            model's weights.
    """

    weighting: Weighting
    skip_first: int
    winsorize: float | None
    drop_massive: float | None
    edits: Sequence[Edit]
    seed: int
    sample_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Counting(ReadSettings):
    """Defaults of `CountingOptions`."""

    weighting: Weighting = "token"
    skip_first: int = 0
    winsorize: float | None = None
    drop_massive: float | None = None
    edits: Sequence[Edit] = ()
    seed: int = 0
    sample_bytes: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "edits", tuple(self.edits))
        if self.winsorize is not None and not 0.5 <= self.winsorize < 1:
            raise ValueError(
                f"winsorize is a quantile from 0.5 to below 1, e.g. 0.99, not {self.winsorize}"
            )
        if self.drop_massive is not None and not self.drop_massive > 1:
            raise ValueError(
                "drop_massive is a multiple of the conversation's median norm, above 1, not "
                f"{self.drop_massive}"
            )

    def mask(self, batch: TokenBatch) -> Tensor:
        """The counted tokens, `[batch, pos]`."""
        mask = batch.mask(self.tokens)
        return mask & (mask.cumsum(1) > self.skip_first) if self.skip_first else mask

    def record(self) -> dict[str, object]:
        """What of it is not the default, for the provenance."""
        kept = {
            "skip_first": self.skip_first or None,
            "winsorize": self.winsorize,
            "drop_massive": self.drop_massive,
            "edits": [repr(edit) for edit in self.edits] or None,
        }
        return {name: value for name, value in kept.items() if value is not None}
