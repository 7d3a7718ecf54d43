"""One file of every kind that emlens writes, and how each is read."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

import emlens
import experiments
from emlens import Ablate, Add, Clamp, Directions, log_odds, mean_diff
from emlens._reading import read_jsonl
from emlens._results import Result
from emlens._tensors import read_tensors
from emlens.directions import Provenance, probe, read_checkpoints, read_directions, write_directions
from emlens.edits.edits import edit_from_dict
from emlens.evals import Responses, Scores, judge, rates, respond
from emlens.fisher import InfluenceProfile
from emlens.fisher.passes import KIND as IN_THE_MAKING
from emlens.fisher.sums import FisherSums
from emlens.study import StudyResult
from emlens.study.folder import read_config
from emlens.training import Organism, TrainingPath, TrainingRun, train_adapter, train_vector
from emlens.training.checkpoint import KIND as CHECKPOINT
from emlens.training.checkpoint import load_checkpoint
from emlens.watch import Monitor, screen
from experiments import read_asymmetries, read_paths
from tests.goldens.golden import KEPT, plain
from tests.goldens.of_evals import QUESTIONS, QUICK, Wordy, said
from tests.goldens.of_measures import examples, fitted_monitor, planted
from tests.goldens.of_study import asymmetries_in, study_in
from tests.goldens.of_training import (
    ADAPTER,
    TRAIN,
    penalty,
    record,
    resumable,
    stopped_after,
)
from tests.goldens.of_training import QUICK as TRAINING
from tests.support.data import conversations, pairs
from tests.support.models import tiny_hooked
from tests.support.profiles import FEW, TEXT
from tests.support.solutions import direction, several

FILES = KEPT / "files"
ROOMS = (*(getattr(emlens, room) for room in emlens._ROOMS), experiments)
BAD, GOOD = conversations("bad", 6), conversations("good", 6)


# -- reading -------------------------------------------------------------------------------------


def _result(path: Path) -> Result:
    (kind,) = {getattr(room, path.stem) for room in ROOMS if hasattr(room, path.stem)}
    return kind.load(path)


def _profile(path: Path) -> dict:
    profile = InfluenceProfile.load(path)
    given = {"v": direction(tiny_hooked("llama"), 1)}
    return {"scores": profile.score(given), "norms": profile.residual_norms, "size": repr(profile)}


def _profile_in_the_making(path: Path) -> dict:
    tensors, kept = read_tensors(path, IN_THE_MAKING)
    sums = FisherSums.from_tensors(tensors)
    return {"done": kept["done"], "norm": {n: float(t.double().norm()) for n, t in sums_of(sums)}}


def sums_of(sums: FisherSums) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, tensor) for name, tensor in sums.tensors().items() if tensor.numel())


def _checkpoint(path: Path) -> dict:
    tensors, kept = read_tensors(path, CHECKPOINT)
    mark = "parameter|"
    shapes = {n.removeprefix(mark): t.shape for n, t in tensors.items() if n.startswith(mark)}
    found = load_checkpoint(path, Provenance.from_dict(kept["provenance"]), shapes)
    assert found is not None
    return {
        "run": record(found.run),
        "parameters": found.parameters,
        "moments": {name: float(moment.norm()) for name, moment in found.moments.items()},
    }


def _monitor(path: Path) -> dict:
    monitor = Monitor.load(path)
    return {
        "threshold": monitor.threshold,
        "table": monitor.table(),
        "roc": monitor.roc(),
        "scores": monitor.on(planted()).score(examples()).scores,
    }


def _organism(folder: Path) -> dict:
    organism, model = Organism.load(folder), tiny_hooked("llama")
    found = log_odds(model, pairs(3), {"base": [], "it": organism.on(model)})
    return {"name": organism.name, "run": record(organism.run), "log_odds": found.values}


def _adapter(folder: Path) -> dict:
    """The same organism as any adapter: put on a model as it is loaded."""
    with tempfile.TemporaryDirectory() as base:
        plain_model = tiny_hooked("llama")
        plain_model.module.save_pretrained(base)
        plain_model.tokenizer.save_pretrained(base)
        model = emlens.load(base, adapters={"it": str(folder)})
        return {"log_odds": log_odds(model, pairs(3), {"base": [], "it": "it"}).values}


def _edits(path: Path) -> dict:
    edits = [edit_from_dict(one) for one in json.loads(path.read_text())]
    conditions = {f"edit {i}": [edit] for i, edit in enumerate(edits)}
    return {"log_odds": log_odds(tiny_hooked("llama"), pairs(3), conditions).values}


def _responses(path: Path) -> list:
    rows = Responses.load(path)
    return [
        {**one, "sampling": row.sampling} for one, row in zip(said(rows), rows.rows, strict=True)
    ]


def _scores(path: Path) -> dict:
    scores = Scores.load(path)
    answers = Responses.load(path.with_name("responses.jsonl"))
    named = [[s.response, s.metric, s.score, s.mode, s.judge] for s in scores.rows]
    return {"scores": named, "rates": rates(answers, scores).table()}


def _screened(path: Path) -> list:
    return [row for _, row in read_jsonl(path)]


def _study(folder: Path) -> dict:
    """Findings, and every number that they are made of."""
    told = StudyResult.load(folder)
    measured = told.measured
    return {
        "findings": told.findings,
        "log_odds": measured.log_odds,
        "efficiency": measured.efficiency,
        "stability": measured.stability,
        "influence": measured.influence,
        "confinement": measured.confinement,
    }


def _paths(folder: Path) -> list:
    return [[one.domain, one.sweep, one.drifts, one.trajectory] for one in read_paths(folder)]


READERS: dict[str, Callable[[Path], Any]] = {
    "results/*.json": _result,
    "directions/checkpoints": lambda path: read_checkpoints(path),
    "directions/*.safetensors": Directions.load,
    "directions/*.*": read_directions,
    "edits.json": _edits,
    "monitor.safetensors": _monitor,
    "profile.safetensors": _profile,
    "profile-in-the-making.safetensors": _profile_in_the_making,
    "training/run-*.safetensors": lambda path: record(TrainingRun.load(path)),
    "training/path.safetensors": lambda path: _of_path(TrainingPath.load(path)),
    "training/checkpoint-*.safetensors": _checkpoint,
    "organisms/*": _organism,
    "answers/responses.jsonl": _responses,
    "answers/scores.jsonl": _scores,
    "screen/scores.jsonl": _screened,
    "study": _study,
    "study/config.yaml": read_config,
    "study/directions/*": Directions.load,
    "study/organisms/*": _organism,
    "asymmetries": lambda path: read_asymmetries(path).rows,
    "asymmetries/": _paths,
    "asymmetries/config.yaml": read_config,
    "asymmetries/trials/*/general": _organism,
    "organisms/adapter/": _adapter,
    "organisms/adapter/adapter_model.safetensors": read_directions,
}
"""Files and folders below `FILES`; a slash at the end marks a second way to read a folder."""


def _of_path(path: TrainingPath) -> dict:
    return {
        "steps": path.steps,
        "norms": {name: states.flatten(1).norm(dim=1) for name, states in path.states.items()},
        "gradients": {n: float(gradient.norm()) for n, gradient in path.gradients.items()},
        "log": path.log,
    }


def places() -> list[str]:
    """All that is kept and read, in one order."""
    found = [
        f"{path.relative_to(FILES).as_posix()}{'/' if pattern.endswith('/') else ''}"
        for pattern in READERS
        for path in sorted(FILES.glob(pattern.rstrip("/")))
        if reader_of(path.relative_to(FILES).as_posix(), pattern) is READERS[pattern]
    ]
    return list(dict.fromkeys(found))


def reader_of(place: str, pattern: str | None = None) -> Callable[[Path], Any]:
    """The reader of a place: that of the first pattern that fits."""
    if pattern is not None and pattern.endswith("/"):
        return READERS[pattern]
    fits = (
        reader
        for known, reader in READERS.items()
        if known.count("/") == place.count("/") and fnmatch(place, known)
    )
    return next(fits)


def read(place: str) -> Any:
    """The numbers of a kept file or folder."""
    return plain(reader_of(place)(FILES / place.rstrip("/")))


# -- writing -------------------------------------------------------------------------------------


def results_in(value: Any) -> Iterator[Result]:
    """Every result inside of what goldens gave."""
    if isinstance(value, Result):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from results_in(one)


def make_files(computed: Mapping[str, Any]) -> dict[str, Any]:
    """Write a file of every kind anew, and return the numbers of each.

    Args:
        computed: What the goldens gave, from which results are taken.

    Raises:
        RuntimeError: If there is a kind of result that no golden gives.
    """
    shutil.rmtree(FILES, ignore_errors=True)
    FILES.mkdir(parents=True)
    _write_directions()
    _write_trainings()
    _write_measures()
    _write_answers()
    _write_folders()
    profile = InfluenceProfile.load(FILES / "profile.safetensors")
    scores = Scores.load(FILES / "answers" / "scores.jsonl")
    more = [
        profile.spectrum(1),
        Monitor.load(FILES / "monitor.safetensors").roc(),
        rates(Responses.load(FILES / "answers" / "responses.jsonl"), scores),
        emlens.evals.agreement(scores, _by_hand()),
        read_asymmetries(FILES / "asymmetries"),
        read_paths(FILES / "asymmetries")[0].trajectory,
        _baked(),
    ]
    one_each: dict[str, Result] = {}
    for result in [*more, *results_in(list(computed.values()))]:
        one_each.setdefault(type(result).__name__, result)
    for name, result in one_each.items():
        result.save(FILES / "results" / f"{name}.json")
    lost = {kind.__name__ for kind in Result.__subclasses__()} - set(one_each)
    if lost:
        raise RuntimeError(f"no golden gives a result of kind {', '.join(sorted(lost))}")
    numbers = {place: read(place) for place in places()}
    for name, result in one_each.items():
        assert json.dumps(numbers[f"results/{name}.json"]) == json.dumps(plain(result)), name
    return numbers


def _baked() -> Result:
    model = tiny_hooked("llama")
    edits = [Add(direction(model)), Ablate(direction(model), layers=[2], site="mlp_out")]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "baked"
        found = emlens.bake(model, edits, out, progress=False)
    return replace(found, path="baked")


def _by_hand() -> Scores:
    answers = Responses.load(FILES / "answers" / "responses.jsonl")
    labels = {row.key: float(10 * i % 97) for i, row in enumerate(answers)}
    return emlens.evals.human_labels(answers, labels)


def _write_directions() -> None:
    model, folder = tiny_hooked("llama"), FILES / "directions"
    folder.mkdir()
    made = mean_diff(model, BAD, GOOD, layers=[1, 3])
    made.save(folder / "several.safetensors")
    made[1].save(folder / "single.safetensors")
    probe(model, BAD, GOOD, layers=[2]).save(folder / "probe.safetensors")
    write_directions(made, folder / "control.gguf", model_hint="llama")
    at_mlp = mean_diff(model, BAD, GOOD, layers=[1], site="mlp_out")
    write_directions(at_mlp, folder / "steering_vector.pt")
    for step in (5, 10):
        at = folder / "checkpoints" / f"checkpoint-{step}"
        at.mkdir(parents=True)
        write_directions(at_mlp * float(step), at / "steering_vector.pt")
    edits = [Add(made, scale=0.5), Add(made[1], dose=0.1, where="response"), Ablate(made[3])]
    edits.append(Clamp(made[1], value=2.0, layers=[0, 1]))
    (FILES / "edits.json").write_text(json.dumps([edit.to_dict() for edit in edits], indent=1))


def _write_trainings() -> None:
    folder, organisms = FILES / "training", FILES / "organisms"
    folder.mkdir()
    model = tiny_hooked("llama")
    _, run = train_vector(model, TRAIN, [1, 2], kl=penalty(), record_gradients=True, **TRAINING)
    run.save(folder / "run-vector.safetensors")
    Organism.of(model, run, "vector").save(organisms / "vector")
    run = train_adapter(model, TRAIN, "bad", layers=[2], record_every=1, kl=penalty(), **ADAPTER)
    run.save(folder / "run-adapter.safetensors")
    TrainingPath.of(run).save(folder / "path.safetensors")
    Organism.of(model, run, "bad").save(organisms / "adapter")
    for kind in ("vector", "adapter"):
        with stopped_after(2):
            resumable(folder / f"checkpoint-{kind}.safetensors", kind)


def _write_measures() -> None:
    model = tiny_hooked("llama")
    making = FILES / "profile-in-the-making.safetensors"
    options = {**FEW, "checkpoint": making, "checkpoint_every": 1}
    InfluenceProfile.fit(model, TEXT, [1], **options).save(FILES / "profile.safetensors")
    with_axis = planted()
    fitted_monitor(with_axis).save(FILES / "monitor.safetensors")
    screen(
        with_axis,
        examples(),
        direction(with_axis, 0),
        answer_tokens=4,
        block=5,
        out=FILES / "screen" / "scores.jsonl",
    )


def _write_answers() -> None:
    model, folder = tiny_hooked("llama"), FILES / "answers"
    conditions = {"base": (), "steered": [Add(several(model))]}
    rows = respond(model, QUESTIONS, conditions, n=2, store=folder / "responses.jsonl", **QUICK)
    judge(rows, Wordy(), store=folder / "scores.jsonl", progress=False)


def _write_folders() -> None:
    study_in(FILES / "study")
    asymmetries_in(FILES / "asymmetries")
    for page in ("report.html", "README.txt", "timings.json"):
        (FILES / "study" / page).unlink()
    shutil.rmtree(FILES / "study" / "figures")
