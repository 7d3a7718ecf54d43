"""emlens beside plain PyTorch and its neighbours on one GPU, on models of real shapes.

    python benchmarks/gpu.py --tokenizer FOLDER [--shapes 14b 0.5b] [--parts ...] [--out gpu.json]

Models are made from configs, with random weights in bf16. Each figure stands beside its own
baseline of the same run: after a round to warm up, both alternate, and the best round of each
counts; all rounds, peak memory and the card's name are in the JSON file. A part that fails or
takes longer than `--limit` seconds says so, and the rest goes on. The default takes less than eight
minutes on an H200. On a CPU it runs the shape `tiny`, which says nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

import emlens
from emlens import Add, Conversation, Direction, KLPenalty
from emlens.fisher import InfluenceProfile
from emlens.text import Corpus, TokenBatch
from emlens.training import AdapterSettings, VectorSettings

SHAPES: dict[str, tuple[type, dict[str, Any]]] = {
    "tiny": (Qwen2Config, {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
                           "num_attention_heads": 4, "num_key_value_heads": 2}),
    "0.5b": (Qwen2Config, {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                           "num_attention_heads": 14, "num_key_value_heads": 2,
                           "vocab_size": 151936, "tie_word_embeddings": True}),
    "8b": (LlamaConfig, {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                         "num_attention_heads": 32, "num_key_value_heads": 8,
                         "vocab_size": 128256}),
    "14b": (Qwen2Config, {"hidden_size": 5120, "intermediate_size": 13824,
                          "num_hidden_layers": 48, "num_attention_heads": 40,
                          "num_key_value_heads": 8, "vocab_size": 152064}),
}  # fmt: skip
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}
"""bf16, dense, as the maker says."""


@dataclass
class Bench:
    """A model of one shape, and how much it is given to do."""

    hf: Any
    model: emlens.HookedModel
    bad: list[Conversation]
    good: list[Conversation]
    corpus: Corpus
    budgets: tuple[int, ...]
    new_tokens: int
    doses: tuple[float, ...]
    rounds: int
    scored: int
    directions: dict[str, Direction] = field(init=False)

    def __post_init__(self) -> None:
        self.directions = {
            f"r{i}": Direction.of(torch.randn(self.model.d_model), self.layer) for i in range(3)
        }

    @property
    def layer(self) -> int:
        return self.model.n_layers // 2

    @property
    def cuda(self) -> bool:
        return self.model.device.type == "cuda"

    def batches(self, *sides: list[Conversation], budget: int) -> list[TokenBatch]:
        """Batches on the device."""
        found = [b for side in sides for b in self.model.batches(side, token_budget=budget)]
        return [batch.to(self.model.device) for batch in found]

    def timed(self, jobs: Mapping[str, Callable], rounds: int | None = None, warm: bool = True):
        """Seconds of jobs that alternate, `{name: {"s", "rounds", "peak GiB"}}`."""
        found: dict[str, dict] = {name: {"rounds": []} for name in jobs}
        for number in range(-warm, rounds or self.rounds):
            for name, job in jobs.items():
                self.wait()
                start = time.perf_counter()
                job()
                self.wait()
                if number >= 0:
                    found[name]["rounds"].append(round(time.perf_counter() - start, 5))
                if number == 0 and self.cuda:
                    found[name]["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
        return {name: {"s": min(one["rounds"]), **one} for name, one in found.items()}

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def inputs(batch: TokenBatch) -> dict[str, Any]:
    """What the bare model is given."""
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }


def ratios(found: dict, baseline: str) -> dict:
    """The figures, with how many times as fast as the baseline each is."""
    own = found[baseline]["s"]
    return {n: one | {f"speed against {baseline}": own / one["s"]} for n, one in found.items()}


# -- parts ------------------------------------------------------------------------------------


@torch.no_grad()
def extract(bench: Bench) -> dict:
    """`mean_diff` at all layers against a pass of the decoder, by token budget."""
    weights = (w.numel() for n, w in bench.hf.named_parameters() if "embed" not in n)
    head = bench.model.n_vocab * bench.model.d_model * (not bench.hf.config.tie_word_embeddings)
    flops, rows = 2 * (sum(weights) - head), {}
    name = torch.cuda.get_device_name() if bench.cuda else ""
    peak = next((t * 1e12 for card, t in PEAK_TFLOPS.items() if card in name), None)
    for budget in bench.budgets:
        batches = bench.batches(bench.bad, bench.good, budget=budget)
        tokens = sum(batch.n_tokens for batch in batches)
        jobs = {
            "bare pass": lambda batches=batches: [bench.hf.model(**inputs(b)) for b in batches],
            "mean_diff": lambda budget=budget: emlens.mean_diff(
                bench.model, bench.bad, bench.good, token_budget=budget
            ),
        }
        found = ratios(bench.timed(jobs), "bare pass")
        for one in found.values():
            one["tokens/s"] = tokens / one["s"]
            one["share of peak"] = peak and one["tokens/s"] * flops / peak
        rows[str(budget)] = found | {"tokens": tokens, "batches": len(batches)}
    return rows


@torch.no_grad()
def neighbours(bench: Bench) -> dict:
    """Mean residuals of all layers, as others give them, against `mean_diff`; tokens are ready."""
    from nnsight import NNsight

    budget = bench.budgets[len(bench.budgets) // 2]
    batches = bench.batches(bench.bad, bench.good, budget=budget)
    shares = [batch.mask("response").to(bench.model.dtype) for batch in batches]
    traced: Any = NNsight(bench.hf)

    def states() -> None:
        for batch, share in zip(batches, shares, strict=True):
            found = bench.hf.model(**inputs(batch), output_hidden_states=True).hidden_states
            torch.stack([torch.einsum("btd,bt->d", state, share) for state in found[1:]]).cpu()

    def nnsight() -> None:
        for batch, share in zip(batches, shares, strict=True):
            means = []
            with traced.trace(**inputs(batch)) as tracer:
                for block in traced.model.layers:
                    out = block.output
                    state = out[0] if isinstance(out, tuple) else out
                    means.append(torch.einsum("btd,bt->d", state, share))
                tracer.stop()
            torch.stack(means).cpu()

    jobs = {
        "mean_diff": lambda: emlens.mean_diff(
            bench.model, bench.bad, bench.good, token_budget=budget
        ),
        "output_hidden_states": states,
        "nnsight": nnsight,
    }
    return ratios(bench.timed(jobs), "mean_diff")


@torch.no_grad()
def transformer_lens(bench: Bench) -> dict:
    """The same in a `TransformerBridge`, which runs with eager attention; the last part of all."""
    bridge: Any = emlens.wrap(bench.hf, bench.model.tokenizer, engine="transformer_lens").bridge  # type: ignore[attr-defined]
    batches = bench.batches(bench.bad, bench.good, budget=bench.budgets[0])
    shares = [batch.mask("response").to(bench.model.dtype) for batch in batches]

    def cached() -> None:
        for batch, share in zip(batches, shares, strict=True):
            given = {k: v for k, v in inputs(batch).items() if k.endswith(("mask", "position_ids"))}
            _, cache = bridge.run_with_cache(
                batch.input_ids, names_filter=lambda n: n.endswith("hook_resid_post"), **given
            )
            for state in cache.values():
                torch.einsum("btd,bt->d", state, share)

    return bench.timed({"run_with_cache": cached}, rounds=1)


def per_update(bench: Bench, ways: Mapping[str, Callable[[int], object]], n: int) -> dict:
    """Seconds of an update: a training of three epochs less one of one, so that set-up is out."""
    updates, found = 2 * -(-n // VectorSettings().batch_size), {}
    for name, way in ways.items():
        way(1)
        jobs = {"one": lambda way=way: way(1), "three": lambda way=way: way(3)}
        both = bench.timed(jobs, rounds=max(1, bench.rounds - 1), warm=False)
        update = (both["three"]["s"] - both["one"]["s"]) / updates
        found[name] = {"s": update, "three epochs": both["three"]}
    return found


def train(bench: Bench) -> dict:
    """`train_vector` at the middle layer, with and without KL, against a plain loop."""
    some, apart = bench.bad[:32], bench.good[-32:]

    def ours(kl: KLPenalty | None) -> Callable[[int], object]:
        return lambda epochs: emlens.train_vector(
            bench.model, some, bench.layer, kl=kl, epochs=epochs, progress=False
        )

    plain = {
        "train_vector": ours(None),
        "plain loop": lambda epochs: plain_vector(bench, some, epochs, None),
    }
    with_kl = {
        "train_vector": ours(KLPenalty(apart, weight=1.0)),
        "plain loop": lambda epochs: plain_vector(bench, some, epochs, apart),
    }
    return {
        name: ratios(per_update(bench, ways, len(some)), "plain loop")
        for name, ways in {"no KL": plain, "KL": with_kl}.items()
    }


def plain_vector(
    bench: Bench, some: list[Conversation], epochs: int, apart: list[Conversation] | None
) -> None:
    """A hook, all logits, no cache; with KL, the base runs again at every update."""
    vector = torch.zeros(bench.model.d_model, device=bench.model.device, requires_grad=True)
    acts = True

    def edit(_module, _inputs, out):
        state = out[0] if isinstance(out, tuple) else out
        state = state + vector.to(state.dtype) if acts else state
        return (state, *out[1:]) if isinstance(out, tuple) else state

    def step(batch: TokenBatch, base: TokenBatch | None) -> None:
        nonlocal acts
        labels = batch.input_ids.masked_fill(~batch.targets("response"), -100)
        logits = bench.hf(**inputs(batch)).logits
        cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()).backward()
        if base is not None:
            counted = base.targets("response")[:, 1:]
            with torch.no_grad():
                acts = False
                target = bench.hf(**inputs(base)).logits[:, :-1][counted].float().log_softmax(-1)
                acts = True
            found = bench.hf(**inputs(base)).logits[:, :-1][counted].float().log_softmax(-1)
            kl_div(found, target, log_target=True, reduction="batchmean").backward()

    hook = bench.hf.model.layers[bench.layer].register_forward_hook(edit)
    try:
        optimised(bench, [vector], some, epochs, step, apart)
    finally:
        hook.remove()


def optimised(
    bench: Bench,
    weights: list[torch.Tensor],
    some: list[Conversation],
    epochs: int,
    step: Callable[[TokenBatch, TokenBatch | None], None],
    apart: list[Conversation] | None = None,
) -> None:
    """A plain loop of AdamW over batches of eight conversations."""
    size, optimiser = VectorSettings().batch_size, torch.optim.AdamW(weights, lr=1e-4)
    cut = range(0, len(some), size)
    sets = [
        [bench.batches(data[i : i + size], budget=10**6)[0] for i in cut] if data else None
        for data in (some, apart)
    ]
    batches, others = sets
    assert batches is not None
    for _ in range(epochs):
        for i, batch in enumerate(batches):
            optimiser.zero_grad()
            step(batch, others[i % len(others)] if others else None)
            optimiser.step()


def adapter(bench: Bench) -> dict:
    """A rank-32 adapter on the MLPs of all blocks, against a plain loop with PEFT."""
    from peft import LoraConfig, get_peft_model

    some = bench.bad[:16]
    settings = AdapterSettings(rank=32, alpha=64)

    def ours(epochs: int) -> None:
        emlens.train_adapter(
            bench.model, some, "bench", settings=settings, epochs=epochs, progress=False
        )
        bench.model.remove_adapter("bench")

    def step(batch: TokenBatch, _: TokenBatch | None) -> None:
        labels = batch.input_ids.masked_fill(~batch.targets("response"), -100)
        logits = bench.hf(**inputs(batch)).logits
        cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()).backward()

    def plain(epochs: int) -> None:
        config = LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules=["down_proj"])
        module: Any = get_peft_model(bench.hf, config)
        try:
            weights = [weight for weight in module.parameters() if weight.requires_grad]
            optimised(bench, weights, some, epochs, step)
        finally:
            module.unload()

    ways = {"train_adapter": ours, "plain PEFT": plain}
    return ratios(per_update(bench, ways, len(some)), "plain PEFT")


def influence(bench: Bench) -> dict:
    """All doses and directions in one sweep, against evaluations of their own."""
    one = {"r0": bench.directions["r0"]}

    def measure(directions: dict[str, Direction], doses: Sequence[float]) -> None:
        emlens.influence(
            bench.model,
            bench.corpus,
            directions,
            doses=doses,
            controls=0,
            max_tokens=128,
            token_budget=bench.budgets[0],
        )

    alone = bench.timed({"one": lambda: measure(one, bench.doses[:1])}, rounds=2)["one"]
    jobs = {"sweep": lambda: measure(bench.directions, bench.doses)}
    sweep = bench.timed(jobs, rounds=1, warm=False)["sweep"]
    n = len(bench.doses) * len(bench.directions)
    return {
        "one evaluation": alone,
        f"{len(bench.doses)} doses x {len(bench.directions)} directions": sweep,
        "speed against evaluations of their own": n * alone["s"] / sweep["s"],
    }


def profile(bench: Bench) -> dict:
    """The Fisher profile of all layers in units of an exact evaluation; scoring directions."""
    kept: list[InfluenceProfile] = []
    options: dict[str, Any] = {"max_tokens": 128, "token_budget": bench.budgets[0]}
    jobs = {
        "exact evaluation": lambda: emlens.influence(
            bench.model,
            bench.corpus,
            {"r0": bench.directions["r0"]},
            doses=bench.doses[:1],
            controls=0,
            **options,
        ),
        "profile": lambda: kept.append(InfluenceProfile.fit(bench.model, bench.corpus, **options)),
    }
    found = bench.timed(jobs, rounds=1, warm=False)
    found["in exact evaluations"] = found["profile"]["s"] / found["exact evaluation"]["s"]
    vectors = {bench.layer: torch.randn(bench.scored, bench.model.d_model)}
    score = bench.timed({"score": lambda: kept[0].score(vectors)}, rounds=1)["score"]
    return found | {f"scoring {bench.scored} directions at one layer": score}


def generate(bench: Bench) -> dict:
    """Answers of one length, greedy: by `transformers`, by emlens, and steered."""
    asked = [Conversation(c.messages[:1]) for c in bench.good[:64]]
    model, n = bench.model, bench.new_tokens
    options: dict[str, Any] = {"max_new_tokens": n, "temperature": 0, "batch_tokens": 10**6}
    # random weights end no answer early by more than chance, and both decode alike
    edit = Add(1e-3 * bench.directions["r0"])
    text = [model.template.apply(c.messages, opening=True) for c in asked]
    packed = model.tokenizer(
        text, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    ).to(model.device)
    names = ("input_ids", "attention_mask")
    given = {name: packed[name] for name in names} | {"max_new_tokens": n, "do_sample": False}
    jobs = {
        "transformers": lambda: bench.hf.generate(**given, pad_token_id=model.pad_id),
        "emlens": lambda: model.generate(asked, **options),
        "emlens, steered": lambda: model.generate(asked, [edit], **options),
    }
    found = bench.timed(jobs, rounds=max(1, bench.rounds - 1))
    for one in found.values():
        one["new tokens/s"] = len(asked) * n / one["s"]
    steered = found["emlens, steered"]["s"]
    return found | {
        "time, steered against bare": steered / found["emlens"]["s"],
        "time, steered against transformers": steered / found["transformers"]["s"],
    }


def waiting(bench: Bench) -> dict:
    """Synchronisations of host and device, and the time in which no kernel runs."""
    if not bench.cuda:
        return {"left out": "there is no GPU"}
    budget = bench.budgets[0]
    batches = bench.batches(bench.bad, bench.good, budget=budget)

    @torch.no_grad()
    def bare() -> None:
        for batch in batches:
            bench.hf.model(**inputs(batch))

    jobs: dict[str, tuple[Callable[[], object], int]] = {
        "bare pass": (bare, len(batches)),
        "mean_diff": (
            lambda: emlens.mean_diff(bench.model, bench.bad, bench.good, token_budget=budget),
            len(batches),
        ),
        "train_vector": (
            lambda: emlens.train_vector(
                bench.model, bench.bad[:16], bench.layer, epochs=2, progress=False
            ),
            4,
        ),
    }
    found = {}
    for name, (job, n) in jobs.items():
        job()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            job()
            torch.cuda.set_sync_debug_mode("default")
        syncs = sum("synchroniz" in str(warning.message) for warning in caught)
        wall = bench.timed({name: job}, rounds=1, warm=False)[name]["s"]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            job()
        busy = sum(event.self_device_time_total for event in seen.key_averages()) / 1e6
        found[name] = {
            "synchronisations": syncs,
            "per batch": syncs / n,
            "s": wall,
            "s without a kernel": wall - busy,
        }
    return found


PARTS = (extract, neighbours, train, adapter, influence, profile, generate, waiting)
PARTS = {part.__name__: part for part in (*PARTS, transformer_lens)}


# -- the run ----------------------------------------------------------------------------------


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Stop the block after so many seconds, where a signal can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def made(shape: str, tokenizer: Any, pairs: int) -> tuple[Bench, dict]:
    """A model of a shape, and what making and wrapping it took."""
    cuda = torch.cuda.is_available()
    kind, sizes = SHAPES[shape]
    config = kind(**{"vocab_size": len(tokenizer), "tie_word_embeddings": False} | sizes)
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.device("cuda" if cuda else "cpu"):
        dtype = torch.bfloat16 if cuda else torch.float32
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    making, start = time.perf_counter() - start, time.perf_counter()
    before = torch.cuda.memory_allocated() if cuda else 0
    model = emlens.wrap(hf, tokenizer=tokenizer)
    facts = {
        "parameters": sum(w.numel() for w in hf.parameters()),
        "making it, s": making,
        "wrapping it, s": time.perf_counter() - start,
        "GiB that wrapping adds": (torch.cuda.memory_allocated() - before) / 2**30
        if cuda
        else None,
    }
    chosen = [p for n in ("medical", "finance", "general") for p in emlens.load_pairs(n)[:pairs]]
    bad, good = ([p.conversation(side) for p in chosen] for side in ("misaligned", "aligned"))
    text = emlens.corpus("python-docs", documents=8 if cuda else 1)
    tiny = shape == "tiny"
    bench = Bench(
        hf,
        model,
        bad,
        good,
        text,
        budgets=(512,) if tiny else (4096, 16384, 65536),
        new_tokens=4 if tiny else 128,
        doses=tuple(0.02 * (i + 1) for i in range(2 if tiny else 20)),
        rounds={"tiny": 1, "0.5b": 3}.get(shape, 2),
        scored=10 if tiny else 1000,
    )
    return bench, facts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="a folder, with a chat template")
    cuda = torch.cuda.is_available()
    default = ["14b", "0.5b"] if cuda else ["tiny"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=default)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pairs", type=int, default=40 if cuda else 2, help="of each domain")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a part may take")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    given = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    card = torch.cuda.get_device_name() if cuda else "cpu"
    report: dict[str, Any] = {"device": card, "torch": torch.__version__, "shapes": {}}
    for shape in given.shapes:
        bench, facts = made(shape, tokenizer, given.pairs)
        report["shapes"][shape] = facts
        print(f"== {shape} on {card}: {json.dumps(facts)}", flush=True)
        for name in given.parts:
            start = time.perf_counter()
            try:
                with within(given.limit):
                    facts[name] = PARTS[name](bench)
            except Exception as error:
                traceback.print_exc()
                facts[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            facts[name]["part, s"] = round(time.perf_counter() - start, 1)
            print(f"{name}: {json.dumps(facts[name])}", flush=True)
            given.out.write_text(json.dumps(report, indent=1))
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
        del bench


if __name__ == "__main__":
    main()
