"""The store: one SQLite file that kills, full disks and other writers do not harm."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from pathlib import Path

import pytest

import emlens._store as module
from emlens._store import Store, export, is_store, read

ROOT = Path(module.__file__).parent.parent


def record(i: int, text: str = "said") -> dict:
    return {"key": f"k{i}", "text": f"{text} {i}", "n": [i, None, 0.5]}


def sql(path: Path, *statements: str) -> list:
    """What SQLite itself says, by a connection of its own."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        return [database.execute(statement).fetchall() for statement in statements]


def python(code: str, *arguments: object) -> subprocess.Popen:
    program = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(
        program, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )


def seen(folder: Path) -> dict:
    """Every file with its bytes and times, and the times of the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    kept = {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    return {**kept, "folder": folder.stat().st_mtime_ns}


def test_records_come_back_in_their_order_the_first_under_each_key(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PAGE", 3)
    path = tmp_path / "deep" / "answers.sqlite"
    store = Store(path, "responses")
    assert len(store) == 0 and list(store) == []
    wanted = [record(i) for i in (5, 3, 9, 1, 7, 2, 8)]
    assert store.add(wanted[:4]) == wanted[:4]
    assert store.add([record(3, "another"), *wanted[4:]]) == [wanted[1], *wanted[4:]]
    again = Store(path, "responses")
    assert list(again) == list(read(path)) == list(read(path, "responses")) == wanted
    assert len(again) == 7
    again.remove(["k9", "k4"])
    assert [one["key"] for one in read(path)] == ["k5", "k3", "k1", "k7", "k2", "k8"]


def test_the_file_is_an_sqlite_database_that_says_whose_it_is(tmp_path):
    path = tmp_path / "answers.sqlite"
    Store(path, "screen", {"block": 3, "sites": ("a", "b")}).add([{"row": 0, "name": "x"}])
    pragmas = ("application_id", "user_version", "journal_mode", "integrity_check")
    said = sql(path, *(f"PRAGMA {name}" for name in pragmas), "SELECT * FROM settings")
    assert said[0] == [(int.from_bytes(b"emls", "big"),)]
    assert said[1:4] == [[(1,)], [("delete",)], [("ok",)]]
    assert said[4] == [("kind", '"screen"'), ("block", "3"), ("sites", '["a", "b"]')]
    assert sql(path, "SELECT key, value FROM rows") == [[("0", '{"row": 0, "name": "x"}')]]
    assert os.listdir(tmp_path) == ["answers.sqlite"]


def test_what_is_written_is_synced_and_keeps_a_rollback_journal(tmp_path, monkeypatch):
    store, found = Store(tmp_path / "a.sqlite", "responses"), []
    connect = module._connect

    def watched(path, mode):
        database = connect(path, mode)
        names = ("synchronous", "journal_mode", "busy_timeout")
        found.append([database.execute(f"PRAGMA {name}").fetchone()[0] for name in names])
        return database

    monkeypatch.setattr(module, "_connect", watched)
    store.add([record(0)])
    assert found == [[2, "delete", 60_000]]


@pytest.mark.parametrize(
    "text",
    ["line\u2028break\nand\r\x00more", "ä 🙂", "half \ud83d of a pair", "'; DROP TABLE rows"],
)
def test_any_text_is_kept(tmp_path, text):
    path = tmp_path / "a.sqlite"
    assert Store(path, "responses").add([{"key": "k", "text": text}]) == list(read(path))
    assert next(read(path))["text"] == text
    assert export(path, tmp_path / "out.jsonl") == 1
    (line,) = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(line)["text"] == text


def test_a_store_may_have_any_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a store", "50%#?.db", "ä&b=c", "sub/../answers.sqlite"):
        Path("sub").mkdir(exist_ok=True)
        Store(name, "scores").add([record(1)])
        assert list(read(name)) == [record(1)]


def test_a_store_may_be_reached_through_links(tmp_path):
    real, link = tmp_path / "real" / "a.sqlite", tmp_path / "link.sqlite"
    real.parent.mkdir()
    link.symlink_to(real)
    Store(link, "responses").add([record(1)])
    assert link.is_symlink()
    assert list(read(link)) == list(read(real)) == [record(1)]
    real.unlink()
    half_written(real)
    before = seen(tmp_path)
    assert list(read(link)) == [record(i) for i in range(50)]
    assert seen(tmp_path) == before
    assert Store(link, "responses").add([record(50)]) == [record(50)]
    assert list(read(real)) == [record(i) for i in range(51)]
    assert os.listdir(real.parent) == ["a.sqlite"]


def strange(name: str, folder: Path) -> Path:
    """A file that is no store."""
    path = folder / name
    if name == "folder.sqlite":
        path.mkdir()
    elif name == "pipe.sqlite":
        os.mkfifo(path)
    elif name == "other.sqlite":
        sql(path, "CREATE TABLE settings (name, value)", "INSERT INTO settings VALUES (1, 2)")
    elif name == "log.sqlite":
        sql(path, "PRAGMA journal_mode=WAL", "CREATE TABLE mine (a)")
    elif name in ("cut.sqlite", "short.sqlite", "newer.sqlite"):
        Store(path, "responses").add(record(i, "long " * 400) for i in range(9))
        if name == "newer.sqlite":
            sql(path, "PRAGMA user_version=2")
        else:
            path.write_bytes(path.read_bytes()[: 6000 if name == "cut.sqlite" else 50])
    else:
        path.write_bytes(CONTENT[name])
    return path


CONTENT = {
    "mine.json": b'{"a": 1, "b": [2]}',
    "lines.jsonl": b'{"text": "a"}\n{"text": "b"}\n',
    "list.json": b"[\n1,\n2]\n",
    "deep.json": b"[" * 200_000,
    "empty.sqlite": b"",
    "empty.jsonl": b"",
    "noise.sqlite": bytes(range(256)) * 40,
    "words.txt": "drei Wörter".encode("latin-1"),
    "blank.jsonl": b"\n\n",
    "null.jsonl": b"null\n",
}
SPECIAL = {
    "folder.sqlite": "it is a folder",
    "pipe.sqlite": "it is not a regular file",
    "other.sqlite": "an SQLite database of another program",
    "log.sqlite": "an SQLite database of another program",
    "short.sqlite": "a part of an SQLite database",
    "cut.sqlite": r"is damaged \(database disk image is malformed\); restore a copy",
    "newer.sqlite": r"of a later version of emlens \(2\)",
    "empty.sqlite": "it is empty",
    "empty.jsonl": "it is empty",
    "mine.json": r"\(line 1: it has no field key.*\); it was left as it is",
    "null.jsonl": r"\(line 1: it is not a JSON object\); it was left as it is",
}


@pytest.mark.parametrize("name", [*CONTENT, *(n for n in SPECIAL if n not in CONTENT)])
def test_a_file_that_is_no_store_is_refused_and_not_touched(tmp_path, name):
    path = strange(name, tmp_path)
    before = seen(tmp_path)
    said = SPECIAL.get(name, r"is not a store of emlens \(line 1: .*\); it was left as it is")
    for use in (
        lambda: Store(path, "responses"),
        lambda: list(read(path, "responses")),
        lambda: export(path, tmp_path / "out.jsonl"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            use()
        assert str(path) in str(caught.value)
    if name not in ("cut.sqlite", "newer.sqlite"):
        with pytest.raises(ValueError, match=r"give another path"):
            Store(path, "responses")
    assert {**seen(tmp_path), "folder": 0} == {**before, "folder": 0}
    assert os.listdir(tmp_path) == [name]


def test_a_store_of_another_kind_or_with_other_settings_is_refused(tmp_path):
    path = tmp_path / "a.sqlite"
    Store(path, "screen", {"block": 3, "site": "x", "own": None})
    before = seen(tmp_path)
    with pytest.raises(ValueError, match=r"a.sqlite is a store of kind 'screen', not 'scores'"):
        Store(path, "scores")
    with pytest.raises(ValueError, match=r"is a store of kind 'screen', not 'responses'; give"):
        read(path, "responses")
    Store(path, "screen", {"own": None, "site": "x", "block": 3})
    with pytest.raises(
        ValueError,
        match=r"a.sqlite was made with other settings \(block: 3 there, 4 now; "
        r"site: 'x' there, 'y' now\); choose another file, or delete it to start anew",
    ):
        Store(path, "screen", {"block": 4, "site": "y", "own": None})
    assert seen(tmp_path) == before


@pytest.mark.parametrize("name", ["new.json", "new.jsonl", "new.CSV"])
def test_a_new_store_does_not_take_the_name_of_another_kind_of_file(tmp_path, name):
    with pytest.raises(ValueError, match=r"a store is an SQLite file; .* such as new.sqlite"):
        Store(tmp_path / name, "responses")
    with pytest.raises(FileNotFoundError, match="no file"):
        read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no file"):
        is_store(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_reading_writes_nothing_also_in_a_folder_that_cannot_be_written(tmp_path):
    folder = tmp_path / "shared"
    path = folder / "a.sqlite"
    Store(path, "responses").add(record(i) for i in range(3))
    path.chmod(0o444)
    folder.chmod(0o555)
    before = seen(folder)
    try:
        assert list(read(path, "responses")) == [record(i) for i in range(3)]
        export(path, tmp_path / "out.jsonl")
    finally:
        folder.chmod(0o755)
    assert seen(folder) == before


OLD = b'{"key": "a", "text": "line\\nbreak"}\n{"key": "b"}\n{"key": "a", "text": "again"}\n'


def test_a_store_in_json_lines_is_read_and_never_written(tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_bytes(OLD + b'{"key": "c", "te')
    before = seen(tmp_path)
    wanted = [{"key": "a", "text": "line\nbreak"}, {"key": "b"}]
    assert list(read(path)) == list(read(path, "scores")) == wanted
    with pytest.raises(
        ValueError,
        match="old.jsonl is a store of an earlier version of emlens, .* Responses.load reads it. "
        "Give a new path, such as old.sqlite",
    ):
        Store(path, "responses")
    assert seen(tmp_path) == before
    path.write_bytes(OLD[:-1])
    assert list(read(path)) == wanted
    path.write_bytes(b'{"key": "a"}\n{"nokey": 1}\n{"key": "b"}\n')
    with pytest.raises(ValueError, match=r"old.jsonl, line 2: not a record of a store"):
        list(read(path))


def test_export_writes_a_new_file_and_nothing_else(tmp_path):
    path, out = tmp_path / "a.sqlite", tmp_path / "new" / "out.jsonl"
    Store(path, "responses").add(record(i) for i in range(3))
    assert export(path, out) == 3
    lines = out.read_text().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [record(i) for i in range(3)]
    assert list(read(out)) == list(read(path))
    (tmp_path / "link.jsonl").symlink_to(path)
    before = path.read_bytes()
    for target in (path, tmp_path / "link.jsonl"):
        with pytest.raises(FileExistsError, match="is the store itself; give the path of a new"):
            export(path, target)
    with pytest.raises(FileExistsError, match="out.jsonl is there already"):
        export(path, out)
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError, match="no file"):
        export(tmp_path / "none", tmp_path / "x.jsonl")
    out.write_bytes(OLD + b"torn\nrow\n")
    with pytest.raises(ValueError, match="line 4"):
        export(out, tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()
    assert len(os.listdir(tmp_path)) == 3


WRITER = """
    import sys
    from emlens._store import Store
    store, me = Store(sys.argv[1], "responses", {"a": 1}), sys.argv[2]
    kept = [store.add([{"key": i, "by": me}, {"key": i + 1, "by": me}])[0]["by"]
            for i in range(0, 60)]
    print(*kept)
"""


def test_two_processes_keep_each_row_once_and_both_get_the_one_that_was_first(tmp_path):
    path = tmp_path / "a.sqlite"
    writers = [python(WRITER, path, name) for name in "ABC"]
    told = [writer.communicate(timeout=300)[0].split() for writer in writers]
    kept = {one["key"]: one["by"] for one in read(path)}
    assert len(list(read(path))) == len(kept) == 61
    assert told[0] == told[1] == told[2] == [kept[i] for i in range(60)]
    assert os.listdir(tmp_path) == ["a.sqlite"]


def test_a_store_that_stays_locked_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.1)
    path = tmp_path / "a.sqlite"
    store = Store(path, "responses")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TimeoutError, match="a.sqlite: another process has been writing"):
            store.add([record(0)])
    assert store.add([record(0)]) == [record(0)]


KILLED = """
    import sys
    from emlens._store import Store
    store = Store(sys.argv[1], "responses")
    start = len(store)
    for i in range(start, start + 10**6, 8):
        # larger than SQLite holds back, so that a kill may find a part in the file
        store.add({"key": k, "text": str(k) * 20000} for k in range(i, i + 8))
        print(i + 8, flush=True)
"""


def test_a_kill_at_any_moment_loses_the_rows_in_flight_and_nothing_else(tmp_path):
    path, generator, done = tmp_path / "a.sqlite", random.Random(0), 0
    for _ in range(10):
        writer = python(KILLED, path)
        for _ in range(generator.randint(1, 4)):
            done = int(writer.stdout.readline())
        time.sleep(generator.uniform(0, 0.03))
        writer.kill()
        told = [int(line) for line in writer.communicate()[0].split()]
        done = max([done, *told])
        before = seen(tmp_path)
        kept = [one["key"] for one in read(path)]
        assert seen(tmp_path) == before
        assert kept == list(range(len(kept)))
        assert len(kept) in (done, done + 8)
    store = Store(path, "responses")
    assert all(one["text"] == str(one["key"]) * 20000 for one in store)
    store.add([record(0)])
    assert sql(path, "PRAGMA integrity_check") == [[("ok",)]]
    assert os.listdir(tmp_path) == ["a.sqlite"]


HALF = """
    import os, signal, sys
    import emlens._store as module
    connect = module._connect

    class Killed:
        def __init__(self, database):
            self.database = database

        def execute(self, statement, *given):
            if statement == "COMMIT":
                os.kill(os.getpid(), signal.SIGKILL)
            return self.database.execute(statement, *given)

        def executemany(self, *given):
            return self.database.executemany(*given)

    def small(path, mode):
        database = connect(path, mode)
        # pages go to the file before the end of the transaction
        database.execute("PRAGMA cache_size=2")
        return Killed(database)

    store = module.Store(sys.argv[1], "responses")
    module._connect = small
    store.add({"key": 1000 + i, "text": "x" * 3000} for i in range(200))
"""


def half_written(path: Path) -> Path:
    """A store that a process was killed over, with a part of its transaction in the file."""
    Store(path, "responses").add(record(i) for i in range(50))
    size = path.stat().st_size
    python(HALF, path).wait()
    assert path.stat().st_size > size and Path(f"{path}-journal").stat().st_size > 0
    return path


def test_a_half_written_transaction_is_read_around_and_then_undone_by_a_writer(tmp_path):
    path = half_written(tmp_path / "a.sqlite")
    before = seen(tmp_path)
    assert list(read(path, "responses")) == [record(i) for i in range(50)]
    with pytest.raises(ValueError, match="not 'scores'"):
        Store(path, "scores")
    assert seen(tmp_path) == before
    assert Store(path, "responses").add([record(50)]) == [record(50)]
    assert list(read(path)) == [record(i) for i in range(51)]
    assert os.listdir(tmp_path) == ["a.sqlite"]
    assert sql(path, "PRAGMA integrity_check") == [[("ok",)]]


DIES = """
    import os, signal, sys
    import emlens._store as module
    link = os.link
    module.os.link = lambda *names: (link(*names), os.kill(os.getpid(), signal.SIGKILL))
    module.Store(sys.argv[1], "responses")
"""


def test_what_a_kill_at_the_making_of_a_store_leaves_is_gone_with_the_next_writer(tmp_path):
    path = tmp_path / "a.sqlite"
    python(DIES, path).wait()
    assert len(os.listdir(tmp_path)) == 2
    assert list(read(path)) == []
    assert len(os.listdir(tmp_path)) == 2
    assert Store(path, "responses").add([record(0)]) == [record(0)]
    assert os.listdir(tmp_path) == ["a.sqlite"]


FORKED = """
    import os, sys, threading, warnings
    import emlens._store as module
    store, busy = module.Store(sys.argv[1], "responses"), threading.Event()
    connect = module._connect

    class Slow:
        def __init__(self, database):
            self.database, self.close = database, database.close

        def execute(self, statement, *given):
            if statement == "COMMIT":
                busy.set()
                threading.Event().wait(0.3)
            return self.database.execute(statement, *given)

        def executemany(self, *given):
            return self.database.executemany(*given)

    module._connect = lambda *given: Slow(connect(*given))
    thread = threading.Thread(target=store.add, args=([{"key": "thread"}],))
    thread.start()
    busy.wait()
    warnings.simplefilter("ignore")
    child = os.fork()
    if not child:
        store.add([{"key": "child"}])
        os._exit(0)
    thread.join()
    print(os.waitpid(child, 0)[1])
"""


def test_a_process_that_forks_while_a_thread_writes_leaves_the_child_a_store(tmp_path):
    path = tmp_path / "a.sqlite"
    parent = python(FORKED, path)
    try:
        assert parent.communicate(timeout=30)[0] == "0\n"
    finally:
        # the child, too
        parent.kill()
    assert [one["key"] for one in read(path)] == ["thread", "child"]
    assert sql(path, "PRAGMA integrity_check") == [[("ok",)]]


def test_a_copy_that_another_process_changed_meanwhile_is_not_used(tmp_path, monkeypatch):
    path, copyfile, tries = half_written(tmp_path / "a.sqlite"), module.shutil.copyfile, []

    def meddled(source, target):
        if not tries:
            # another writer undoes what was left, and writes a row of its own
            sql(path, "INSERT INTO rows (key, value) VALUES ('new', '{\"key\": \"new\"}')")
        tries.append(source)
        return copyfile(source, target)

    monkeypatch.setattr(module.shutil, "copyfile", meddled)
    assert [one["key"] for one in read(path)] == [*(f"k{i}" for i in range(50)), "new"]


FULL = """
    import resource, sys
    from emlens._store import Store
    store, n = Store(sys.argv[1], "responses"), 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        while True:
            store.add({"key": f"{n} {i}", "text": "x" * 1000} for i in range(10))
            n += 1
    except OSError as error:
        print(n, error)
"""


def test_a_file_that_may_not_grow_is_an_error_and_the_store_stays_readable(tmp_path):
    path = tmp_path / "a.sqlite"
    number, _, said = python(FULL, path).communicate(timeout=120)[0].partition(" ")
    assert int(number) > 5
    assert said.startswith(f"{path}: ") and "Make room on the disk" in said
    assert len(list(read(path))) == 10 * int(number)
    assert sql(path, "PRAGMA integrity_check") == [[("ok",)]]


def test_a_full_disk_is_an_error_and_the_store_stays_readable(tmp_path, monkeypatch):
    path, connect = tmp_path / "a.sqlite", module._connect
    store = Store(path, "responses")

    def full(path, mode):
        database = connect(path, mode)
        database.execute("PRAGMA max_page_count=20")
        return database

    with monkeypatch.context() as patch:
        patch.setattr(module, "_connect", full)
        kept = 0
        with pytest.raises(OSError, match="a.sqlite: database or disk is full; .* Make room"):
            for kept in range(1000):
                store.add([{"key": kept, "text": "x" * 2000}])
    assert len(list(read(path))) == kept > 5
    store.add([record(0)])
    assert len(store) == kept + 1


def test_a_record_that_is_too_long_is_no_damage(tmp_path, monkeypatch):
    path, connect = tmp_path / "a.sqlite", module._connect
    store = Store(path, "responses")
    store.add([record(0)])

    def limited(path, mode):
        database = connect(path, mode)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
        return database

    monkeypatch.setattr(module, "_connect", limited)
    with pytest.raises(ValueError, match=r"a.sqlite: a record is too long for a store \(.*big\)"):
        store.add([record(1), record(2, "x" * 20_000)])
    assert list(store) == [record(0)]


def test_a_store_that_is_gone_or_damaged_meanwhile_is_named(tmp_path):
    path = tmp_path / "a.sqlite"
    store = Store(path, "responses")
    store.add([record(0)])
    sql(path, "UPDATE rows SET value = '{\"key\"'")
    with pytest.raises(ValueError, match="a.sqlite, row 1: damaged"):
        list(store)
    path.unlink()
    with pytest.raises(OSError, match="a.sqlite: unable to open database file"):
        store.add([record(1)])
    assert os.listdir(tmp_path) == []


def test_threads_share_a_store(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    path = tmp_path / "a.sqlite"
    store = Store(path, "responses")

    def work(i: int) -> int:
        is_store(path)
        return len(store.add([record(i), record(i + 1)]) + list(read(path)))

    with ThreadPoolExecutor(8) as pool:
        assert min(pool.map(work, range(60))) > 2
    assert sorted(one["key"] for one in store) == sorted(f"k{i}" for i in range(61))


def test_a_file_system_without_links_has_stores_too(tmp_path, monkeypatch):
    def none(*_):
        raise OSError("no links here")

    monkeypatch.setattr(module.os, "link", none)
    Store(tmp_path / "a.sqlite", "responses").add([record(0)])
    Store(tmp_path / "a.sqlite", "responses").add([record(1)])
    assert list(read(tmp_path / "a.sqlite")) == [record(0), record(1)]
    assert os.listdir(tmp_path) == ["a.sqlite"]
