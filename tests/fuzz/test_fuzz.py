"""A few hundred damaged files in the suite; `make fuzz` runs thousands."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest

from tests.fuzz import damage, files
from tests.fuzz.readers import Reader, readers

NEED_NOT_BE_THERE = {"checkpoint", "steps' log", "versions"}
"""Without them a run begins anew, a trial is not finished, and nothing is known beside weights."""


def test_every_damaged_file_is_refused_by_name_or_read_and_usable():
    counts, faults = files.outcomes(cases=300, seed=7)
    assert not faults, "\n".join(faults)
    assert counts.total() == 300
    assert len({reader for reader, _ in counts}) > 60


def test_a_folder_a_pipe_a_loop_and_nothing_in_place_of_a_file_are_said_at_once(tmp_path):
    whole, place = tmp_path / "whole", tmp_path / "case"
    whole.mkdir()
    kinds = readers(whole)
    one_of_each = {kind.read.__qualname__ + kind.inside: name for name, kind in kinds.items()}
    for name in one_of_each.values():
        place.mkdir(exist_ok=True)
        damages = [partial(damage.in_place_of, way=way) for way in damage.INSTEAD]
        found = files._child(name, kinds[name], place, damages)
        for way, (kind, said) in zip(damage.INSTEAD, found, strict=True):
            free = way in ("missing", "loop") and name in NEED_NOT_BE_THERE
            assert kind == "clear" or (free and kind == "right"), f"{name}, {way}: {kind}, {said}"


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        ("unclear", lambda path: 1 // 0),
        ("silent", lambda path: 0),
        ("hanging", lambda path: time.sleep(60)),
        ("hungry", lambda path: len(bytearray(200 * 2**20))),
        ("hungry", lambda path: len(bytearray(2 * files.MEGABYTES * 2**20))),
    ],
)
def test_a_reader_that_does_wrong_is_told_of(tmp_path, monkeypatch, kind, read):
    monkeypatch.setattr(files, "SECONDS", 1)
    whole, place = tmp_path / "a.json", tmp_path / "case"
    whole.write_text('{"a": 1}')
    place.mkdir()
    later = iter([False])
    reader = Reader(whole, lambda path: read(path) if next(later, True) else 1, lambda n: 1 / n)
    ((found, said),) = files._child("a", reader, place, [Path.exists])
    assert found == kind, said
