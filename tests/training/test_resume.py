"""A run that was interrupted ends as it would have, bit for bit."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from emlens import Conversation, Direction, Directions, KLPenalty, train_vector
from emlens.directions import Provenance
from emlens.training import (
    AnchorPenalty,
    NormPenalty,
    ProjectionPenalty,
    TrainingRun,
    VectorSettings,
    train_adapter,
    train_weights,
)
from tests.support.data import conversations, pairs
from tests.support.kills import KILLS, files, killed
from tests.support.models import tiny_hooked

TRAIN, ELSEWHERE = conversations("bad", 7), conversations("good", 5)
HELD_OUT = [
    Conversation.of("how", "fruit walk day fruit"),
    Conversation.of("what", "walk fruit each day"),
]
"""Words that are not trained on, which before long become less likely."""

SETTINGS = {"epochs": 4, "batch_size": 2, "accumulate": 2, "seed": 3, "progress": False}


def vector_run(checkpoint=None, **options) -> TrainingRun:
    options = {**SETTINGS, "checkpoint_every": 1, **options}
    kl = KLPenalty(ELSEWHERE, weight=0.5, batch_size=2)
    layers = options.pop("layers", [1, 2])
    return train_vector(
        tiny_hooked("llama"), TRAIN, layers, kl=kl, checkpoint=checkpoint, **options
    )[1]


def adapter_run(checkpoint=None, **options) -> TrainingRun:
    options = {**SETTINGS, "checkpoint_every": 1, "record_every": 1, "lr": 1e-2, **options}
    options.setdefault("penalties", [AnchorPenalty(pairs(5), 0.5, batch_size=1)])
    return train_adapter(
        tiny_hooked("llama"), TRAIN, "x", layers=[1], checkpoint=checkpoint, **options
    )


def weights_run(checkpoint=None, **options) -> TrainingRun:
    """The finetuned weights take the place of the path, which is not recorded."""
    model = tiny_hooked("llama")
    kl = KLPenalty(ELSEWHERE, weight=0.5, batch_size=2)
    options = {**SETTINGS, "checkpoint_every": 2, "lr": 1e-3, **options}
    run = train_weights(model, TRAIN, kl=kl, checkpoint=checkpoint, **options)
    weights = {name: w.detach()[None] for name, w in model.module.named_parameters()}
    return replace(run, states={name: w.clone() for name, w in weights.items()})


RUNS = {"vector": vector_run, "adapter": adapter_run, "weights": weights_run}


def train(folder: Path, kind: str) -> None:
    RUNS[kind](folder / "checkpoint.safetensors").save(folder / "run.safetensors")


def train_and_die(folder: Path, kind: str) -> None:
    """The same, but the first three processes end while they write a checkpoint."""
    plain, writings = os.replace, count()
    dead = len(list(folder.parent.glob("dead *")))

    def replaced(source, target, **options):
        if Path(target).stem == "checkpoint" and dead < 3 and next(writings) == dead:
            (folder.parent / f"dead {dead}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(source, target, **options)

    os.replace = replaced
    train(folder, kind)


@pytest.mark.parametrize("kind", RUNS)
def test_a_training_killed_at_random_times_ends_bit_identical(kind, tmp_path):
    left = killed(train, tmp_path, kind)
    whole = files(left.whole)
    assert left.kills >= KILLS
    assert all(files(end) == whole for end in left.ends)


def test_a_training_killed_while_it_writes_a_checkpoint_ends_bit_identical(tmp_path):
    left = killed(train_and_die, tmp_path, "vector", kills=0)
    assert left.kills == 3
    whole = vector_run()
    again = TrainingRun.load(left.ends[0] / "run.safetensors")
    assert again.steps == whole.steps
    assert again.path_steps == whole.path_steps
    assert again.states.keys() == whole.states.keys()
    assert all(torch.equal(states, again.states[name]) for name, states in whole.states.items())
    assert sorted(files(left.ends[0])) == ["checkpoint.safetensors", "run.safetensors"]


def test_a_finished_run_is_read_from_its_checkpoint(tmp_path):
    first = vector_run(tmp_path / "c")
    again = vector_run(tmp_path / "c")
    assert again.steps == first.steps
    assert all(torch.equal(again.states[name], first.states[name]) for name in first.states)


def test_an_early_stop_is_the_same_after_a_break(tmp_path):
    options = {"validation": HELD_OUT, "patience": 1, "lr": 0.4, "epochs": 8}
    whole = vector_run(**options)
    assert len(whole.steps) < 16
    best = min(step.validation for step in whole.steps if step.validation is not None)
    assert whole.steps[-1].validation > best
    kept = vector_run(tmp_path / "c", **options)
    again = vector_run(tmp_path / "c", **options)
    for run in (kept, again):
        assert run.steps == whole.steps
        assert torch.equal(run.directions()[1].vector, whole.directions()[1].vector)


def test_the_best_vector_is_the_one_returned():
    options = {"validation": HELD_OUT, "patience": 1, "lr": 0.4, "epochs": 8}
    run = vector_run(**options)
    ends = [step.step + 1 for step in run.steps if step.validation is not None]
    values = [step.validation for step in run.steps if step.validation is not None]
    best = ends[values.index(min(values))]
    at_best = run.path_steps.index(best)
    assert torch.equal(run.states["vector.1"][-1], run.states["vector.1"][at_best])


START = Directions({n: torch.ones(32) for n in (1, 2)}, "resid_post", Provenance("given"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.01}, "lr"),
        ({"seed": 4}, "seed"),
        ({"layers": [1]}, "layers"),
        ({"settings": VectorSettings(weight_decay=0.1)}, "weight_decay"),
        ({"penalties": [NormPenalty(1.0)]}, "penalties"),
        ({"initial": START}, "start"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_with_what_differs(change, words, tmp_path):
    ours, other = {"epochs": 1}, {"epochs": 1, **change}
    for number, (first, second) in enumerate(((ours, other), (other, ours))):
        vector_run(tmp_path / f"{number}", **first)
        with pytest.raises(ValueError, match=rf"was made with other settings .*{words}.* there"):
            vector_run(tmp_path / f"{number}", **second)


def test_a_checkpoint_is_of_its_own_vectors_and_of_its_own_validation_set(tmp_path):
    first, second = (Direction.of(torch.eye(32)[i], 1) for i in range(2))
    penalties = [[ProjectionPenalty(one, weight=5.0)] for one in (first, second)]
    vector_run(tmp_path / "a", epochs=1, penalties=penalties[0])
    vector_run(tmp_path / "a", epochs=1, penalties=penalties[0])
    with pytest.raises(ValueError, match=r"was made with other settings .*penalties.* there"):
        vector_run(tmp_path / "a", epochs=1, penalties=penalties[1])
    watched = {"epochs": 1, "patience": 1}
    adapter_run(tmp_path / "b", validation=HELD_OUT, **watched)
    run = adapter_run(tmp_path / "b", validation=HELD_OUT, **watched)
    assert run.provenance.n["validation"] == 2
    with pytest.raises(
        ValueError, match=r"was made with other settings .*data\.validation: .* there"
    ):
        adapter_run(tmp_path / "b", validation=HELD_OUT[::-1], **watched)


def test_a_truncated_checkpoint_is_refused_by_name(tmp_path):
    vector_run(tmp_path / "c", epochs=1)
    data = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="c is not a readable safetensors file"):
        vector_run(tmp_path / "c", epochs=1)


@pytest.mark.parametrize("name", ["parameter|", "moment|", "best|"])
def test_a_checkpoint_with_smaller_tensors_is_refused_and_not_spread_over_the_parameters(
    tmp_path, name
):
    path, watched = tmp_path / "c", {"epochs": 1, "validation": HELD_OUT, "patience": 1}
    vector_run(path, **watched)
    tensors = load_file(path)
    key = next(key for key in tensors if key.startswith(name) and not key.endswith("/step"))
    with safe_open(path, framework="pt") as file:
        kept = file.metadata()
    save_file({**tensors, key: tensors[key].flatten()[:1].clone()}, path, metadata=kept)
    with pytest.raises(ValueError, match="holds no whole training checkpoint: .* has shape"):
        vector_run(path, **watched)
