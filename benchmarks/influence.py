"""Influence on pre-training text: what shared prefixes save, what a Fisher profile costs and hits.

In one run on SmolLM2-135M-Instruct: (a) a sweep of doses with `emlens.influence` against whole
passes; (b) the cost of a Fisher profile of all layers in units of one exact evaluation, one
forward pass over the same text under an edit with the LM head and the KL, and the time to score
1,000 directions at every layer; (c) its scores against the exact KL, on directions of several
kinds; (d) how often the 95% intervals of influence hold the truth, in simulated corpora whose
documents are drawn from those that were measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch

import emlens
from emlens import Add, Direction
from emlens.directions import mean_diff, residual_norm
from emlens.fisher import InfluenceProfile
from emlens.hooked import BaseLogProbs, HookedModel
from emlens.hooked.losses import Targets, token_scores
from emlens.measures.scoring import LOG_PROB_BUDGET, row_influence
from emlens.text import Corpus

LENGTH = 128
BUDGET = 1024
DOSES = (0.05, 0.2)
PARTS = ["a", "b", "c", "d"]
T = TypeVar("T")


def seconds(call: Callable[[], T]) -> tuple[float, float, T]:
    """Seconds of the clock and of the processor, and what was returned."""
    start, busy = time.perf_counter(), time.process_time()
    value = call()
    return time.perf_counter() - start, time.process_time() - busy, value


def text(n: int) -> Corpus:
    return emlens.corpus("python-docs", documents=n, min_characters=500)


@torch.no_grad()
def whole_pass(
    model: HookedModel, corpus: Corpus, direction: Direction, *, keep_base: dict | None
) -> tuple[float, int, np.ndarray]:
    """Summed KL and tokens of an evaluation without a shared prefix, and its share of the time.

    Seconds of the clock and of the processor count the edited pass and its KL, not the base.
    """
    total, tokens, spent = 0.0, 0, np.zeros(2)
    batches = model.batches(corpus, token_budget=BUDGET, max_tokens=LENGTH)
    for i, batch in enumerate(batches):
        targets = Targets.of(batch, "all")
        base = None if keep_base is None else keep_base.get(i)
        if base is None:
            base = BaseLogProbs(model, targets.predictors(model.hidden(batch)), LOG_PROB_BUDGET)
            if keep_base is not None:
                keep_base[i] = base
        start = np.array([time.perf_counter(), time.process_time()])
        hidden = targets.predictors(model.hidden(batch, [Add(direction)]))
        _, kl = token_scores(model, base, hidden, targets.ids)
        spent += np.array([time.perf_counter(), time.process_time()]) - start
        total += float(kl.double().sum())
        tokens += len(targets)
    return total, tokens, spent


def sweep(model: HookedModel, n_doses: int) -> None:
    corpus, layer = text(8), model.n_layers // 2
    generator = torch.Generator().manual_seed(0)
    directions = {
        f"d{i}": Direction.of(torch.randn(model.d_model, generator=generator), layer)
        for i in range(3)
    }
    doses = tuple(np.linspace(0.02, 0.4, n_doses).round(4).tolist())
    size = residual_norm(model, corpus, layer, max_tokens=LENGTH, token_budget=BUDGET)[layer]
    ours, _, found = seconds(
        lambda: emlens.influence(
            model,
            corpus,
            directions,
            doses=doses,
            controls=0,
            max_tokens=LENGTH,
            token_budget=BUDGET,
        )
    )
    times, largest = [], 0.0
    kept: dict = {}
    for base in (None, kept):
        start = time.perf_counter()
        for name, direction in directions.items():
            for dose in doses:
                edit = direction.scaled_to(dose * size)
                kl, tokens, _ = whole_pass(model, corpus, edit, keep_base=base)
                gap = abs(kl / tokens - found.divergence(name, dose).estimate)
                largest = max(largest, gap)
        times.append(time.perf_counter() - start)
    evaluations = len(directions) * len(doses)
    print(
        f"(a) {len(directions)} directions x {len(doses)} doses at layer {layer}, "
        f"{len(corpus)} documents: influence {ours:.1f} s; {evaluations} evaluations of their own "
        f"(base and edited pass each) {times[0]:.1f} s, ratio {times[0] / ours:.2f}; with the "
        f"base's log-probabilities held {times[1]:.1f} s, ratio {times[1] / ours:.2f}; "
        f"largest difference {largest:.1e} nats/token",
        flush=True,
    )


def cost(model: HookedModel, corpus: Corpus, draws: int) -> None:
    middle = Direction.of(torch.ones(model.d_model) * 1e-3, model.n_layers // 2)
    *took, profile = seconds(
        lambda: InfluenceProfile.fit(
            model, corpus, draws=draws, max_tokens=LENGTH, token_budget=BUDGET
        )
    )
    _, _, unit = whole_pass(model, corpus, middle, keep_base=None)
    print(
        f"(b) {profile!r}: {took[0]:.1f} s, {took[0] / unit[0]:.1f} exact evaluations of "
        f"{unit[0]:.1f} s ({took[1] / unit[1]:.1f} by seconds of the processor)",
        flush=True,
    )
    generator = torch.Generator().manual_seed(1)
    arrays = {
        layer: torch.randn(1000, model.d_model, generator=generator) for layer in profile.layers
    }
    first, *_ = seconds(lambda: profile.score(arrays, dose=0.05))
    again = min(seconds(lambda: profile.score(arrays, dose=0.05))[0] for _ in range(3))
    print(
        f"    1,000 directions x {len(profile.layers)} layers: {again:.2f} s "
        f"({first:.2f} s the first time, controls included)",
        flush=True,
    )


def items(
    model: HookedModel, profile: InfluenceProfile, layers: tuple[int, ...]
) -> dict[str, Direction]:
    """Directions of six kinds at each layer."""
    pairs = emlens.load_pairs("medical")[:24]
    bad, good = (
        [pair.conversation(side) for pair in pairs]  # type: ignore[arg-type]
        for side in ("misaligned", "aligned")
    )
    made = mean_diff(model, bad, good, layers=layers)
    head: Any = model.module.get_output_embeddings()
    rows = head.weight.detach().float()
    generator = torch.Generator().manual_seed(2)
    found: dict[str, Direction] = {}
    for layer in layers:
        place = profile.layers.index(layer)
        activations = profile.sums.tokens.activations[place]
        for i in range(3):
            noise = torch.randn(model.d_model, generator=generator)
            found[f"random {layer} {i}"] = Direction.of(noise, layer)
            one, other = torch.randperm(len(activations), generator=generator)[:2].tolist()
            gap = activations[one] - activations[other]
            found[f"activation difference {layer} {i}"] = Direction.of(gap, layer)
        for i in torch.randint(len(rows), (2,), generator=generator).tolist():
            found[f"unembedding {layer} {i}"] = Direction.of(rows[i], layer)
        found[f"mean-diff {layer}"] = made[layer]
        trained, _ = emlens.train_vector(model, bad, layer, epochs=1, progress=False)
        found[f"trained {layer}"] = trained
        for name, direction in profile.top(layer, 2).items():
            found[f"{name} {layer}"] = direction
    return found


def accuracy(
    model: HookedModel,
    corpus: Corpus,
    layers: tuple[int, ...],
    draws: int,
    doses: Sequence[float],
) -> None:
    from scipy.stats import spearmanr

    profile = InfluenceProfile.fit(
        model, corpus, draws=draws, max_tokens=LENGTH, token_budget=BUDGET
    )
    found = items(model, profile, layers)
    batches = model.batches(corpus, token_budget=BUDGET, max_tokens=LENGTH)
    sizes = profile.residual_norms
    for dose in doses:
        rows = []
        scores = profile.score(found, dose=dose).table().set_index("direction")
        for layer in layers:
            here = {name: d for name, d in found.items() if d.layer == layer}
            conditions = {n: [Add(d.scaled_to(dose * sizes[layer]))] for n, d in here.items()}
            _, kl, _, counts = row_influence(model, batches, conditions)
            for name in here:
                # held out: the documents that the direction was not found on
                which = slice(1, None, 2) if scores.loc[name, "held out"] else slice(None)
                exact = kl[name][which].sum() / counts[which].sum()
                fisher = scores.loc[name, "KL [nats/token]"]
                kind = name.split(str(layer))[0].strip().removesuffix(" 1").removesuffix(" 2")
                draws = scores.loc[name, "KL error of the draws"] / fisher
                rows.append((kind, layer, exact, fisher, fisher / exact - 1, draws))
        columns = ["kind", "layer", "exact", "Fisher", "relative error", "error of the draws"]
        table = pd.DataFrame(rows, columns=columns)
        errors = table["relative error"].abs()
        rank = spearmanr(table["exact"], table["Fisher"])[0]
        print(
            f"(c) dose {dose}, {len(corpus)} documents: {len(table)} directions at layers "
            f"{layers}: Spearman {rank:.3f}, "
            f"relative error median {errors.median():.1%}, 90% {errors.quantile(0.9):.1%}, "
            f"largest {errors.max():.1%}, mean {table['relative error'].mean():+.1%}; expected "
            f"of the draws alone, median {0.6745 * table['error of the draws'].median():.1%}"
        )
        table["size"] = errors
        by_kind = table.groupby("kind")[["exact", "Fisher", "relative error", "size"]].median()
        print(by_kind.to_string(float_format="%.4g"), flush=True)


def coverage(model: HookedModel, corpus: Corpus, simulated: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = Direction.of(torch.randn(model.d_model, generator=generator), model.n_layers // 2)
    kinds = {"activation differences": 1}
    options: Any = {"max_tokens": LENGTH, "token_budget": BUDGET}
    found = emlens.influence(model, corpus, {"random": x}, doses=DOSES, controls=kinds, **options)
    random = np.random.default_rng(0)
    for name in found.directions:
        for dose in DOSES:
            truth = (found.divergence(name, dose), found.loss_change(name, dose))
            for n in (24, 64):
                hits = np.zeros(2)
                for _ in range(simulated):
                    part = found.among(random.integers(len(found.counts), size=n))
                    mine = (part.divergence(name, dose), part.loss_change(name, dose))
                    hits += [
                        a.low <= b.estimate <= a.high for a, b in zip(mine, truth, strict=True)
                    ]
                kl, loss = hits / simulated
                print(
                    f"(d) {name}, dose {dose}, {simulated} corpora of {n} documents: 95% intervals "
                    f"hold the KL in {kl:.1%}, the change of loss in {loss:.1%}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="fewer doses and layers")
    parser.add_argument("--checked", type=int, default=32, help="documents of (c)")
    parser.add_argument("--doses", nargs="+", type=float, default=DOSES, help="doses of (c)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    model = emlens.load("smollm2-135m-instruct")
    corpus = text(arguments.documents)
    if "a" in arguments.parts:
        sweep(model, 4 if arguments.quick else 20)
    if "b" in arguments.parts:
        cost(model, corpus, arguments.draws)
    if "c" in arguments.parts:
        layers = (6, 15, 24) if arguments.quick else (3, 9, 15, 21, 28)
        accuracy(model, text(arguments.checked), layers, arguments.draws, arguments.doses)
    if "d" in arguments.parts:
        coverage(model, corpus, 100 if arguments.quick else 1000)


if __name__ == "__main__":
    main()
