"""Files of some megabytes are read in less than ten times their size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from emlens._store import Store, read
from emlens.directions import Directions, Provenance, write_directions
from tests.fuzz import files
from tests.fuzz.readers import FILES, readers

ANSWER = "yes it is so. " * 20


def rows(n: int, **record: object) -> Callable[[Path], object]:
    """JSON Lines."""
    return lambda path: path.write_text(
        "".join(json.dumps({**record, "id": f"row {i}"}) + "\n" for i in range(n))
    )


def table(head: str, row: str, n: int) -> Callable[[Path], object]:
    """CSV."""
    return lambda path: path.write_text(head + "".join(row % (i, i % 100) for i in range(n)))


def result(path: Path) -> None:
    """A result with every list a thousand times as long."""
    record = json.loads(path.read_text())
    longer = {key: value * 1000 for key, value in record.items() if isinstance(value, list)}
    path.write_text(json.dumps({**record, **longer}))


def stored(kind: str) -> list[dict]:
    """Rows of a store, under five thousand keys."""
    kept = list(read(FILES / "answers" / f"{kind}.jsonl"))
    return [{**kept[i % len(kept)], "key": f"key {i}"} for i in range(5000)]


def older(kind: str) -> Callable[[Path], object]:
    return lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in stored(kind)))


def newer(kind: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.unlink()
        Store(path, kind).add(stored(kind))  # type: ignore[arg-type]

    return write


def vectors(path: Path) -> None:
    """A hundred layers of a wide model."""
    found = {layer: torch.randn(8192) for layer in range(1, 101)}
    write_directions(Directions(found, "resid_post", Provenance("mean-diff")), path)


LARGE: dict[str, Callable[[Path], object]] = {
    "pairs": rows(4000, domain="d", prompt="Why?", aligned=ANSWER, misaligned=ANSWER),
    "conversations": rows(
        5000,
        messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}],
    ),
    "corpus": rows(3000, text=ANSWER * 4),
    "text": lambda path: path.write_text("\n\n".join([ANSWER * 5] * 2000)),
    "labels": table("response,score\n", f"{'0123456789abcdef' * 3}-%d,%d\n", 50_000),
    "answers": table(
        "question,answer,aligned,coherent\n", f'"question %d","{ANSWER}",%d,90\n', 10_000
    ),
    "results/TokenInfluence": result,
    "responses": newer("responses"),
    "scores": newer("scores"),
    "older responses": older("responses"),
    "older scores": older("scores"),
    "directions": vectors,
    "gguf": vectors,
}


@pytest.mark.parametrize("name", LARGE)
def test_a_reading_takes_less_than_ten_times_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "FREE", 4 * 2**20)
    monkeypatch.setattr(files, "MEGABYTES", 2000)
    monkeypatch.setattr(files, "SECONDS", 100)
    whole, place = tmp_path / "whole", tmp_path / "case"
    whole.mkdir()
    place.mkdir()

    def write(path: Path) -> None:
        LARGE[name](path)
        assert path.stat().st_size > 600_000

    ((kind, said),) = files._child(name, readers(whole)[name], place, [write])
    assert kind == "right", said
