"""Work that is killed at random times, and started again until it is done.

All of it runs in forks of one process, which has imported the tests once: a kill costs nothing but
the work. `EMLENS_KILLS=100 pytest -k killed` kills a hundred times.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

KILLS = int(os.environ.get("EMLENS_KILLS", "3"))
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Killed:
    """What was left.

    Attributes:
        whole: The folder of the work that was left alone.
        ends: The folders of work that was killed, each started again until it was done.
        kills: How many times there was a kill.
    """

    whole: Path
    ends: tuple[Path, ...]
    kills: int


def killed(
    work: Callable[..., object], folder: Path, *arguments: str, kills: int = KILLS, seed: int = 0
) -> Killed:
    """Do work as a whole, then kill it and start it again until `kills` kills are reached.

    Args:
        work: A function of a test module. It is called with a folder, the same after each kill,
            and `arguments`; all that it leaves lies there.
        folder: An empty folder.
        *arguments: Given to `work`.
        kills: How many; with 0, the work is killed only where it kills itself.
        seed: Of the times at which it is killed.

    Raises:
        AssertionError: If the work fails; its traceback is in the message.
    """
    answer = _ask("kill", work, folder, arguments=arguments, kills=kills, seed=seed)
    ends = tuple(folder / name for name in answer["ends"])
    return Killed(folder / "whole", ends, answer["kills"])


def together(work: Callable[..., object], folder: Path, *names: str) -> None:
    """Do work in several processes at once: `work(folder, name)` for each name.

    Raises:
        AssertionError: If the work fails; its traceback is in the message.
    """
    _ask("at_once", work, folder, names=names)


def meet(folder: Path, name: str, *others: str, seconds: float = 60) -> None:
    """Wait in one process until the others are there as well."""
    (folder / name).touch()
    end = time.monotonic() + seconds
    while not all((folder / other).exists() for other in others):
        if time.monotonic() > end:
            raise TimeoutError(f"{', '.join(others)}: not all came")
        time.sleep(0.001)


def files(folder: Path, but: Collection[str] = ()) -> dict[str, bytes]:
    """The files in a folder and in those below, by name; `but` names those to leave out."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(paths.items()) if name not in but}


def rows(path: Path) -> list[tuple[str, dict]]:
    """The rows of a store with their keys, in their order, by SQLite alone."""
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found = database.execute("SELECT key, value FROM rows ORDER BY n").fetchall()
    return [(key, json.loads(value)) for key, value in found]


def _ask(what: str, work: Callable[..., object], folder: Path, **details: object) -> dict:
    server, log = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    request = {"what": what, "work": [work.__module__, work.__qualname__], "folder": str(folder)}
    server.stdin.write(json.dumps(request | details) + "\n")
    server.stdin.flush()
    answer = json.loads(server.stdout.readline() or '{"error": "the server has ended"}')
    assert "error" not in answer, f"{answer['error']}\n{Path(log).read_text()[-3000:]}"
    return answer


@cache
def _server() -> tuple[subprocess.Popen[str], str]:
    log = tempfile.NamedTemporaryFile(prefix="kills-", suffix=".log")  # noqa: SIM115
    server = subprocess.Popen(
        [sys.executable, "-c", "from tests.support.kills import serve; serve()"],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )

    def stop() -> None:
        assert server.stdin is not None
        with suppress(OSError):
            server.stdin.close()
        server.wait(60)
        log.close()

    atexit.register(stop)
    return server, log.name


# -- in the other process ------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until there are none; what the work prints goes to the log."""
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = _answer(**json.loads(line))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(what: str, work: tuple[str, str], folder: str, **details: Any) -> dict:
    function = getattr(import_module(work[0]), work[1])
    return {"kill": _kill, "at_once": _at_once}[what](function, folder, **details)


def _at_once(function: Callable[..., object], folder: str, names: list[str]) -> dict:
    children = []
    for name in names:
        children.append(os.fork())
        if not children[-1]:
            _work(function, Path(folder), [name])
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise RuntimeError(f"the work failed in {folder} (statuses {statuses})")
    return {}


def _kill(
    function: Callable[..., object], folder: str, arguments: list[str], kills: int, seed: int
) -> dict:
    chance, done, ends = random.Random(seed), 0, []
    start = time.monotonic()
    if kills and not _finishes(function, Path(folder, "whole"), arguments, None):
        raise RuntimeError("the work killed itself")
    whole = time.monotonic() - start
    while done < kills or not ends:
        ends.append(f"killed {len(ends)}")
        tries = 0
        while True:
            # short, so that there are several kills before the end, but longer each time, so that
            # there is an end on a machine that has become slower
            life = chance.uniform(0, whole * (2 + tries) / 4) if done < kills else None
            if _finishes(function, Path(folder, ends[-1]), arguments, life):
                break
            done, tries = done + 1, tries + 1
    return {"ends": ends, "kills": done}


def _finishes(
    function: Callable[..., object], folder: Path, arguments: list[str], life: float | None
) -> bool:
    """Whether work in a fork is done before it is killed."""
    folder.mkdir(exist_ok=True)
    start, child = time.monotonic(), os.fork()
    if not child:
        _work(function, folder, arguments)
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        if life is not None and time.monotonic() - start > life:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.001)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        raise RuntimeError(f"the work failed in {folder} (status {status})")
    return True


def _work(function: Callable[..., object], folder: Path, arguments: list[str]) -> None:
    status = 1
    try:
        function(folder, *arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
