"""Several processes: the same results as one, shares that do not overlap, errors that arrive."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emlens import Directions, _distributed
from emlens.directions import CONSTRUCTIONS, reader, residual_norm
from emlens.measures import Efficiency, Influence, LogOdds, Stability
from emlens.text import pack, tokenize
from tests.support import shares
from tests.support.models import tiny_hooked

ROOT = Path(__file__).parent.parent
LIMIT = 240
"""Seconds until a launch counts as one that hangs."""
MEAN_DIFFS = ("mean_diff_token", "mean_diff_conversation", "one_batch")
ONE_BATCH = {"one batch": 2, "log_odds_one_batch": 1}
"""Batches of what is too small to share: one a side, or one in all."""


@dataclass(frozen=True)
class Launch:
    """What two processes left behind, and what one does.

    Attributes:
        folder: Files of the two processes.
        alone: Files of the single process.
        ran: Batches that the single process ran, by measure.
        ranks: The records of the two processes.
    """

    folder: Path
    alone: Path
    ran: dict[str, list[str]]
    ranks: list[dict]


@pytest.fixture(scope="module")
def launch(tmp_path_factory) -> Launch:
    folder = tmp_path_factory.mktemp("two") / "files"
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    done = subprocess.run(
        [sys.executable, *command, "-m", "tests.support.shares", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = tmp_path_factory.mktemp("one") / "files"
        ran = shares.measure(tiny_hooked("llama"), alone)
    finally:
        torch.set_num_threads(threads)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return Launch(folder, alone, ran, ranks)


def test_every_file_is_the_same_in_both_processes(launch):
    names = {path.name for path in launch.alone.iterdir()}
    assert len(names) == 12 + len(CONSTRUCTIONS)
    for name in names:
        first, second = (launch.folder / str(rank) / name for rank in (0, 1))
        assert first.read_bytes() == second.read_bytes(), name


@pytest.mark.parametrize("name", MEAN_DIFFS)
def test_mean_diff_of_two_processes_is_that_of_one(launch, name):
    one = Directions.load(launch.alone / f"{name}.safetensors")
    two = Directions.load(launch.folder / "0" / f"{name}.safetensors")
    assert two.provenance == one.provenance
    assert two.layers == one.layers == (0, 1, 2, 3)
    assert two.residual_norms == one.residual_norms
    for layer in one.layers:
        assert torch.allclose(two.vectors[layer], one.vectors[layer], rtol=1e-6, atol=1e-9)
        errors = two.standard_errors[layer], one.standard_errors[layer]
        assert torch.allclose(*errors, rtol=1e-6, atol=1e-9)
        assert two.split_half[layer] == pytest.approx(one.split_half[layer], abs=1e-9)
        assert torch.equal(two.shuffled[layer], one.shuffled[layer])
    assert two.auroc == one.auroc


@pytest.mark.parametrize("name", ["model_diff", *(f"extract_all {n}" for n in CONSTRUCTIONS)])
def test_a_construction_of_two_processes_is_that_of_one(launch, name):
    one = Directions.load(launch.alone / f"{name}.safetensors")
    two = Directions.load(launch.folder / "0" / f"{name}.safetensors")
    assert two.provenance == one.provenance
    assert two.auroc == one.auroc
    for layer in (1, 2):
        assert torch.allclose(two.vectors[layer], one.vectors[layer], rtol=1e-6, atol=1e-9)


def test_moments_of_two_processes_are_those_of_one(launch):
    one = load_file(launch.alone / "moments.safetensors")
    two = load_file(launch.folder / "0" / "moments.safetensors")
    for name, value in one.items():
        size = float(value.abs().max())
        assert size > 0
        assert float((two[name] - value).abs().max()) <= 1e-12 * size, name


def test_edit_diff_of_two_processes_is_that_of_one(launch):
    one = Directions.load(launch.alone / "edit_diff.safetensors")
    two = Directions.load(launch.folder / "0" / "edit_diff.safetensors")
    assert two.residual_norms == one.residual_norms
    for layer in one.layers:
        assert torch.allclose(two.vectors[layer], one.vectors[layer], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (LogOdds, "log_odds"),
        (LogOdds, "log_odds_one_batch"),
        (Efficiency, "efficiency"),
        (Stability, "stability"),
        (Influence, "influence"),
    ],
)
def test_a_measure_of_two_processes_is_that_of_one_to_the_bit(launch, kind, name):
    one = kind.load(launch.alone / f"{name}.json")
    two = kind.load(launch.folder / "0" / f"{name}.json")
    assert two == one
    assert two.table().equals(one.table())


def test_losses_and_norms_of_two_processes_are_those_of_one_to_the_bit(launch):
    one = json.loads((launch.alone / "plain.json").read_text())
    assert json.loads((launch.folder / "0" / "plain.json").read_text()) == one
    assert min(one["sums"]) > 0


def test_each_batch_is_run_by_one_process(launch):
    for name, whole in launch.ran.items():
        first, second = (set(rank["ran"][name]) for rank in launch.ranks)
        assert first | second == set(whole), name
        assert not first & second, name
        if name in ONE_BATCH:
            assert len(whole) == ONE_BATCH[name], name
            assert not second, name
        else:
            assert first, name
            assert second, name
    assert {len(batches) % 2 for batches in launch.ran.values()} == {0, 1}


def test_an_error_in_one_process_is_raised_in_both(launch):
    first, second = (rank["errors"] for rank in launch.ranks)
    assert first == second
    assert first["edit"] == "RuntimeError: rank 1: ZeroDivisionError: no such thing"
    kind, rank, message = first["activation"].split(": ")
    assert (kind, rank[:-1]) == ("ValueError", "rank ")
    assert message.startswith("the residual of c9 at layer 0 (resid_post) under base is not finite")
    assert "under condition 'base' (base) is not finite in float32" in first["loss"]


@pytest.mark.parametrize("what", ["data", "words", "weights", "call"])
def test_processes_that_do_not_read_the_same_are_told(launch, what):
    message = launch.ranks[0]["errors"][what]
    start, listed = message.split(" (", 1)
    first, second = listed.split("). Each takes its own share")[0].split("; ")
    assert start == "ValueError: the processes do not read the same"
    assert first.removeprefix("rank 0: ") != second.removeprefix("rank 1: ")
    assert " with tiny-llama, adapter None, weights " in first
    assert "start them with python, not with torchrun" in message


def test_only_the_first_process_shows_progress(launch):
    first, second = (rank["screen"] for rank in launch.ranks)
    assert "positive" in first
    assert "log-odds" in first
    assert second == ""


def test_a_file_that_all_processes_write_at_once_is_whole(launch):
    one = Directions.load(launch.folder / "0" / "mean_diff_token.safetensors")
    together = Directions.load(launch.folder / "together.safetensors")
    assert all(torch.equal(together.vectors[i], one.vectors[i]) for i in one.layers)
    assert not list(launch.folder.glob(".*"))


def test_training_waits_for_no_other_process(launch):
    assert Directions.load(launch.folder / "trained.safetensors").layers == (1,)


# -- how processes start and end --------------------------------------------------------------


def start(ending: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shown = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shown |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "tests/support/ranks.py", ending],
            cwd=ROOT,
            env=os.environ | shown | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    try:
        texts = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


def test_an_error_that_nobody_catches_ends_both_processes():
    for rank, (code, out, err) in enumerate(ended(start("raise"))):
        assert code == 1
        assert out == f"{rank} [[0, 3, 4], [1, 2]]\n"
        assert err.strip().endswith("ValueError: rank 1: batch (1,) is odd")


def test_a_process_that_dies_does_not_leave_the_other_waiting():
    (code, out, err), (died, *_) = ended(start("die"))
    assert (code, died) == (1, 3)
    assert out == "0 [[0, 3, 4], [1, 2]]\n"
    assert "rank 0 timed out waiting for the other processes: one of them has ended" in err


# -- a process of its own ---------------------------------------------------------------------


def test_a_plain_process_joins_nobody(hooked_llama, monkeypatch):
    def never(*_args, **_options):
        raise AssertionError("a process group was started")

    monkeypatch.setattr(torch.distributed, "init_process_group", never)
    monkeypatch.setattr(_distributed, "_check_same", never)
    batches = pack(tokenize(shares.GOOD, hooked_llama.tokenizer), token_budget=60)
    assert _distributed.world() == (0, 1)
    assert _distributed.leads()
    assert _distributed.gathered("x") == ["x"]
    assert _distributed.share(batches) == batches
    assert _distributed.shared(hooked_llama, batches, len, "rows") == [len(batches)]


def test_an_error_in_a_plain_process_is_left_as_it_is(hooked_llama):
    def fail(_batches):
        raise KeyError("x")

    with pytest.raises(KeyError, match=r"^'x'$"):
        _distributed.shared(hooked_llama, [], fail, "nothing")


def test_a_launched_process_leads_by_its_rank_and_joins_only_with_company(monkeypatch):
    joined = []
    monkeypatch.setattr(_distributed, "_join", lambda: joined.append(True))
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert _distributed.world() == (0, 1)
    assert _distributed.leads()
    assert not joined
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not _distributed.leads()
    with _distributed.alone():
        assert _distributed.world() == (0, 1)
    assert not joined
    _distributed.world()
    assert joined


@pytest.mark.parametrize(
    ("n", "size", "budget"), [(0, 2, 60), (1, 3, 60), (7, 2, 60), (30, 4, 60), (30, 8, 200)]
)
def test_shares_are_disjoint_whole_in_order_and_even(tiny_tokenizer, monkeypatch, n, size, budget):
    data = shares.conversations("good", n)
    batches = pack(tokenize(data, tiny_tokenizer), token_budget=budget) if n else []
    parts = []
    for rank in range(size):
        monkeypatch.setattr(_distributed, "world", lambda rank=rank: (rank, size))
        parts.append(_distributed.share(batches))
    places = [[batches.index(batch) for batch in part] for part in parts]
    assert sorted(sum(places, [])) == list(range(len(batches)))
    assert all(part == sorted(part) for part in places)
    loads = [sum(batch.input_ids.numel() for batch in part) for part in parts]
    assert max(loads) - min(loads) <= max((b.input_ids.numel() for b in batches), default=0)


def test_a_model_whose_weights_are_spread_over_processes_is_not_shared_out(monkeypatch):
    model = tiny_hooked("llama")
    monkeypatch.setattr(_distributed, "world", lambda: (1, 2))
    monkeypatch.setattr(model.module, "_tp_size", 2)
    batches = pack(tokenize(shares.GOOD, model.tokenizer), token_budget=60)
    assert _distributed.shared(model, batches, len, "rows") == [len(batches)]


# -- what must not depend on who reads --------------------------------------------------------


@pytest.mark.parametrize("cap", [1, 30, 10**6])
def test_the_sample_of_norms_is_the_first_batches(hooked_llama, monkeypatch, cap):
    monkeypatch.setattr(reader, "NORM_TOKENS", cap)
    norms, counted = [], 0
    for batch in hooked_llama.batches(shares.GOOD, token_budget=60):
        if counted < cap:
            residual = hooked_llama.residuals(batch, 1)[1]
            norms.append(residual[batch.mask("all")].norm(dim=-1))
            counted += len(norms[-1])
    found = residual_norm(hooked_llama, shares.GOOD, 1, token_budget=60)[1]
    assert found == float(torch.cat(norms).median())


def test_norms_of_no_tokens_are_refused(hooked_llama):
    with pytest.raises(ValueError, match="data is empty; give at least one conversation"):
        residual_norm(hooked_llama, [], 1)
