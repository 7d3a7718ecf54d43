"""What the engines cost on top of the forward passes that they run.

For both engines, measured alternately in one run: pooled reads of all layers against the bare
pass that stops at the same block, steered generation against the bare `generate`, a resumed pass
against a whole one; and the memory that wrapping a loaded model adds. The bare passes of
TransformerLens are the bridge's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from memory import peak_mb
from transformers import AutoModelForCausalLM, AutoTokenizer

import emlens
from emlens.hooked.embedded import embedded_model_path
from emlens.text import Conversation

ENGINES = ("nnsight", "transformer_lens")
NEW_TOKENS = 48


def load_bare():
    path = embedded_model_path()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def compared(rounds: int, **calls: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each call, in alternation; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def report(what: str, seconds: dict[str, list[float]], ours: str, bare: str) -> None:
    ratios = [a / b for a, b in zip(seconds[ours], seconds[bare], strict=True)]
    best = min(seconds[ours]) / min(seconds[bare])
    print(
        f"  {what}: {bare} {min(seconds[bare]):.3f} s, {ours} {min(seconds[ours]):.3f} s; "
        f"ratio best {best:.3f}, median of rounds {statistics.median(ratios):.3f}",
        flush=True,
    )


@torch.no_grad()
def measure(engine: str, rounds: int) -> None:
    bare, tokenizer = load_bare()
    model = emlens.wrap(bare, tokenizer, engine=engine)  # type: ignore[arg-type]
    pairs = emlens.load_pairs("medical")[:24]
    batches = model.batches([pair.conversation("aligned") for pair in pairs])
    n_tokens = sum(batch.n_tokens for batch in batches)
    last = model.n_layers - 2
    layers = range(last + 1)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    # so small that the answers, and with them the work, are those of the bare model
    edit = emlens.Add(emlens.Direction.of(1e-6 * vector, 15))
    print(f"{engine}: {len(batches)} batches of {n_tokens} tokens in all", flush=True)

    def inputs(batch) -> dict:
        return {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}

    def truncated() -> None:
        for batch in batches:
            if engine == "transformer_lens":
                bridge = model.bridge  # type: ignore[attr-defined]
                bridge(batch.input_ids, stop_at_layer=last + 1, **inputs(batch))
                continue
            hook = bare.model.layers[last].register_forward_hook(stop)
            try:
                bare(input_ids=batch.input_ids, use_cache=False, **inputs(batch))
            except Stopped:
                hook.remove()

    def pooled() -> None:
        for batch in batches:
            model.residuals(batch, layers, pool=lambda residual: residual.sum(1))

    report("pooled reads", compared(rounds, bare=truncated, emlens=pooled), "emlens", "bare")

    prompts = [Conversation.of(pair.prompt) for pair in pairs[:8]]
    rows = model.generate  # the whole of it: tokenising, packing and decoding included
    text = [
        tokenizer.apply_chat_template(p.messages, tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    packed = tokenizer(
        text, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    module = model.module if engine == "transformer_lens" else bare
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}

    def plain_generate() -> None:
        module.generate(**packed, **settings, pad_token_id=model.pad_id)

    def steered() -> None:
        rows(prompts, [edit], max_new_tokens=NEW_TOKENS, temperature=0)

    report("generation", compared(rounds, bare=plain_generate, steered=steered), "steered", "bare")

    batch = batches[0]
    residual = model.residuals(batch, 15)[15]
    seconds = compared(
        rounds,
        whole=lambda: model.hidden(batch, [edit]),
        resumed=lambda: model.hidden(batch, [edit], resume=(15, residual)),
    )
    report("resume after layer 15 of 30", seconds, "resumed", "whole")


class Stopped(Exception):
    """Ends the bare truncated pass."""


def stop(*_) -> None:
    raise Stopped


def memory(engine: str) -> None:
    """Print the peak memory of this process before and after wrapping, in MB."""
    bare, tokenizer = load_bare()
    with torch.no_grad():
        bare(input_ids=torch.ones(2, 8, dtype=torch.long))
    import transformer_lens.model_bridge  # noqa: F401  code is not weights

    before = peak_mb()
    model = emlens.wrap(bare, tokenizer, engine=engine)  # type: ignore[arg-type]
    weights = sum(w.numel() * w.element_size() for w in model.module.parameters()) / 2**20
    print(json.dumps([before, peak_mb(), weights]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", help="(inner) measure the memory of wrapping on this engine")
    arguments = parser.parse_args()
    if arguments.memory:
        memory(arguments.memory)
        return
    for engine in ENGINES:
        measure(engine, arguments.rounds)
        command = [sys.executable, __file__, "--memory", engine]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        before, after, weights = json.loads(done.stdout.splitlines()[-1])
        print(
            f"  peak memory: {before:.0f} MB loaded, {after:.0f} MB wrapped and checked "
            f"({after / before:.3f}x; weights {weights:.0f} MB)",
            flush=True,
        )


if __name__ == "__main__":
    main()
