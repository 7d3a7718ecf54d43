"""What is imported is declared, and what is declared has a bound below."""

from __future__ import annotations

import ast
import sys
import tomllib

import pytest

from tests.lowest import ROOT, lowest

# names of modules whose packages are called otherwise
PACKAGES = {
    "PIL": "pillow",
    "inspect_ai": "inspect-ai",
    "huggingface_hub": "huggingface-hub",
    "sklearn": "scikit-learn",
    "transformer_lens": "transformer-lens",
    "websocket": "websocket-client",
    "yaml": "pyyaml",
}
OPTIONAL = {"steering_vectors", "repeng"}
"""Imported where a user has objects of theirs."""


def imported() -> set[str]:
    found: set[str] = set()
    for path in (ROOT / "emlens").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"emlens"} - OPTIONAL


def test_every_library_that_is_imported_is_declared_and_the_other_way_round():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    project = tomllib.loads(text)["project"]
    known = {*lowest(text), "torch"}
    wanted = {PACKAGES.get(name, name) for name in imported()}
    assert wanted <= known, f"imported, but not declared: {sorted(wanted - known)}"
    core = {entry.split(">=")[0] for entry in project["dependencies"]}
    assert core <= wanted, f"declared, but never imported: {sorted(core - wanted)}"


def test_a_bound_is_read_and_a_missing_one_is_an_error():
    text = '[project]\ndependencies = ["a>=1.2,<2", "torch>=2.6"]\n'
    assert lowest(text + '[project.optional-dependencies]\nx = ["b[c]>=3"]') == {
        "a": "1.2",
        "b": "3",
    }
    with pytest.raises(ValueError, match="d has no lower bound"):
        lowest(text + '[project.optional-dependencies]\nx = ["d"]')
