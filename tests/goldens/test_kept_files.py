"""Files of every kind, written before, are read to the numbers that are noted beside them."""

from __future__ import annotations

import shutil

import pytest

from emlens.evals import Responses, Scores
from tests.goldens.files import FILES, places, read
from tests.goldens.golden import KEPT, differences, read_numbers

LARGEST = 2_000_000
"""Bytes of all that is kept."""


@pytest.mark.parametrize("place", places())
def test_a_kept_file_has_the_numbers_noted_beside_it(place):
    lines = differences(read_numbers("files")[place], read(place), 1e-4, 1e-6, place)
    assert not lines, "\n".join(lines[:20])


def test_every_note_has_its_file():
    assert sorted(places()) == sorted(read_numbers("files"))


def test_reading_a_store_writes_nothing(tmp_path):
    for kind, name in ((Responses, "responses.jsonl"), (Scores, "scores.jsonl")):
        copy = shutil.copy(FILES / "answers" / name, tmp_path / name)
        before = copy.read_bytes()
        assert len(kind.load(copy)) == before.count(b"\n")
        assert copy.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_kept_is_small():
    assert sum(path.stat().st_size for path in KEPT.rglob("*") if path.is_file()) < LARGEST
