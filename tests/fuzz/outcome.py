"""How a case may end, and how the numbers of cases are printed: of files and of arguments."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import emlens

CLASSES = ("clear", "right", "unclear", "silent", "hanging", "hungry")
OURS = str(Path(emlens.__file__).parent)
Counts = Counter[tuple[str, str]]
"""Numbers of cases by what was tried and how it ended."""


class TooLong(BaseException):
    """A case took more than its time."""


def too_long(*_: object) -> None:
    raise TooLong


def account(error: BaseException) -> str:
    """What an error says, and where it comes from."""
    *_, last = (f for f in traceback.extract_tb(error.__traceback__) if f.name != "too_long")
    return f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}:{last.lineno})"


def lines_of(counts: Counts) -> Iterator[str]:
    """The numbers as a table in text."""
    names = list(dict.fromkeys(name for name, _ in counts))
    width = 2 + max(map(len, names), default=3)
    yield " " * width + "".join(f"{kind:>9}" for kind in CLASSES)
    for name in names:
        yield f"{name:{width}}" + "".join(f"{counts[name, kind]:9}" for kind in CLASSES)
    sums = [sum(counts[name, kind] for name in names) for kind in CLASSES]
    yield f"{'all':{width}}" + "".join(f"{n:9}" for n in sums)


def main(about: str | None, outcomes: Callable[[int, int], tuple[Counts, list[str]]]) -> None:
    """Run as many cases as the command line says, and fail where one is neither clear nor right."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    numbers, complaints = outcomes(asked.cases, asked.seed)
    print("\n".join([*lines_of(numbers), "", *complaints]))
    sys.exit(1 if complaints else 0)
