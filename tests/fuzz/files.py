"""Files of every kind, damaged, and what their readers make of them.

`python -m tests.fuzz.files --cases 10000` prints how many readings ended in which way:

clear: an error of emlens that names the file. right: it is read, and what was read can be used.
unclear: another's error, or one without the file's name. silent: it is read, and its use fails.
hanging: no answer in ten seconds. hungry: far more memory than the file has.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import emlens
from emlens import Directions
from emlens.directions import read_directions
from emlens.directions.selection import select_answers
from emlens.evals import load_questions
from emlens.evals.scores import _read_labels
from emlens.measures import InfluenceProfile, Monitor
from emlens.study.folder import read_config
from emlens.text import corpus, load_conversations, load_pairs
from emlens.training import Organism, TrainingPath, TrainingRun
from tests.fuzz import damage
from tests.goldens.golden import KEPT

FILES = KEPT / "files"
SECONDS, MEGABYTES = 10, 300
CLASSES = ("clear", "right", "unclear", "silent", "hanging", "hungry")
_OURS = str(Path(emlens.__file__).parent)


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
    damages: tuple[Callable[[bytes, random.Random], bytes], ...] = ()
    inside: str = ""


def _json(data: bytes, random_: random.Random) -> bytes:
    text = damage.of_json(data.decode(), random_)
    return text.encode("utf-8", "surrogatepass")


def readers(folder: Path) -> dict[str, Reader]:
    """A reader of every kind of file; those that are not kept are written to `folder`."""
    whole = _written(folder)
    safe, lines, yaml = (damage.of_safetensors,), (damage.of_lines,), (damage.of_yaml,)
    found = {
        f"results/{path.stem}": Reader(path, _result(path.stem), lambda r: r.table(), (_json,))
        for path in sorted((FILES / "results").glob("*.json"))
    }
    return found | {
        "directions": Reader(
            FILES / "directions" / "probe.safetensors", Directions.load, _described, safe
        ),
        "gguf": Reader(FILES / "directions" / "control.gguf", read_directions, _described),
        "papers": Reader(FILES / "directions" / "steering_vector.pt", read_directions, _described),
        "run": Reader(FILES / "training" / "run-vector.safetensors", TrainingRun.load, _run, safe),
        "path": Reader(FILES / "training" / "path.safetensors", TrainingPath.load, repr, safe),
        "monitor": Reader(FILES / "monitor.safetensors", Monitor.load, lambda m: m.table(), safe),
        "profile": Reader(FILES / "profile.safetensors", InfluenceProfile.load, repr, safe),
        "adapter": Reader(
            FILES / "organisms" / "adapter", _columns, _described, safe, "adapter_model.safetensors"
        ),
        "adapter config": Reader(
            FILES / "organisms" / "adapter", _columns, _described, (_json,), "adapter_config.json"
        ),
        "organism": Reader(
            FILES / "organisms" / "vector", Organism.load, repr, (_json,), "organism.json"
        ),
        "config": Reader(FILES / "study" / "config.yaml", read_config, repr, yaml),
        "pairs": Reader(whole["pairs.jsonl"], load_pairs, repr, lines),
        "conversations": Reader(whole["talk.jsonl"], load_conversations, repr, lines),
        "questions": Reader(whole["questions.yaml"], load_questions, repr, yaml),
        "corpus": Reader(whole["corpus.jsonl"], _corpus, len, lines),
        "text": Reader(whole["corpus.txt"], _corpus, len),
        "parquet": Reader(whole["corpus.parquet"], _corpus, len),
        "labels": Reader(whole["labels.csv"], _read_labels, repr),
        "answers": Reader(whole["answers.csv"], select_answers, repr),
    }


def _result(name: str) -> Callable[[Path], Any]:
    rooms = (emlens.directions, emlens.measures, emlens.training, emlens.evals, emlens.study)
    return next(getattr(room, name) for room in rooms if hasattr(room, name)).load


def _described(directions: Directions) -> str:
    assert all(bool(torch.isfinite(v).all()) for v in directions.vectors.values())
    return directions.describe()


def _run(run: TrainingRun) -> None:
    run.table()
    run.directions()


def _columns(folder: Path) -> Directions:
    return emlens.directions.adapter_directions(folder)


def _corpus(path: Path) -> Any:
    return corpus(path, min_characters=1)


def _written(folder: Path) -> dict[str, Path]:
    import json

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
    kept("labels.csv", "response,score\n" + "".join(f"r{i},{i}.5\n" for i in range(8)))
    scored = [f'"q{i}",answer,{99 if i % 2 else 3},90\n' for i in range(8)]
    kept("answers.csv", "question,answer,aligned,coherent\n" + "".join(scored))
    return {path.name: path for path in folder.iterdir()}


# -- cases ---------------------------------------------------------------------------------------


def outcomes(cases: int, seed: int = 0) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Numbers by reader and class, and an account of what is neither clear nor right."""
    counts: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, name) for name in ("whole", "case")]
        for place in places:
            place.mkdir()
        kinds = readers(places[0])
        for number, (name, reader) in enumerate(kinds.items()):
            share = cases // len(kinds) + (number < cases % len(kinds))
            for case, (kind, said) in enumerate(_child(reader, places[1], share, seed)):
                counts[name, kind] += 1
                if kind not in ("clear", "right"):
                    faults.append(f"{kind}: {name}, case {case} of seed {seed}: {said}")
    return counts, faults


def _child(reader: Reader, place: Path, cases: int, seed: int) -> list[tuple[str, str]]:
    """Run the cases of a reader in a process of its own, which may take only so much memory."""
    found: list[tuple[str, str]] = []
    while len(found) < cases:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        work = (reader, place, range(len(found), cases), seed, theirs)
        process = context.Process(target=_work, args=work)
        process.start()
        theirs.close()
        while len(found) < cases:
            if not ours.poll(2 * SECONDS):
                found.append(("hanging", "the process had to be killed"))
                break
            try:
                found.append(ours.recv())
            except EOFError:
                found.append(("hungry", "the process died"))
                break
        process.kill()
        process.join()
    return found


def _work(reader: Reader, place: Path, cases: range, seed: int, pipe: Any) -> None:
    # what is imported on the way is no memory of the file's
    reader.use(reader.read(reader.file))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEGABYTES * 2**20,) * 2)
    signal.signal(signal.SIGALRM, _too_long)
    warnings.simplefilter("ignore")
    sys.stderr = open("/dev/null", "w", encoding="utf-8")  # noqa: SIM115
    for case in cases:
        pipe.send(_outcome(reader, place, random.Random(f"{seed} {case}")))
    pipe.close()


def _outcome(reader: Reader, place: Path, random_: random.Random) -> tuple[str, str]:
    shutil.rmtree(place)
    place.mkdir()
    whole = place / reader.file.name
    (shutil.copytree if reader.inside else shutil.copy)(reader.file, whole)
    path = whole / reader.inside if reader.inside else whole
    data = path.read_bytes()
    draw = random_.random()
    if draw < 0.05:
        damage.in_place_of(path, random_)
    elif reader.damages and draw < 0.6:
        path.write_bytes(random_.choice(reader.damages)(data, random_))
    else:
        path.write_bytes(damage.of_bytes(data, random_))
    return _read(reader, whole, path)


def _read(reader: Reader, whole: Path, damaged: Path) -> tuple[str, str]:
    signal.alarm(SECONDS)
    try:
        found = reader.read(whole)
        try:
            reader.use(found)
        except _TooLong:
            raise
        except Exception as error:
            return "silent", _account(error)
        return "right", ""
    except _TooLong as error:
        return "hanging", _account(error)
    except MemoryError as error:
        return "hungry", _account(error)
    except BaseException as error:
        if "allocate memory" in str(error):
            return "hungry", _account(error)
        ours = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_OURS)
        told = isinstance(error, (OSError, ValueError)) and not isinstance(error, UnicodeError)
        named = any(path.name in str(error) for path in (whole, damaged))
        return "clear" if ours and told and named else "unclear", _account(error)
    finally:
        signal.alarm(0)


class _TooLong(BaseException):
    pass


def _too_long(*_: object) -> None:
    raise _TooLong


def _account(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:160]} ({Path(last.filename).name}:{last.lineno})"


def lines_of(counts: Counter[tuple[str, str]]) -> Iterator[str]:
    """The numbers as a table in text."""
    names = list(dict.fromkeys(name for name, _ in counts))
    yield f"{'':24}" + "".join(f"{kind:>9}" for kind in CLASSES)
    for name in names:
        yield f"{name:24}" + "".join(f"{counts[name, kind]:9}" for kind in CLASSES)
    sums = [sum(counts[name, kind] for name in names) for kind in CLASSES]
    yield f"{'all':24}" + "".join(f"{n:9}" for n in sums)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    numbers, complaints = outcomes(asked.cases, asked.seed)
    print("\n".join([*lines_of(numbers), "", *complaints]))
    sys.exit(1 if complaints else 0)
