"""What looking for values that are not finite costs: its share of the time of each kind of pass.

    python benchmarks/finite.py

The look is timed where it happens, on the CPU, so that a slow spell of the machine meets both. The
share should stay below 0.02.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import emlens
from emlens import Add, Conversation, Direction
from emlens.hooked import generation, visit
from emlens.hooked.model import HookedModel
from emlens.measures import scoring
from emlens.text import Corpus, Document

ROUNDS = 3
LOOKS: tuple[tuple[Any, str], ...] = (
    (visit, "note_norm"),
    (HookedModel, "_check_finite"),
    (generation.LogitWatch, "__call__"),
    (scoring, "_check_finite"),
)


def main() -> None:
    model = emlens.load("smollm2-135m-instruct", check=False)
    text = "The rain came down over the hills, and the river rose until it reached the old mill. "
    corpus = Corpus("text", tuple(Document(f"d{i}", text * 6) for i in range(4)))
    batch = model.batches(corpus, max_tokens=128)[0]
    asked = [Conversation.of("Tell me a story about a river.")]
    edit = Add(Direction.of(torch.ones(model.d_model), 15))
    spent = Spent()
    for name, verb in {
        "hidden": lambda: model.hidden(batch),
        "residuals, all layers": lambda: model.residuals(batch, "all", pool=lambda x: x.mean(1)),
        "losses": lambda: scoring.row_losses(model, [batch], {"base": None}, tokens="all"),
        "generation": lambda: model.generate(asked, max_new_tokens=32),
        "generation with an edit": lambda: model.generate(asked, [edit], max_new_tokens=32),
    }.items():
        print(f"{name:24} {spent.share(verb):.4f}")


class Spent:
    """Seconds inside of the looks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for where, name in LOOKS:
            setattr(where, name, self._timed(getattr(where, name)))

    def share(self, verb: Callable[[], object]) -> float:
        """The share of a verb's time, after one round to warm up."""
        verb()
        self.seconds, start = 0.0, time.perf_counter()
        for _ in range(ROUNDS):
            verb()
        return self.seconds / (time.perf_counter() - start)

    def _timed(self, look: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return look(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


if __name__ == "__main__":
    main()
