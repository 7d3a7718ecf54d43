"""Files of every kind, damaged, and what their readers make of them.

`python -m tests.fuzz.files --cases 10000` prints how many readings ended in which way:

clear: an error of emlens that names the file. right: it is read, and what was read can be used.
unclear: another's error, or one without the file's name. silent: it is read, and its use fails.
hanging: no answer in ten seconds of the processor, or a minute of waiting.
hungry: it takes more memory than ten times the file, and 32 MB besides.
"""

from __future__ import annotations

import multiprocessing
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fuzz import damage
from tests.fuzz.outcome import OURS, TooLong, account, main, too_long
from tests.fuzz.readers import Reader, readers

SECONDS, MEGABYTES = 10, 300
"""Of a case: its time, and the memory that it is never given more of."""

TIMES, FREE = 10, 32 * 2**20
"""Memory that a reading may take: so many times the file, and so many bytes besides."""


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
            damages = [partial(_at_random, reader, f"{name} {seed} {n}") for n in range(share)]
            for case, (kind, said) in enumerate(_child(name, reader, places[1], damages)):
                counts[name, kind] += 1
                if kind not in ("clear", "right"):
                    faults.append(f"{kind}: {name}, case {case} of seed {seed}: {said}")
    return counts, faults


def _child(
    name: str, reader: Reader, place: Path, damages: Sequence[Callable[[Path], object]]
) -> list[tuple[str, str]]:
    """Damage the file and read it, in a process of its own that may take only so much memory."""
    found: list[tuple[str, str]] = []
    while len(found) < len(damages):
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        work = (reader, place, damages[len(found) :], theirs)
        process = context.Process(target=_work, args=work)
        process.start()
        theirs.close()
        while len(found) < len(damages):
            if not ours.poll(6 * SECONDS):
                found.append(("hanging", "the process had to be killed"))
                break
            try:
                said = ours.recv()
            except EOFError:
                process.join()
                found.append(("hungry", f"the process died ({process.exitcode})"))
                break
            if isinstance(said, str):
                raise RuntimeError(f"case {len(found)} of {name} was not made: {said}")
            found.append(said)
        process.kill()
        process.join()
    return found


def _work(
    reader: Reader, place: Path, damages: Sequence[Callable[[Path], object]], pipe: Connection
) -> None:
    try:
        # what is imported on the way is no memory of the file's
        reader.use(reader.read(_copied(reader, place)))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEGABYTES * 2**20,) * 2)
        signal.signal(signal.SIGPROF, too_long)
        warnings.simplefilter("ignore")
        sys.stderr = open("/dev/null", "w", encoding="utf-8")  # noqa: SIM115
        for damaged in damages:
            pipe.send(_outcome(reader, place, damaged))
    except Exception:
        pipe.send(traceback.format_exc())
    pipe.close()


def _copied(reader: Reader, place: Path) -> Path:
    shutil.rmtree(place)
    place.mkdir()
    whole = place / reader.file.name
    (shutil.copytree if reader.inside else shutil.copy)(reader.file, whole)
    return whole


def _outcome(reader: Reader, place: Path, damaged: Callable[[Path], object]) -> tuple[str, str]:
    whole = _copied(reader, place)
    path = whole / reader.inside if reader.inside else whole
    damaged(path)
    size = path.stat().st_size if path.is_file() else 0
    before = _peak(reset=True)
    kind, said = _read(reader, whole, path)
    taken = _peak() - before
    if kind in ("clear", "right") and taken > TIMES * size + FREE:
        return "hungry", f"{taken:,} bytes for a file of {size:,} ({kind}; {said})"
    return kind, said


def _at_random(reader: Reader, drawn: str, path: Path) -> None:
    """One damage, the same for the same words."""
    random_ = random.Random(drawn)
    data = path.read_bytes()
    draw = random_.random()
    if draw < 0.05:
        damage.in_place_of(path, random_.choice(damage.INSTEAD))
    elif reader.damages and draw < 0.6:
        path.write_bytes(random_.choice(reader.damages)(data, random_))
    else:
        path.write_bytes(damage.of_bytes(data, random_))


def _peak(reset: bool = False) -> int:
    """The most memory that this process has held, in bytes, since it was reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


def _read(reader: Reader, whole: Path, damaged: Path) -> tuple[str, str]:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        found = reader.read(whole)
        try:
            reader.use(found)
        except TooLong:
            raise
        except Exception as error:
            return "silent", account(error)
        return "right", ""
    except TooLong as error:
        return "hanging", account(error)
    except MemoryError as error:
        return "hungry", account(error)
    except BaseException as error:
        if "allocate memory" in str(error):
            return "hungry", account(error)
        ours = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(OURS)
        told = isinstance(error, (OSError, ValueError)) and not isinstance(error, UnicodeError)
        named = any(path.name in str(error) for path in (whole, damaged))
        return "clear" if ours and told and named else "unclear", account(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main(__doc__, outcomes)
