"""What batched generation costs on top of `transformers`, and what batching saves.

The same 32 questions in the same batches, measured alternately in one run: emlens against the
bare model's `generate`, greedily (the tokens are equal, which is checked) and sampled at
temperature 1 (per decoding step); with and without an edit; and against one question at a time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM

import emlens
from emlens.directions import residual_norm
from emlens.hooked.embedded import embedded_model_path
from emlens.text import pack, tokenize

LAYER = 15


def compared(rounds: int, **calls: Callable[[], int]) -> dict[str, list[float]]:
    """Seconds per decoding step of each call, in alternation; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            steps = call()
            seconds[name].append((time.perf_counter() - start) / steps)
    return {name: values[1:] for name, values in seconds.items()}


def report(what: str, seconds: dict[str, list[float]], bare: str) -> None:
    for name, values in seconds.items():
        if name != bare:
            rounds = [b / a for a, b in zip(values, seconds[bare], strict=True)]
            print(
                f"{what}, {name}: {1000 * min(values):.0f} ms/step against "
                f"{1000 * min(seconds[bare]):.0f} ms/step of {bare}; speed "
                f"{min(seconds[bare]) / min(values):.3f} of it "
                f"(median of rounds {statistics.median(rounds):.3f})",
                flush=True,
            )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = emlens.load("smollm2-135m-instruct")
    bare = AutoModelForCausalLM.from_pretrained(embedded_model_path()).eval()
    questions = [pair.prompt for pair in emlens.load_pairs("general")[: arguments.answers]]
    asked = [emlens.Conversation.of(text) for text in questions]
    rows = tokenize(asked, model.tokenizer, generation_prompt=True)
    (batch,) = pack(rows, token_budget=10**9, padding_side="left", pad_id=model.pad_id)
    norm = residual_norm(model, asked, LAYER)[LAYER]
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    edit = emlens.Add(emlens.Direction.of(0.05 * norm * vector / vector.norm(), layer=LAYER))
    n = arguments.tokens
    last: dict[str, list[str]] = {}

    def ours(name: str, temperature: float, *edits) -> int:
        last[name] = model.generate(
            asked, edits, max_new_tokens=n, temperature=temperature, batch_tokens=10**9
        )
        return _steps(model, last[name], n)

    def theirs(name: str, **options) -> int:
        ids = bare.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=n,
            pad_token_id=model.pad_id,
            **options,
        )[:, batch.input_ids.shape[1] :]
        texts = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
        last[name] = [texts[batch.index.index(i)] for i in range(len(asked))]
        return ids.shape[1]

    def one_at_a_time() -> int:
        for question in asked:
            model.generate([question], max_new_tokens=n, temperature=0)
        return _steps(model, last["emlens"], n)

    greedy = compared(
        arguments.rounds,
        emlens=lambda: ours("emlens", 0),
        steered=lambda: ours("steered", 0, edit),
        bare=lambda: theirs("bare", do_sample=False),
    )
    same = sum(a == b for a, b in zip(last["emlens"], last["bare"], strict=True))
    print(f"greedy answers equal to the bare model's: {same} of {len(asked)}")
    report("greedy", greedy, "bare")
    sampled = compared(
        arguments.rounds,
        emlens=lambda: ours("sampled", 1.0),
        bare=lambda: theirs("bare sampled", do_sample=True, temperature=1.0, top_k=0),
    )
    report("temperature 1", sampled, "bare")
    start = time.perf_counter()
    steps = one_at_a_time()
    alone = time.perf_counter() - start
    together = min(greedy["emlens"]) * steps
    print(
        f"{len(asked)} answers one at a time {alone:.1f} s, batched {together:.1f} s: "
        f"{alone / together:.2f}x"
    )


def _steps(model, answers: list[str], most: int) -> int:
    """Decoding steps of one batch: its longest answer, and its end."""
    lengths = [len(model.tokenizer(text, add_special_tokens=False).input_ids) for text in answers]
    return min(most, max(lengths) + 1)


if __name__ == "__main__":
    main()
