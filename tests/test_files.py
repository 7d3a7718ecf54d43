"""Files are whole or not there, and the same content gives the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from emlens._files import (
    atomic_path,
    atomic_write,
    sha256_of,
    write_json,
)
from emlens._reading import read_json
from emlens._tensors import read_tensors, write_tensors
from tests.support.disk import full_disk


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    atomic_write(target, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text("half of the ne")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_the_old_one(tmp_path):
    target = tmp_path / "file.txt"
    atomic_write(target, "old")
    with full_disk(1000), pytest.raises(OSError, match=r"File too large: '.*/file.txt'$"):
        atomic_write(target, "x" * 10_000)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_an_error_about_another_file_stays_one(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"nothing.txt'$"),
        atomic_path(tmp_path / "file.txt"),
    ):
        (tmp_path / "nothing.txt").read_text()


def test_what_does_not_pass_its_check_does_not_replace_the_old_file(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"n": 1})
    with (
        pytest.raises(
            OSError, match=r"a\.json was not written completely, the file of before is kept; is"
        ),
        atomic_path(target, check=read_json) as temporary,
    ):
        temporary.write_text('{"n": ')
    assert read_json(target) == {"n": 1}
    with (
        pytest.raises(OSError, match=r"completely, nothing is kept; .*\(it is not valid JSON"),
        atomic_path(tmp_path / "b.json", check=read_json) as temporary,
    ):
        temporary.write_text("{")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


# -- what killed processes leave -------------------------------------------------------------------

WRITER = """
import sys, time
from emlens._files import atomic_path
from emlens._folders import whole_folder
with atomic_path(sys.argv[1]) as temporary, whole_folder(sys.argv[1] + "s") as draft:
    temporary.write_text("half")
    (draft / "data").write_text("half")
    print("writing", flush=True)
    sys.stdin.readline()
    temporary.write_text("whole")
    (draft / "record").write_text("whole")
"""


@pytest.fixture
def writer(tmp_path):
    """Another process in the middle of writing `file` and the folder `files`."""
    started = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "file")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout.readline() == "writing\n"
    yield started
    started.kill()
    started.communicate()


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_what_a_killed_process_left_is_removed_at_the_next_write_in_the_folder(writer, tmp_path):
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(hidden(tmp_path)) == 2
    atomic_write(tmp_path / "another", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["another"]


def test_two_processes_write_one_file_at_once(writer, tmp_path):
    atomic_write(tmp_path / "file", "ours")
    assert len(hidden(tmp_path)) == 2
    writer.communicate("go on\n")
    assert writer.returncode == 0
    assert (tmp_path / "file").read_text() == "whole"
    assert (tmp_path / "files" / "record").read_text() == "whole"
    assert hidden(tmp_path) == []


def dead_process() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def aged(path, days):
    path.touch()
    then = time.time() - days * 24 * 3600
    os.utime(path, (then, then))
    return path


def test_of_another_host_only_what_is_a_day_old_is_removed(tmp_path):
    mark = f"emlens-00000000-{dead_process()}"
    young = aged(tmp_path / f".a.{mark}-11111111.tmp", days=0.9)
    old = aged(tmp_path / f".a.{mark}-22222222.tmp", days=1.1)
    atomic_write(tmp_path / "b", "text")
    assert young.exists()
    assert not old.exists()


def test_a_process_id_that_is_in_use_again_keeps_a_file_for_a_day_at_most(writer, tmp_path):
    (left, _) = hidden(tmp_path)
    aged(tmp_path / left, days=1.1)
    atomic_write(tmp_path / "b", "text")
    assert not (tmp_path / left).exists()


def test_files_of_others_stay(tmp_path):
    names = (
        ".mine.tmp",
        ".other.12345678.tmp",
        "emlens-00000000-1-11111111.tmp",
        ".a.emlens-x.tmp",
    )
    kept = [aged(tmp_path / name, days=400) for name in names]
    before = aged(tmp_path / ".b.12345678.tmp", days=2), aged(tmp_path / ".b.12345679.tmp", days=0)
    atomic_write(tmp_path / "b", "text")
    assert all(path.exists() for path in kept)
    # files of `b` that were named without their process
    assert [path.exists() for path in before] == [False, True]


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
