"""Files are whole or not there, and the same content gives the same bytes."""

from __future__ import annotations

import pytest
import torch

from emlens._files import atomic_path, atomic_write, read_json, sha256_of, write_json
from emlens._tensors import read_tensors, write_tensors


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    atomic_write(target, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text("half of the ne")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_json_survives_and_a_broken_file_is_named(tmp_path):
    write_json(tmp_path / "a.json", {"ä": [1, None, 0.5]})
    assert read_json(tmp_path / "a.json") == {"ä": [1, None, 0.5]}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="a.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_tensors_and_record_survive_with_the_same_bytes_each_time(tmp_path):
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2).T}
    record = {"z": 1, "a": {"nested": [True, None]}, "m": "text", "q": 0.1}
    files = [write_tensors(tmp_path / f"{i}", "thing", tensors, record) for i in range(5)]
    assert len({sha256_of(path.read_bytes()) for path in files}) == 1
    read, again = read_tensors(files[0], "thing")
    assert again == record
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_tensors_of_another_kind_or_cut_short_are_refused(tmp_path):
    path = write_tensors(tmp_path / "t", "thing", {"w": torch.ones(8)}, {})
    with pytest.raises(ValueError, match=r"holds no other \(kind 'thing'; tensors w\)"):
        read_tensors(path, "other")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        read_tensors(path, "thing")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_tensors(tmp_path / "nothing", "thing")
