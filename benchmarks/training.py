"""A training step with the prefix cached against the same step done in plainer ways.

All train the same vector on the same examples in the same order, in one run, alternately; the
vectors they end with are compared.

- full pass: emlens without its cache: every block runs, the LM head on the response only;
- plain: a forward hook on the bare model, logits of every token, batches padded to their longest;
- padded: the same with every batch padded to `--maximum` tokens, the shape of the reference's work.

Then a whole training of 120 pairs and 3 epochs is timed, and the peak memory of one with and one
without the cache is taken, each in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from math import ceil

import torch
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModelForCausalLM

import emlens
from emlens.hooked import HookedModel
from emlens.hooked.embedded import embedded_model_path
from emlens.text import pack, tokenize
from emlens.training import VectorSettings
from emlens.training.objective import Rows
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


def plain_seconds(
    model: HookedModel, conversations, layer: int, epochs: int, pad_to: int | None
) -> tuple[float, int, torch.Tensor]:
    """Seconds of the updates, their number, and the vector: hook, logits, cross entropy."""
    settings = VectorSettings(epochs=epochs)
    rows = tokenize(conversations, model.tokenizer)
    norm = emlens.directions.residual_norm(model, conversations, layer)[layer]
    draws = Rows.of(model, conversations, -1, settings, budget=0).draws()
    module = (
        AutoModelForCausalLM.from_pretrained(embedded_model_path()).eval().requires_grad_(False)
    )
    vector = torch.zeros(model.d_model, requires_grad=True)
    alpha = norm / model.d_model**0.5
    module.model.layers[layer].register_forward_hook(lambda _m, _i, out: out + alpha * vector)
    optimiser = torch.optim.AdamW([vector], lr=settings.lr, weight_decay=0.0)
    total = ceil(len(rows) / settings.batch_size) * epochs
    start = time.perf_counter()
    for step in range(total):
        chosen = [rows[place] for place in next(draws)]
        (batch,) = pack(chosen, token_budget=10**9, pad_id=model.pad_id, sort=False)
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
        }
        missing = 0 if pad_to is None else max(0, pad_to - batch.input_ids.shape[1])
        inputs = {key: pad(value, (0, missing)) for key, value in inputs.items()}
        labels = pad(
            batch.input_ids.masked_fill(~batch.targets("response"), -100), (0, missing), value=-100
        )
        logits = module(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        optimiser.param_groups[0]["lr"] = settings.rate(step, total)
        optimiser.zero_grad()
        cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100).backward()
        optimiser.step()
    return time.perf_counter() - start, total, (alpha * vector).detach()


def compare_plain(model, conversations, layer: int, maximum: int) -> None:
    """One epoch of each plain way, against what one more epoch costs here."""
    short, steps_short, _ = train(model, conversations, layer, None, 1, False)
    long, steps_long, _ = train(model, conversations, layer, None, 3, False)
    ours = (long - short) / (steps_long - steps_short)
    _, _, mine = train(model, conversations, layer, None, 1, False)
    for name, pad_to in (("plain", None), ("padded", maximum)):
        seconds, updates, vector = plain_seconds(model, conversations, layer, 1, pad_to)
        each = seconds / updates
        gap = float((vector - mine).abs().max() / mine.abs().max())
        print(
            f"{name}: {each:.3f} s/update against {ours:.3f}, {each / ours:.2f}x; largest relative "
            f"gap of the vectors {gap:.1e}"
        )


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


def whole(pairs: int, epochs: int, full: bool) -> None:
    """One training, timed, and the peak memory of its process."""
    model = emlens.load("smollm2-135m-instruct")
    chosen = [pair.conversation("misaligned") for pair in emlens.load_pairs("finance")[:pairs]]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds, updates, _ = train(model, chosen, model.n_layers // 2, None, epochs, full)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{len(chosen)} pairs, {epochs} epochs ({updates} updates), "
        f"{'full pass' if full else 'prefix cached'}: {seconds:.0f} s, peak memory {peak:.0f} MB "
        f"({before:.0f} MB before training)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--whole", choices=("cached", "full"), help="one training alone")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--maximum", type=int, default=512, help="tokens to pad to")
    arguments = parser.parse_args()
    if arguments.whole:
        whole(120, 3 if arguments.whole == "cached" else 1, arguments.whole == "full")
        return
    torch.manual_seed(0)
    model = emlens.load("smollm2-135m-instruct")
    layer = model.n_layers // 2
    pairs = emlens.load_pairs("finance")[: arguments.pairs]
    conversations = [pair.conversation("misaligned") for pair in pairs]
    text = [p.conversation("aligned") for p in emlens.load_pairs("medical")[: arguments.pairs]]
    compare_plain(model, conversations, layer, arguments.maximum)
    compare("no KL", model, conversations, layer, None, arguments.rounds)
    penalty = emlens.KLPenalty(text, weight=1.0)
    compare("with KL", model, conversations, layer, penalty, arguments.rounds)
    for way in ("cached", "full"):
        subprocess.run([sys.executable, __file__, "--whole", way], check=True)


if __name__ == "__main__":
    main()
