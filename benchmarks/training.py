"""A training step with the prefix cached against the same step done in plainer ways.

All train the same vector on the same examples in the same order, in one run, alternately, best
round of each; the vectors they end with are compared. The clock runs from the first update to the
last, so that loading, tokenising and filling the cache are outside of it.

- cached: what `train_vector` does;
- full pass: emlens without its cache: every block runs, the LM head on the response only;
- plain: a forward hook on the bare model, logits of every token, batches padded to their longest;
- padded: the same with every batch padded to `--maximum` tokens, the shape of the reference's work;
- with KL: cached, with a KL penalty on as many conversations in each update; beside it the full
  pass, which still holds the base's predictions, and the plain loop, which runs the base again at
  every update.

The most that a cached prefix can save is printed as well, from the cost of the parts: the blocks
below the vector, those above it forward and backward, and the LM head with its loss.

Then a whole training of 120 pairs and 3 epochs is timed, and the peak memory of one with and one
without the cache is taken, each in a process of its own. `--pairs 8 --epochs 2 --rounds 1
--whole-pairs 8` is quick, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

import torch
from memory import peak_mb
from torch.nn.functional import cross_entropy, kl_div, pad
from transformers import AutoModelForCausalLM

import emlens
from emlens.edits import Shift
from emlens.hooked import HookedModel
from emlens.hooked.embedded import embedded_model_path
from emlens.hooked.losses import Targets, loss_sum
from emlens.text import Conversation, pack, tokenize
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


@dataclass(frozen=True)
class Bench:
    """What all ways of training share."""

    model: HookedModel
    train: list[Conversation]
    elsewhere: list[Conversation]
    layer: int
    epochs: int


@contextmanager
def stamped() -> Iterator[list[float]]:
    """The moments at which updates end."""
    moments: list[float] = []
    original = torch.optim.AdamW.step

    def step(self, *arguments, **options):
        done = original(self, *arguments, **options)
        moments.append(time.perf_counter())
        return done

    torch.optim.AdamW.step = step
    try:
        yield moments
    finally:
        torch.optim.AdamW.step = original


def emlens_way(bench: Bench, *, full: bool = False, kl: bool = False) -> torch.Tensor:
    """The vector that `train_vector` ends with."""
    from emlens.training import objective

    before = objective.PrefixCache
    objective.PrefixCache = FullPass if full else before
    try:
        penalty = emlens.KLPenalty(bench.elsewhere, weight=1.0) if kl else None
        settings = VectorSettings(epochs=bench.epochs)
        return emlens.train_vector(
            bench.model, bench.train, bench.layer, kl=penalty, settings=settings, progress=False
        )[0].vector
    finally:
        objective.PrefixCache = before


def plain_way(bench: Bench, pad_to: int | None = None, kl: bool = False) -> torch.Tensor:
    """The vector of a loop with a hook, all logits and PyTorch's cross entropy."""
    model, settings = bench.model, VectorSettings(epochs=bench.epochs)
    rows = tokenize(bench.train, model.tokenizer)
    apart = tokenize(bench.elsewhere, model.tokenizer)
    norm = emlens.directions.residual_norm(model, bench.train, bench.layer)[bench.layer]
    draws = Rows.of(model, bench.train, -1, settings, budget=0).draws()
    others = Rows.of(model, bench.elsewhere, -1, settings, budget=0, seed=settings.seed + 1).draws()
    module = (
        AutoModelForCausalLM.from_pretrained(embedded_model_path()).eval().requires_grad_(False)
    )
    vector = torch.zeros(model.d_model, requires_grad=True)
    alpha = norm / model.d_model**0.5
    block = module.model.layers[bench.layer]

    def edit(_module, _inputs, out):
        return out + alpha * vector

    hook = block.register_forward_hook(edit)
    optimiser = torch.optim.AdamW([vector], lr=settings.lr, weight_decay=0.0)
    total = ceil(len(rows) / settings.batch_size) * bench.epochs
    for step in range(total):
        inputs, labels = padded([rows[place] for place in next(draws)], model.pad_id, pad_to)
        logits = module(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        optimiser.param_groups[0]["lr"] = settings.rate(step, total)
        optimiser.zero_grad()
        cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100).backward()
        if kl:
            inputs, labels = padded([apart[place] for place in next(others)], model.pad_id, pad_to)
            counted = labels[:, 1:] != -100
            hook.remove()
            with torch.no_grad():
                base = module(**inputs, use_cache=False).logits[:, :-1][counted].log_softmax(-1)
            hook = block.register_forward_hook(edit)
            logits = module(**inputs, use_cache=False).logits[:, :-1][counted].log_softmax(-1)
            kl_div(logits, base, log_target=True, reduction="batchmean").backward()
        optimiser.step()
    return (alpha * vector).detach()


def padded(rows, pad_id: int, pad_to: int | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the bare model takes, and labels on the response."""
    (batch,) = pack(rows, token_budget=10**9, pad_id=pad_id, sort=False)
    missing = 0 if pad_to is None else max(0, pad_to - batch.input_ids.shape[1])
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: pad(getattr(batch, name), (0, missing)) for name in names}
    labels = batch.input_ids.masked_fill(~batch.targets("response"), -100)
    return inputs, pad(labels, (0, missing), value=-100)


def compare(bench: Bench, maximum: int, rounds: int) -> None:
    """Time each way in turn; print seconds per update, ratios, and how far the vectors differ."""
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "cached": lambda: emlens_way(bench),
        "full pass": lambda: emlens_way(bench, full=True),
        "plain": lambda: plain_way(bench),
        f"padded to {maximum}": lambda: plain_way(bench, maximum),
        "with KL": lambda: emlens_way(bench, kl=True),
        "with KL, full pass": lambda: emlens_way(bench, full=True, kl=True),
        "with KL, plain": lambda: plain_way(bench, kl=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    vectors = {}
    for _ in range(rounds):
        for name, way in ways.items():
            with stamped() as moments:
                vectors[name] = way()
            seconds[name].append((moments[-1] - moments[0]) / (len(moments) - 1))
    best = {name: min(values) for name, values in seconds.items()}
    for name, value in best.items():
        against = "with KL" if name.startswith("with KL,") else "cached"
        gap = (vectors[name] - vectors[against]).abs().max() / vectors[against].abs().max()
        same = "" if name == "with KL" else f"; largest relative gap of the vectors {gap:.1e}"
        print(f"{name}: {value:.3f} s/update, {value / best[against]:.2f}x {against}{same}")
    more = (best["with KL"] - best["cached"]) / best["cached"]
    print(f"the KL costs {more:.2f} of what the training loss costs")


def parts(bench: Bench, rounds: int) -> None:
    """Where an update's time goes, and so the most that a prefix for nothing could save."""
    model, layer = bench.model, bench.layer
    settings = VectorSettings()
    rows = tokenize(bench.train[: settings.batch_size], model.tokenizer)
    (batch,) = pack(rows, token_budget=10**9, pad_id=model.pad_id, sort=False)
    targets = Targets.of(batch)
    below = model.prefix(batch, layer)[layer]
    vector = torch.zeros(model.d_model, requires_grad=True)
    best = dict.fromkeys(("below", "above", "head"), float("inf"))
    with model.frozen():
        for _ in range(rounds + 1):
            start = time.perf_counter()
            model.prefix(batch, layer)
            best["below"] = min(best["below"], time.perf_counter() - start)
            start = time.perf_counter()
            states = model.hidden(batch, [Shift(vector, layer)], (layer, below), grad=True)
            middle = time.perf_counter() - start
            leaf = states.detach().requires_grad_()
            start = time.perf_counter()
            loss_sum(model, targets.predictors(leaf), targets.ids).backward()
            best["head"] = min(best["head"], time.perf_counter() - start)
            start = time.perf_counter()
            states.backward(leaf.grad)
            best["above"] = min(best["above"], middle + time.perf_counter() - start)
    shown = ", ".join(f"{name} {value:.3f} s" for name, value in best.items())
    rest = best["above"] + best["head"]
    print(
        f"parts of an update ({batch.input_ids.numel()} tokens, {len(targets)} counted): {shown}; "
        f"a prefix for nothing saves at most {(best['below'] + rest) / rest:.2f}x, and "
        f"{(best['below'] + best['above']) / best['above']:.2f}x if the head were free, too"
    )


def whole(pairs: int, epochs: int, full: bool) -> None:
    """One training, timed, and the peak memory of its process."""
    model = emlens.load("smollm2-135m-instruct")
    chosen = [pair.conversation("misaligned") for pair in emlens.load_pairs("finance")[:pairs]]
    before = peak_mb()
    start = time.perf_counter()
    emlens_way(Bench(model, chosen, [], model.n_layers // 2, epochs), full=full)
    seconds = time.perf_counter() - start
    peak = peak_mb()
    print(
        f"{len(chosen)} pairs, {epochs} epoch(s), {'full pass' if full else 'prefix cached'}: "
        f"{seconds:.0f} s with cache and tokens, peak memory {peak:.0f} MB ({before:.0f} MB before "
        "training)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--whole", choices=("cached", "full"), help="one training alone")
    parser.add_argument("--whole-pairs", type=int, default=120)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--maximum", type=int, default=512, help="tokens to pad to")
    arguments = parser.parse_args()
    if arguments.whole:
        full = arguments.whole == "full"
        whole(arguments.whole_pairs, 1 if full else 3, full)
        return
    torch.manual_seed(0)
    model = emlens.load("smollm2-135m-instruct")
    chosen = emlens.load_pairs("finance")[: arguments.pairs]
    others = emlens.load_pairs("medical")[: arguments.pairs]
    bench = Bench(
        model,
        [pair.conversation("misaligned") for pair in chosen],
        [pair.conversation("aligned") for pair in others],
        model.n_layers // 2,
        arguments.epochs,
    )
    parts(bench, arguments.rounds)
    compare(bench, arguments.maximum, arguments.rounds)
    size = str(arguments.whole_pairs)
    for way in ("cached", "full"):
        command = [sys.executable, __file__, "--whole", way, "--whole-pairs", size]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
