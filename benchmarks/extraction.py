"""Extraction against a bare forward pass over the same batches, and its peak memory.

Prints tokens per second of both and their ratio, and the time of several constructions from one
pass against that of the mean difference alone, measured alternately in one run; and the peak
memory of extraction over 1x, 10x and 100x the data, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch
from memory import peak_mb
from transformers import AutoModelForCausalLM

import emlens
from emlens import Conversation
from emlens.directions import extract_all
from emlens.hooked.embedded import embedded_model_path

PAIRS = 32
PEAK_PAIRS = 24
PEAK_BUDGET = 1024
"""Padded tokens of a batch: few, so that 1x fills one as well."""


def conversations(copies: int) -> tuple[list, list]:
    """Both sides of the embedded medical set, repeated."""
    pairs = emlens.load_pairs("medical")[:PAIRS] * copies
    sides = ("misaligned", "aligned")
    return tuple([pair.conversation(side) for pair in pairs] for side in sides)


def short_conversations(copies: int) -> tuple[list, list]:
    """The beginnings of such conversations, so that 100x is read in minutes."""
    return tuple(
        [
            Conversation.of(
                *(" ".join(text.split()[:8]) for text in (c.messages[0]["content"], c.response))
            )
            for c in side[:PEAK_PAIRS]
        ]
        * copies
        for side in conversations(1)
    )


def bare_seconds(body, model, data) -> float:
    """The decoder's own forward pass over the same batches, LM head left out."""
    start = time.perf_counter()
    with torch.no_grad():
        for side in data:
            for batch in model.batches(side):
                body(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    position_ids=batch.position_ids,
                    use_cache=False,
                )
    return time.perf_counter() - start


def extraction_seconds(model, data) -> float:
    start = time.perf_counter()
    emlens.mean_diff(model, *data)
    return time.perf_counter() - start


def all_seconds(model, data) -> float:
    """The constructions that `extract_all` builds by default."""
    start = time.perf_counter()
    extract_all(model, *data)
    return time.perf_counter() - start


def peak_megabytes(copies: int) -> float:
    """Peak memory of an extraction in a fresh process."""
    command = [sys.executable, __file__, "--peak", str(copies)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", type=int, help="(inner) extract this many copies of the data")
    arguments = parser.parse_args()
    model = emlens.load("smollm2-135m-instruct")
    if arguments.peak:
        emlens.mean_diff(model, *short_conversations(arguments.peak), token_budget=PEAK_BUDGET)
        print(peak_mb())
        return
    data = tuple(side * 2 for side in conversations(1))
    n_tokens = sum(batch.n_tokens for side in data for batch in model.batches(side))
    body = AutoModelForCausalLM.from_pretrained(embedded_model_path()).eval().base_model
    bare_seconds(body, model, data)
    bare, ours, several = [], [], []
    for _ in range(arguments.rounds):
        bare.append(bare_seconds(body, model, data))
        ours.append(extraction_seconds(model, data))
        several.append(all_seconds(model, data))
    print(f"tokens: {n_tokens}, layers read: {model.n_layers}")
    print(f"bare forward: {n_tokens / min(bare):8.0f} tokens/s")
    print(f"extraction:   {n_tokens / min(ours):8.0f} tokens/s")
    ratios = [b / o for b, o in zip(bare, ours, strict=True)]
    print(f"ratio: best {min(bare) / min(ours):.3f}, each round {[round(r, 3) for r in ratios]}")
    print(f"extract_all against mean_diff: {min(several) / min(ours):.3f} of its time")
    one = peak_megabytes(1)
    for copies in (1, 10, 100):
        peak = peak_megabytes(copies)
        n = 2 * PEAK_PAIRS * copies
        print(f"peak memory: {peak:.0f} MB for {n} conversations ({peak / one:.3f}x)")


if __name__ == "__main__":
    main()
