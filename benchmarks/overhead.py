"""What emlens itself costs: models so small that a pass takes next to no time.

    python benchmarks/overhead.py [--shapes 4x64 48x64 24x1024] [--rounds 5] [--profile]

What a fast device would show is seen here on the CPU. For each shape the parts of `mean_diff` are
timed beside a bare pass of the decoder over the same batches, and decoding with and without an
edit beside the model's own `generate`; all alternately, best of some rounds. `--profile` prints
the functions that take the most time.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import emlens
from emlens import Add, Conversation, Direction
from emlens.directions.build import difference, provenance, read_sides
from emlens.directions.held_out import prompts_of
from emlens.directions.reader import Counting
from emlens.hooked.embedded import embedded_model_path
from emlens.text import pack, tokenize

# layers x width; the wide one has hardly an MLP, so that the statistics show
SHAPES = {"4x64": (4, 64, 128), "48x64": (48, 64, 128), "24x1024": (24, 1024, 64)}
PAIRS = {"4x64": 24, "48x64": 24, "24x1024": 12}
NEW_TOKENS = 32


def tiny(shape: str, tokenizer) -> tuple[emlens.HookedModel, torch.nn.Module]:
    """A random model, hooked, and its bare module."""
    layers, width, inner = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
    )
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config).eval()
    return emlens.wrap(module, tokenizer=tokenizer, check=False), module


def extraction(model: emlens.HookedModel, module, pairs: int) -> tuple[dict, int, int]:
    """The parts of `mean_diff`, the number of tokens and that of batches."""
    chosen = emlens.load_pairs("medical")[:pairs]
    sides = [[pair.conversation(side) for pair in chosen] for side in ("misaligned", "aligned")]
    rows = [tokenize(side, model.template) for side in sides]
    batches = [batch for side in sides for batch in model.batches(side)]
    counting = Counting()
    reader, readings = read_sides(model, *sides, "resid_post", "all", counting)
    made = provenance("mean-diff", model, counting, positive=sides[0], negative=sides[1])
    groups = prompts_of(sides[0]), prompts_of(sides[1])

    @torch.no_grad()
    def bare() -> None:
        for batch in batches:
            module.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )

    def hooks() -> None:
        for batch in batches:
            share = batch.mask("response").float()
            share = share / share.sum(1, keepdim=True).clamp(min=1)
            model.residuals(batch, "all", pool=lambda x, s=share: torch.einsum("btd,bt->bd", x, s))

    jobs = {
        "bare pass": bare,
        "tokenising": lambda: [tokenize(side, model.template) for side in sides],
        "packing": lambda: [pack(of_side, token_budget=2048) for of_side in rows],
        "pass with pooling": hooks,
        "reading (tokens to moments)": lambda: read_sides(
            model, *sides, "resid_post", "all", counting
        ),
        "statistics at the end": lambda: difference(reader, *readings, made, groups),
        "mean_diff": lambda: emlens.mean_diff(model, *sides),
    }
    return jobs, sum(batch.n_tokens for batch in batches), len(batches)


def decoding(model: emlens.HookedModel, module) -> dict[str, Callable[[], object]]:
    """Answers to eight prompts: by the model itself, by emlens, and under an edit."""
    asked = [Conversation(p.conversation("aligned").messages[:1]) for p in prompts()]
    batch = pack(
        tokenize(asked, model.template, generation_prompt=True),
        token_budget=10**6,
        padding_side="left",
        pad_id=model.pad_id,
    )[0]
    edit = Add(Direction.of(torch.randn(model.d_model), model.n_layers // 2))
    options: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "temperature": 0,
        "batch_tokens": 10**6,
    }
    return {
        "transformers": lambda: module.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=model.tokenizer.eos_token_id,
            pad_token_id=model.pad_id,
        ),
        "emlens": lambda: model.generate(asked, **options),
        "emlens, steered": lambda: model.generate(asked, [edit], **options),
    }


def prompts() -> list:
    return emlens.load_pairs("medical")[:8]


def best_of(jobs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each job, the best of alternating rounds after one to warm up."""
    best = dict.fromkeys(jobs, float("inf"))
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def profiled(name: str, job: Callable[[], object]) -> None:
    """Print the functions in which a job spends its time."""
    profiler = cProfile.Profile()
    profiler.runcall(job)
    print(f"-- {name}")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    for shape in arguments.shapes:
        model, module = tiny(shape, tokenizer)
        jobs, n_tokens, n_batches = extraction(model, module, PAIRS[shape])
        best = best_of(jobs, arguments.rounds)
        bare = best["bare pass"]
        print(f"== {shape}: {n_tokens} tokens, {n_batches} batches")
        for name, seconds in best.items():
            each = f"{1e6 * seconds / n_tokens:8.1f} us/token {1e6 * seconds / n_batches:9.0f}"
            print(f"{name:30}{each} us/batch  {bare / seconds:6.3f} of bare")
        steps = decoding(model, module)
        best = best_of(steps, arguments.rounds)
        own = best["transformers"]
        for name, seconds in best.items():
            step = f"{1e6 * seconds / NEW_TOKENS:8.0f} us/step"
            print(f"decoding, {name:20}{step}  {seconds / own:6.3f} of transformers")
        print(f"steered against bare: {best['emlens, steered'] / best['emlens']:.3f}")
        if arguments.profile:
            profiled("mean_diff", jobs["mean_diff"])
            profiled("decoding, steered", steps["emlens, steered"])


if __name__ == "__main__":
    main()
