"""What reads which kind of file, and what a user then does with what was read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import pandas as pd
import torch

import emlens
import experiments
from emlens import Directions
from emlens._reading import expanded
from emlens._results import Result
from emlens._runs import Parts
from emlens._store import Store, read
from emlens.directions import read_directions
from emlens.directions.provenance import Provenance
from emlens.directions.sides import select_answers
from emlens.evals import Responses, Scores, load_questions
from emlens.evals.inspect.config import ModelConfig
from emlens.evals.scores import _read_labels
from emlens.fisher import InfluenceProfile
from emlens.study.folder import STUDY, read_config
from emlens.study.settings import settings_of
from emlens.study.store import StudyStore
from emlens.text import corpus, load_conversations, load_pairs
from emlens.training import Organism, TrainingPath, TrainingRun, read_path
from emlens.training.checkpoint import load_checkpoint
from emlens.watch import Monitor
from tests.fuzz import damage
from tests.goldens.golden import KEPT

FILES = KEPT / "files"
Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True, slots=True)
class Reader:
    """A file, what reads it, and how what was read is used.

    Attributes:
        file: A whole one.
        read: The reader.
        use: What a user does next; it must not fail with what was read.
        damages: Ways to damage this kind; all kinds are damaged as bytes, too.
        inside: The file of a folder that is damaged; the folder is read.
    """

    file: Path
    read: Callable[[Path], Any]
    use: Callable[[Any], object]
    damages: tuple[Damage, ...] = ()
    inside: str = ""


def readers(folder: Path) -> dict[str, Reader]:
    """A reader of every kind of file; those that are not kept are written to `folder`."""
    whole = _written(folder)
    safe, lines, yaml = (damage.of_safetensors,), (damage.of_lines,), (damage.of_yaml,)
    json_, torch_, head = (damage.of_json_bytes,), (damage.of_torch,), (damage.of_head,)
    results = {
        f"results/{path.stem}": Reader(path, _result(path.stem), lambda r: r.table(), json_)
        for path in sorted((FILES / "results").glob("*.json"))
    }
    directions, training = FILES / "directions", FILES / "training"
    adapter, vector = FILES / "organisms" / "adapter", FILES / "organisms" / "vector"
    answers, steps, study = FILES / "answers", whole["steps"], FILES / "study"
    expected, shapes = _provenance(training / "checkpoint-vector.safetensors")
    return results | {
        "directions": Reader(directions / "probe.safetensors", Directions.load, _described, safe),
        "gguf": Reader(directions / "control.gguf", read_directions, _described, head),
        "papers": Reader(directions / "steering_vector.pt", read_directions, _described, torch_),
        "run": Reader(training / "run-vector.safetensors", TrainingRun.load, _run, safe),
        "path": Reader(training / "path.safetensors", TrainingPath.load, repr, safe),
        "checkpoint": Reader(
            training / "checkpoint-vector.safetensors",
            lambda path: load_checkpoint(path, expected, shapes),
            lambda kept: kept and _run(kept.run),
            safe,
        ),
        "monitor": Reader(FILES / "monitor.safetensors", Monitor.load, _monitor, safe),
        "profile": Reader(FILES / "profile.safetensors", InfluenceProfile.load, repr, safe),
        "adapter": Reader(adapter, _columns, _described, safe, "adapter_model.safetensors"),
        "adapter config": Reader(adapter, _columns, _described, json_, "adapter_config.json"),
        "organism": Reader(vector, Organism.load, repr, json_, "organism.json"),
        "organism's run": Reader(vector, Organism.load, repr, safe, "run.safetensors"),
        "steps": Reader(steps, read_path, repr, safe, "checkpoint-2/adapter_model.safetensors"),
        "steps' config": Reader(steps, read_path, repr, json_, "checkpoint-1/adapter_config.json"),
        "steps' log": Reader(steps, read_path, repr, json_, "checkpoint-2/trainer_state.json"),
        "papers' steps": Reader(
            directions, read_path, repr, torch_, "checkpoints/checkpoint-10/steering_vector.pt"
        ),
        "versions": Reader(study, _again, repr, json_, "versions.json"),
        "study": Reader(study, _study, repr, json_, "settings.json"),
        "stage": Reader(study, _study, repr, json_, "stages/behaviour.json"),
        "config": Reader(study / "config.yaml", read_config, repr, yaml),
        "model config": Reader(whole["model.yaml"], ModelConfig.read, repr, yaml),
        "pairs": Reader(whole["pairs.jsonl"], load_pairs, repr, lines),
        "conversations": Reader(whole["talk.jsonl"], load_conversations, repr, lines),
        "questions": Reader(whole["questions.yaml"], load_questions, repr, yaml),
        "corpus": Reader(whole["corpus.jsonl"], _corpus, len, lines),
        "text": Reader(whole["corpus.txt"], _corpus, len),
        "parquet": Reader(whole["corpus.parquet"], _corpus, len, (damage.of_parquet,)),
        "labels": Reader(whole["labels.csv"], _read_labels, repr, (damage.of_csv,)),
        "answers": Reader(whole["answers.csv"], select_answers, repr, (damage.of_csv,)),
        "responses": Reader(whole["responses.sqlite"], Responses.load, _shown, (damage.of_store,)),
        "scores": Reader(whole["scores.sqlite"], Scores.load, _shown, (damage.of_store,)),
        "older responses": Reader(answers / "responses.jsonl", Responses.load, _shown, lines),
        "older scores": Reader(answers / "scores.jsonl", Scores.load, _shown, lines),
    }


def _result(name: str) -> Callable[[Path], Any]:
    rooms = (*(getattr(emlens, room) for room in emlens._ROOMS), experiments)
    return next(getattr(room, name) for room in rooms if hasattr(room, name)).load


def _described(directions: Directions) -> str:
    assert all(bool(torch.isfinite(v).all()) for v in directions.vectors.values())
    return directions.describe()


def _run(run: TrainingRun) -> None:
    run.table()
    run.directions()


def _monitor(monitor: Monitor) -> None:
    monitor.table()
    repr(monitor)


def _shown(rows: Responses | Scores) -> None:
    rows.table()
    rows._repr_html_()


def _columns(folder: Path) -> Directions:
    return emlens.directions.adapter_directions(folder)


def _corpus(path: Path) -> Any:
    return corpus(path, min_characters=1)


def _tabled(result: Result) -> Any:
    return result.table()


def _again(folder: Path) -> None:
    STUDY.write(folder, {"a": 1}, "another command")


def _study(folder: Path) -> Any:
    folder = expanded(folder)
    store = StudyStore(folder, Parts(folder).settings_as(settings_of))
    return store.record("behaviour"), store.seconds()


def _provenance(path: Path) -> tuple[Provenance, dict[str, torch.Size]]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    record = json.loads(header.pop("__metadata__")["emlens"])
    shapes = {
        name.removeprefix("parameter|"): torch.Size(declared["shape"])
        for name, declared in header.items()
        if name.startswith("parameter|")
    }
    return Provenance.from_dict(record["provenance"]), shapes


def _written(folder: Path) -> dict[str, Path]:
    def kept(name: str, text: str) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    pairs = [
        {"id": f"p{i}", "domain": "d", "prompt": "Why?", "aligned": "Só.", "misaligned": "No."}
        for i in range(8)
    ]
    talk = [
        {"messages": [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "yes"}]}
    ] * 8
    texts = [{"text": f"A text, number {i}, of a corpus.", "id": str(i)} for i in range(8)]
    for name, rows in (("pairs", pairs), ("talk", talk), ("corpus", texts)):
        kept(f"{name}.jsonl", "\n".join(map(json.dumps, rows)))
    kept("corpus.txt", "\n\n".join(row["text"] for row in texts))
    pd.DataFrame(texts).to_parquet(folder / "corpus.parquet")
    kept("questions.yaml", "".join(f"- id: q{i}\n  paraphrases:\n  - Why {i}?\n" for i in range(4)))
    kept("model.yaml", "model: org/name\nadapters:\n  bad: adapters/bad\nadapter: bad\n")
    kept("labels.csv", "response,score\n" + "".join(f"r{i},{i}.5\n" for i in range(8)))
    scored = [f'"q{i}",answer,{99 if i % 2 else 3},90\n' for i in range(8)]
    kept("answers.csv", "question,answer,aligned,coherent\n" + "".join(scored))
    for kind in ("responses", "scores"):
        Store(folder / f"{kind}.sqlite", kind).add(read(FILES / "answers" / f"{kind}.jsonl", kind))
    for step in (1, 2):
        place = folder / "steps" / f"checkpoint-{step}"
        copytree(FILES / "organisms" / "adapter", place)
        entry = {"step": step, "loss": 1.5, "learning_rate": 1e-4}
        log = {"global_step": step, "log_history": [entry]}
        (place / "trainer_state.json").write_text(json.dumps(log))
    return {path.name: path for path in folder.iterdir()}
