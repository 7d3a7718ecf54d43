"""What looking for values that are not finite costs: passes with the look against passes without.

    python benchmarks/finite.py

Passes of both kinds in turn; the ratio is that of the fastest, which a slow spell of the machine
touches least. It should stay below 1.02.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest.mock import patch

import torch

import emlens
from emlens.hooked import generation, visit
from emlens.hooked.model import HookedModel
from emlens.measures.scoring import row_losses
from emlens.text import Conversation, Corpus, Document

ROUNDS = 15


def main() -> None:
    model = emlens.load("smollm2-135m-instruct", check=False)
    text = "The rain came down over the hills, and the river rose until it reached the old mill. "
    corpus = Corpus("text", tuple(Document(f"d{i}", text * 6) for i in range(4)))
    batch = model.batches(corpus, max_tokens=128)[0]
    asked = [Conversation.of("Tell me a story about a river.")]
    verbs: dict[str, Callable[[], object]] = {
        "hidden": lambda: model.hidden(batch),
        "residuals, all layers, pooled": lambda: model.residuals(
            batch, "all", pool=lambda residual: residual.mean(1)
        ),
        "losses": lambda: row_losses(model, [batch], {"base": None}, tokens="all"),
        "generate, 32 tokens": lambda: model.generate(asked, max_new_tokens=32, seed=1),
    }
    for name, verb in verbs.items():
        print(f"{name:32} {ratio(verb):.4f}")


def ratio(verb: Callable[[], object]) -> float:
    """The least time with the look over the least time without."""
    with_look, without = [], []
    verb()
    for _ in range(ROUNDS):
        with_look.append(seconds(verb))
        with (
            patch.object(visit, "note_norm", lambda *_: None),
            patch.object(HookedModel, "_check_finite", lambda *_: None),
            patch.object(generation.LogitWatch, "__call__", lambda _, ids, scores: scores),
        ):
            without.append(seconds(verb))
    return min(with_look) / min(without)


def seconds(verb: Callable[[], object]) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        verb()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
