"""A folder that is written anew is the old one or the new one, whatever happens meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emlens._folders import recovered, whole_folder

FILES = ("weights", "config", "record")


def write(folder, value):
    with whole_folder(folder, FILES) as new:
        for name in FILES:
            (new / name).write_text(value)


def values(folder):
    return {(folder / name).read_text() for name in FILES}


def test_a_folder_is_replaced_with_its_files_and_others_are_kept(tmp_path):
    folder = tmp_path / "deep" / "organism"
    write(folder, "first")
    (folder / "notes.md").write_text("mine")
    (folder / "plots").mkdir()
    with whole_folder(folder, FILES) as new:
        (new / "record").write_text("second")
    assert sorted(path.name for path in folder.iterdir()) == ["notes.md", "plots", "record"]
    assert (folder / "record").read_text() == "second"
    assert (folder / "notes.md").read_text() == "mine"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_relative_folder_is_written_where_it_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("organism", "first")
    assert values(tmp_path / "organism") == {"first"}


def test_an_error_leaves_what_was_there(tmp_path):
    write(tmp_path / "organism", "first")
    with pytest.raises(OSError, match="disk full"), whole_folder(tmp_path / "organism") as new:
        (new / "weights").write_text("half of it")
        raise OSError("disk full")
    assert values(tmp_path / "organism") == {"first"}
    assert os.listdir(tmp_path) == ["organism"]


@pytest.mark.parametrize(("killed_at", "kept"), [(1, "first"), (2, "first"), (3, "second")])
def test_a_kill_between_the_steps_leaves_one_of_the_two(killed_at, kept, tmp_path):
    folder = tmp_path / "organism"
    write(folder, "first")
    (folder / "notes.md").write_text("mine")
    script = f"""
import os, signal
rename, count = os.rename, 0
def killed(*paths):
    global count
    count += 1
    if count == {killed_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*paths)
os.rename = killed
from tests.test_folders import write
from pathlib import Path
write(Path({str(folder)!r}), "second")
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root)
    assert done.returncode == -9
    assert recovered(folder) == folder
    assert values(folder) == {kept}
    assert (folder / "notes.md").read_text() == "mine"
    write(folder, "third")
    assert values(folder) == {"third"}
    assert os.listdir(tmp_path) == ["organism"]
