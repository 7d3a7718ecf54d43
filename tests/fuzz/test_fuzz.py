"""A few hundred damaged files in the suite; `make fuzz` runs thousands."""

from __future__ import annotations

import time

import pytest

from tests.fuzz import files


def test_every_damaged_file_is_refused_by_name_or_read_and_usable():
    counts, faults = files.outcomes(cases=300, seed=7)
    assert not faults, "\n".join(faults)
    assert counts.total() == 300
    assert len({reader for reader, _ in counts}) > 60


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
    reader = files.Reader(
        whole, lambda path: read(path) if next(later, True) else 1, lambda n: 1 / n
    )
    ((found, said),) = files._child("a", reader, place, 1, seed=0)
    assert found == kind, said
