"""A training step with the prefix cached against the same step with full forward passes.

Both train the same vector on the same packed batches, in one run, alternately; the vectors they
end with are compared.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

import emlens
from emlens.hooked import HookedModel
from emlens.training import VectorSettings
from emlens.training.prefix import PrefixCache


class FullPass(PrefixCache):
    """The same rows, nothing kept: every batch runs from the embedding."""

    def batch(self, places):
        batch, _ = super().batch(places)
        return batch, None

    def _fill(self, budget: int, token_budget: int) -> None:
        self._layer = -1


def train(model: HookedModel, conversations, layer: int, kl, epochs: int, full: bool):
    """Seconds of the updates alone, and the vector."""
    from emlens.training import objective

    before = objective.PrefixCache
    objective.PrefixCache = FullPass if full else before
    try:
        start = time.perf_counter()
        settings = VectorSettings(epochs=epochs)
        direction, run = emlens.train_vector(
            model, conversations, layer, kl=kl, settings=settings, progress=False
        )
        total = time.perf_counter() - start
    finally:
        objective.PrefixCache = before
    return total, len(run.steps), direction.vector


def compare(name: str, model, conversations, layer: int, kl, rounds: int) -> None:
    """Time one and three epochs of each; the difference is what the updates cost."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    totals: dict[bool, list[float]] = {False: [], True: []}
    vectors = {}
    for _ in range(rounds):
        for full in (True, False):
            short, steps_short, _ = train(model, conversations, layer, kl, 1, full)
            long, steps_long, vectors[full] = train(model, conversations, layer, kl, 3, full)
            seconds[full].append((long - short) / (steps_long - steps_short))
            totals[full].append(long)
    gap = float((vectors[True] - vectors[False]).abs().max() / vectors[True].abs().max())
    step_full, step_cached = min(seconds[True]), min(seconds[False])
    print(
        f"{name}: full pass {step_full:.3f} s/update, prefix cached {step_cached:.3f} s/update, "
        f"{step_full / step_cached:.2f}x; whole runs of 3 epochs {min(totals[True]):.1f} s and "
        f"{min(totals[False]):.1f} s; largest relative gap of the vectors {gap:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = emlens.load("smollm2-135m-instruct")
    layer = model.n_layers // 2
    pairs = emlens.load_pairs("finance")[: arguments.pairs]
    conversations = [pair.conversation("misaligned") for pair in pairs]
    text = [p.conversation("aligned") for p in emlens.load_pairs("medical")[: arguments.pairs]]
    compare("no KL", model, conversations, layer, None, arguments.rounds)
    penalty = emlens.KLPenalty(text, weight=1.0)
    compare("with KL", model, conversations, layer, penalty, arguments.rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of the whole benchmark: {peak:.0f} MB")


if __name__ == "__main__":
    main()
