"""Make the goldens again, by hand, where a number is to change: `python -m tests.goldens.make`.

Names of goldens make these alone, and say what changes.

`--bits` writes nothing and says which numbers are not bit for bit the kept ones; that holds only
on the machine, and for the versions, that they were made with.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch  # noqa: E402

import emlens  # noqa: E402
from tests.goldens import all_goldens, of_real  # noqa: E402
from tests.goldens.files import make_files  # noqa: E402
from tests.goldens.golden import (  # noqa: E402
    GOLDENS,
    World,
    differences,
    plain,
    read_numbers,
    write_numbers,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", action="store_true", help="compare bit for bit, write nothing")
    parser.add_argument("names", nargs="*", help="goldens to make alone; all by default")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.names:
        return some(asked.names)
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        computed = {name: one.compute(world) for name, one in GOLDENS.items()}
    lines: list[str] = []
    for group in all_goldens.GROUPS:
        of_group = {n: plain(found) for n, found in computed.items() if n.startswith(f"{group}: ")}
        if asked.bits:
            lines += differences(read_numbers(group), of_group, 0.0, 0.0)
        else:
            write_numbers(group, of_group)
            print(f"{group}: {len(of_group)} goldens")
    real = {"real": plain(of_real.numbers(emlens.load("smollm2-135m-instruct")))}
    if asked.bits:
        lines += differences(read_numbers("real"), real, 0.0, 0.0)
    else:
        write_numbers("real", real)
    print(*lines, sep="\n", end="\n" if lines else "")
    if not asked.bits:
        numbers = make_files(computed)
        write_numbers("files", numbers)
        print(f"files: {len(numbers)}")
    return 1 if lines else 0


def some(names: list[str]) -> int:
    """Make a few goldens again, and print what changes in them."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for name in names:
            group = name.partition(":")[0]
            kept, found = read_numbers(group), plain(GOLDENS[name].compute(world))
            one = GOLDENS[name]
            print(*differences({name: kept[name]}, {name: found}, one.rtol, one.atol), sep="\n")
            write_numbers(group, {**kept, name: found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
