"""What every process of a launch runs: measures that are shared, and what each one read.

`python -m tests.support.shares FOLDER` under a launcher; `measure` alone gives the reference.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file

import emlens
from emlens import Add, Direction, _progress
from emlens.directions import (
    CONSTRUCTIONS,
    edit_diff,
    extract_all,
    model_diff,
    reader,
    residual_norm,
)
from emlens.hooked import HookedModel, response_losses
from emlens.hooked.edit import Where
from emlens.hooked.sites import Site
from emlens.text import Conversation, Corpus, Document
from tests.support.data import conversations, pairs
from tests.support.models import tiny_hooked

GOOD, BAD = conversations("good", 7), conversations("bad", 9)
MORE = conversations("good", 14), conversations("bad", 14)
TEXT = Corpus(
    "words", tuple(Document(f"d{i}", "the rain came and then " * (i + 1)) for i in range(5))
)
BUDGET = 60
FEW = {"layers": [1, 2], "token_budget": BUDGET}
SAMPLED = 40
"""Tokens whose norms are kept: fewer than there are, so that the sample is a real one."""


@dataclass(frozen=True)
class Odd:
    """An edit that changes nothing, and fails in one process."""

    site: Site = "resid_post"
    layers: tuple[int, ...] = (0,)
    where: Where = "all"

    def delta(self, residual, layer):
        if os.environ.get("RANK") == "1":
            raise ZeroDivisionError("no such thing")
        return torch.zeros_like(residual)


def direction(seed: int = 0) -> Direction:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return Direction.of(3 * vector / vector.norm(), 1, residual_norm=10.0)


def measure(model: HookedModel, folder: Path) -> dict[str, list[str]]:
    """Write every measure into `folder`; return the batches that were run for each."""
    folder.mkdir(parents=True)
    ran: dict[str, list[str]] = {}
    two = {"a": direction(1), "b": direction(2)}
    conditions = {"base": [], "a": [Add(two["a"])]}

    def keep(name: str, make: Callable):
        with recorded(model) as seen, patch.object(reader, "NORM_TOKENS", SAMPLED):
            found = make()
        ran[name] = sorted(set(seen))
        return found

    for weighting in ("token", "conversation"):
        found = keep(
            f"mean_diff_{weighting}",
            lambda w=weighting: emlens.mean_diff(
                model, BAD, GOOD, weighting=w, seed=3, token_budget=BUDGET
            ),
        )
        found.save(folder / f"mean_diff_{weighting}.safetensors")
    one_batch = keep("one batch", lambda: emlens.mean_diff(model, BAD[:3], GOOD[:3]))
    one_batch.save(folder / "one_batch.safetensors")
    moved = keep("edit_diff", lambda: edit_diff(model, BAD, conditions["a"], token_budget=BUDGET))
    moved.save(folder / "edit_diff.safetensors")
    many = keep(
        "extract_all", lambda: extract_all(model, *MORE, constructions=CONSTRUCTIONS, **FEW)
    )
    for name, found in many.items():
        found.save(folder / f"extract_all {name}.safetensors")
    paired = keep("model_diff", lambda: model_diff(model, tiny_hooked("llama", seed=4), BAD, **FEW))
    paired.save(folder / "model_diff.safetensors")
    counting = reader.Counting(token_budget=BUDGET)
    reads = reader.Reader((0, 2), "resid_post", counting)
    parts = keep("moments", lambda: reads.read(reader.side_of(model), BAD, "positive").parts)
    names = ("total", "total2", "square")
    sums = {f"{name} {i}": getattr(part, name) for i, part in enumerate(parts) for name in names}
    save_file(sums, folder / "moments.safetensors")
    results = {
        "log_odds": lambda: emlens.log_odds(model, pairs(7), conditions, token_budget=BUDGET),
        "efficiency": lambda: emlens.efficiency(
            model, BAD, two, factors=(0, 1), token_budget=BUDGET
        ),
        "stability": lambda: emlens.stability(
            model, BAD, two, epsilons=(0.3,), seeds=2, token_budget=BUDGET
        ),
        "influence": lambda: emlens.influence(
            model, TEXT, two, doses=(0.1,), controls=1, token_budget=BUDGET
        ),
        "log_odds_one_batch": lambda: emlens.log_odds(model, pairs(2), conditions),
    }
    for name, make in results.items():
        keep(name, make).save(folder / f"{name}.json")
    norms = keep("residual_norm", lambda: residual_norm(model, GOOD, [0, 2], token_budget=BUDGET))
    batches = model.batches(GOOD, token_budget=BUDGET)
    sums, counts = keep("response_losses", lambda: response_losses(model, batches))
    plain = {"norms": list(norms.values()), "sums": sums.tolist(), "counts": counts.tolist()}
    (folder / "plain.json").write_text(json.dumps(plain))
    return ran


@contextmanager
def recorded(model: HookedModel) -> Iterator[list[str]]:
    """The tokens of every batch that the model runs inside the block."""
    seen: list[str] = []
    run = model._run

    def running(batch, *args, **options):
        seen.append(str(batch.input_ids.tolist()))
        return run(batch, *args, **options)

    with patch.object(model, "_run", running):
        yield seen


def errors(model: HookedModel, rank: int) -> dict[str, str]:
    """What is raised in this process when something goes wrong in one of them."""
    answers = [*(c.response for c in BAD), "yes"]
    data = [Conversation.of(f"tell me {i}", text, id=f"c{i}") for i, text in enumerate(answers)]
    yes = model.tokenizer.convert_tokens_to_ids("yes")

    def spoil(_module, inputs, output):
        return output.masked_fill((inputs[0] == yes).any(-1)[:, None, None], float("nan"))

    mine, another = GOOD[rank:], tiny_hooked("llama", seed=rank)
    word = ("rain", "sun")[rank]
    other = [Conversation.of("tell me", f"the {word} came", id="same name")]
    wrong = {
        "edit": lambda: emlens.mean_diff(model, BAD, GOOD, edits=[Odd()], token_budget=BUDGET),
        "data": lambda: emlens.mean_diff(model, BAD, mine, token_budget=BUDGET),
        "words": lambda: emlens.mean_diff(model, other, GOOD, token_budget=BUDGET),
        "weights": lambda: emlens.mean_diff(another, BAD, GOOD, token_budget=BUDGET),
        "call": lambda: emlens.log_odds(model, pairs(7), {f"rank {rank}": []}),
        "activation": lambda: emlens.mean_diff(model, data, GOOD, token_budget=BUDGET),
        "loss": lambda: emlens.efficiency(
            model, data, {"a": direction()}, factors=(0, 1), token_budget=BUDGET
        ),
    }
    raised = {}
    for name, call in wrong.items():
        hook = None
        if name in ("activation", "loss"):
            hook = model.module.get_input_embeddings().register_forward_hook(spoil)
        try:
            call()
        except Exception as error:
            raised[name] = f"{type(error).__name__}: {error}"
        finally:
            if hook is not None:
                hook.remove()
    return raised


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    model = tiny_hooked("llama")
    record: dict[str, object] = {"errors": errors(model, rank)}
    record["ran"] = measure(model, folder / str(rank))
    screen = io.StringIO()
    _progress.watched, _progress.DELAY = lambda: True, 0
    with redirect_stderr(screen):
        found = emlens.mean_diff(model, BAD, GOOD, token_budget=BUDGET, progress=True)
        emlens.log_odds(model, pairs(7), token_budget=BUDGET, progress=True)
    record["screen"] = screen.getvalue()
    for _ in range(20):
        found.save(folder / "together.safetensors")
    if rank == 0:
        trained, _ = emlens.train_vector(
            model, GOOD[:2], 1, site="mlp_out", epochs=1, progress=False
        )
        trained.save(folder / "trained.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
