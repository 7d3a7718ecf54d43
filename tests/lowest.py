"""The lowest versions that `pyproject.toml` allows, as constraints for pip.

`make test-lowest` installs them and runs the suite. PyTorch stays as `constraints.txt` has it: any
other build takes gigabytes.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("torch",)
_BOUND = re.compile(r"(?P<name>[\w.-]+)(\[[\w,]+\])?>=(?P<version>[\w.]+)")


def lowest(text: str) -> dict[str, str]:
    """`{name: lowest version}` of all that the package and its extras need."""
    project = tomllib.loads(text)["project"]
    every = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    bounds = [_BOUND.match(entry) for entry in every]
    found: dict[str, str] = {}
    for entry, bound in zip(every, bounds, strict=True):
        if bound is None:
            raise ValueError(f"{entry} has no lower bound")
        found[bound["name"]] = bound["version"]
    return {name: version for name, version in found.items() if name not in KEPT}


if __name__ == "__main__":
    kept = [
        line
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if line.split("==")[0] in KEPT
    ]
    bounds = lowest((ROOT / "pyproject.toml").read_text("utf-8"))
    print("\n".join([*kept, *(f"{name}=={version}" for name, version in bounds.items())]))
