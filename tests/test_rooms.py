"""The shape of the package: which room may import which, how long things are, what is public."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import Unpack

import pytest

import emlens
from emlens import directions, hooked, training, watch
from emlens._door import options_of
from emlens.directions.counting import Counting
from emlens.hooked.generation import Sampling
from emlens.hooked.options import BatchSettings, CorpusSettings, ReadSettings
from emlens.training.options import Recording
from emlens.watch.screen_scorer import ScreenSettings

PACKAGE = Path(emlens.__file__).parent
# From right to left: a room may import those before it.
ROOMS = (
    "text",
    "hooked",
    "directions",
    "edits",
    "measures",
    "fisher",
    "watch",
    "training",
    "evals",
    "study",
    "cli",
)
MAX_CODE_LINES = 350
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 12
MAX_NAMES = 200
SUBROOMS = ("evals.inspect",)
UNLISTED = {
    "hooked.load": "arguments of from_pretrained",
    "study.StudySettings.with_options": "fields of the settings",
}
"""Where `**options` are of no group, and what they are."""
OPTIONS = [
    (hooked.BatchOptions, [BatchSettings]),
    (hooked.ReadOptions, [ReadSettings]),
    (hooked.CorpusOptions, [CorpusSettings]),
    (hooked.SamplingOptions, [Sampling]),
    (directions.CountingOptions, [Counting]),
    (watch.ScreenOptions, [ScreenSettings]),
    (training.VectorOptions, [training.VectorSettings, Recording]),
    (training.AdapterOptions, [training.AdapterSettings, Recording]),
    (training.WeightOptions, [training.WeightSettings, Recording]),
]
ORDER = (
    {"model"},
    {
        *("data", "dataset", "conversations", "corpus", "pairs", "questions", "train", "inside"),
        *("outside", "classes", "aligned", "misaligned", "behaviour", "behaviours"),
    },
    {
        *("direction", "directions", "condition", "conditions", "adapter", "organism", "organisms"),
        *("run", "kl", "weights"),
    },
)
"""What comes first: the model, what it reads, then what it is measured under."""
HEAVY = {"torch", "transformers", "matplotlib", "numpy", "pandas", "nnsight", "datasets"}


def _sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _room(parts: tuple[str, ...]) -> str | None:
    """The room of a dotted path below `emlens`; None for the top and the private floor.

    `python -m emlens` is the command line.
    """
    if parts == ("__main__",):
        return "cli"
    if not parts or parts[0].startswith("_"):
        return None
    return emlens._HOMES.get(parts[0], parts[0])


def _targets(node: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Dotted paths that an import statement, or a call of `import_module`, reaches."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield tuple(alias.name.split("."))
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else ()
        module = (*base, *(node.module.split(".") if node.module else ()))
        for alias in node.names:
            yield (*module, alias.name)
    elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
        for argument in node.args[:1]:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield tuple(argument.value.split("."))


def _wrong_arrows(path: Path, root: Path) -> list[str]:
    """Imports of one file that go against the arrows, each with its place."""
    parts = path.relative_to(root).with_suffix("").parts
    room = _room(parts)
    package = ("emlens", *parts[:-1])
    wrong = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for target in _targets(node, package):
            if target[0] != "emlens":
                continue
            complaint = _complaint(room, target[1:])
            if complaint:
                line = getattr(node, "lineno", 0)
                wrong.append(f"{path.relative_to(root.parent)}:{line}: {complaint}")
    return wrong


def _complaint(room: str | None, target: tuple[str, ...]) -> str | None:
    reached = _room(target)
    if not target and room != "cli":
        return f"{room or 'the floor'} imports emlens itself; import the room that is meant"
    if reached is None or reached == room or target == ("__version__",):
        return None
    if room is None or room == "figures":
        return f"{room or 'the floor'} imports the room {reached}"
    if reached == "figures":
        return None
    if reached not in ROOMS:
        return f"{room} imports emlens.{reached}, which is no room"
    if ROOMS.index(reached) > ROOMS.index(room):
        return f"{room} imports {reached}, a room to its left"
    return None


def test_every_module_belongs_to_a_known_room():
    found = {_room(path.relative_to(PACKAGE).with_suffix("").parts) for path in _sources()}
    assert found <= {*ROOMS, "figures", None}


def test_no_room_imports_a_room_to_its_left():
    sources = [path for path in _sources() if path != PACKAGE / "__init__.py"]
    wrong = [line for path in sources for line in _wrong_arrows(path, PACKAGE)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "code", "complaint"),
    [
        ("hooked/a.py", "import emlens.edits.base", "hooked imports edits"),
        ("hooked/a.py", "from ..edits import Add", "hooked imports edits"),
        ("hooked/a.py", "from .. import edits", "hooked imports edits"),
        ("hooked/a.py", "from emlens import Add", "hooked imports edits"),
        ("text/a.py", "def f():\n    from emlens.study import run_study", "a.py:2: text imports"),
        ("text/a.py", "if TYPE_CHECKING:\n    from emlens.hooked import load", "text imports"),
        ("text/a.py", "importlib.import_module('emlens.hooked')", "text imports hooked"),
        ("text/a.py", "import emlens", "import the room that is meant"),
        ("figures/a.py", "from emlens.text import Pair", "figures imports the room text"),
        ("_files.py", "from emlens.text import Pair", "the floor imports the room text"),
        ("_files.py", "from emlens.figures import style", "the floor imports the room figures"),
    ],
)
def test_an_import_against_the_arrows_is_found(tmp_path, name, code, complaint):
    path = tmp_path / "emlens" / name
    path.parent.mkdir(parents=True)
    path.write_text(code)
    (found,) = _wrong_arrows(path, tmp_path / "emlens")
    assert complaint in found


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("edits/a.py", "from emlens.directions import Direction"),
        ("edits/__init__.py", "from .base import Edit"),
        ("edits/a.py", "from . import base"),
        ("measures/a.py", "from emlens.figures import style"),
        ("text/a.py", "from emlens._files import write_json"),
        ("text/a.py", "import torch"),
        ("study/a.py", "from emlens import __version__"),
        ("cli.py", "import emlens"),
    ],
)
def test_an_import_along_the_arrows_is_allowed(tmp_path, name, code):
    path = tmp_path / "emlens" / name
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert _wrong_arrows(path, tmp_path / "emlens") == []


def _imports(root: Path) -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """The modules that each module imports, wherever in it: in functions and for types as well."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[parts[:-1] if parts[-1] == "__init__" else parts] = path
    reached: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for module, path in found.items():
        package = path.relative_to(root.parent).parts[:-1]
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        targets = [target for node in nodes for target in _targets(node, package)]
        known = (t if t in found else t[:-1] for t in targets)
        reached[module] = {one for one in known if one in found and one != module}
    return reached


def test_no_imports_run_in_a_circle():
    graph = _imports(PACKAGE)
    graph.pop(("emlens",))  # reaches each room when it is asked for
    list(TopologicalSorter(graph).static_order())


def test_a_circle_of_imports_is_found(tmp_path):
    (tmp_path / "emlens").mkdir()
    (tmp_path / "emlens" / "a.py").write_text("def f():\n    from emlens.b import g")
    (tmp_path / "emlens" / "b.py").write_text("from emlens.a import f")
    with pytest.raises(CycleError):
        list(TopologicalSorter(_imports(tmp_path / "emlens")).static_order())


def _code_lines(text: str) -> int:
    """Lines that are neither blank, nor a comment, nor of a text that stands alone."""
    plain = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(text.splitlines(), 1)
    return sum(
        bool(x.strip()) and not x.strip().startswith("#") and n not in plain for n, x in lines
    )


def test_nothing_in_hooked_is_hidden_from_the_type_checker():
    for path in (PACKAGE / "hooked").rglob("*.py"):
        assert not re.search(r"#.*\bignore\b", path.read_text("utf-8")), path


def test_no_file_has_more_than_350_lines_of_code():
    lengths = {path: _code_lines(path.read_text("utf-8")) for path in _sources()}
    long = [f"{p.relative_to(PACKAGE)}: {n}" for p, n in lengths.items() if n > MAX_CODE_LINES]
    assert not long, "\n".join(long)
    assert _code_lines('"""A text."""\n\n# why\nx = 1\n') == 1


def _length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_function_is_longer_than_60_lines_beside_its_docstring():
    long = []
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            lines = _length(node) - (_length(node.body[0]) if ast.get_docstring(node) else 0)
            if lines > MAX_FUNCTION_LINES:
                place = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                long.append(f"{place}: {node.name} has {lines} lines")
    assert not long, "\n".join(long)


def public_callables() -> Iterator[tuple[str, Callable[..., object]]]:
    """Functions that rooms export, and the methods of the classes that they export."""
    for room in (*emlens._ROOMS, *SUBROOMS):
        module = import_module(f"emlens.{room}")
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield f"{room}.{name}", value
            elif inspect.isclass(value):
                for method, function in inspect.getmembers(value, inspect.isroutine):
                    public = not method.startswith("_")
                    if public and str(getattr(function, "__module__", "")).startswith("emlens"):
                        yield f"{room}.{name}.{method}", function


CALLABLES = dict(public_callables())


def test_no_public_function_has_more_than_12_parameters():
    counts = {name: len(inspect.signature(one).parameters) for name, one in CALLABLES.items()}
    assert len(counts) > 400
    assert {name: n for name, n in counts.items() if n > MAX_PARAMETERS} == {}


def test_options_are_listed_by_a_typed_dict_unless_they_are_another_librarys():
    for name, function in CALLABLES.items():
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD and name not in UNLISTED:
                listed = str(parameter.annotation)
                assert listed.startswith("Unpack["), f"{name}: **{parameter.name}: {listed}"
                said = inspect.getdoc(function) or ""
                assert f"`{listed[7:-1]}`" in said, f"{name} does not name {listed[7:-1]}"


@pytest.mark.parametrize(("options", "settings"), OPTIONS)
def test_every_option_of_a_group_has_its_default_in_the_settings(options, settings):
    defaults = {item.name: item.default for one in settings for item in fields(one)}
    listed = options_of(Unpack[options])
    assert set(listed) <= set(defaults)
    assert MISSING not in [defaults[name] for name in listed]


@pytest.mark.parametrize("name", CALLABLES)
def test_arguments_come_as_model_data_directions_and_options(name):
    names = [
        one.name
        for one in inspect.signature(CALLABLES[name]).parameters.values()
        if one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    places = [place for one in names for place, words in enumerate(ORDER) if one in words]
    assert places == sorted(places), names


def test_importing_emlens_imports_nothing_heavy():
    code = f"import sys, emlens\nheavy = {HEAVY}\nprint(*sorted(heavy & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert done.stderr == ""


def test_all_rooms_together_export_few_names():
    rooms = [import_module(f"emlens.{room}") for room in (*emlens._ROOMS, *SUBROOMS)]
    assert len({(room.__name__, name) for room in rooms for name in room.__all__}) <= MAX_NAMES


def test_at_most_26_names_are_public_and_each_has_a_home():
    assert len(emlens.__all__) <= 26
    assert sorted(emlens.__all__) == sorted(emlens._HOMES)


@pytest.mark.parametrize("name", emlens.__all__)
def test_every_public_name_is_the_one_of_its_room(name):
    room = import_module(f"emlens.{emlens._HOMES[name]}")
    assert getattr(emlens, name) is getattr(room, name)
    assert name in room.__all__
    assert getattr(emlens, name).__doc__


@pytest.mark.parametrize("room", emlens._ROOMS)
def test_rooms_are_reached_from_the_top(room):
    assert getattr(emlens, room) is import_module(f"emlens.{room}")
    assert room in dir(emlens)


def test_an_unknown_name_is_refused_as_python_does():
    with pytest.raises(AttributeError, match="module 'emlens' has no attribute 'loud'"):
        _ = emlens.loud
