"""Files are opened in one place, and a `~` is the home folder wherever a path comes in."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from typer.testing import CliRunner

import emlens
from emlens import cli
from emlens._door import check_given
from emlens._store import Store, export
from emlens.directions import Directions, Provenance, from_hub, read_directions, write_directions
from emlens.evals import Question, respond
from emlens.figures import save_figure
from emlens.figures.tokens import token_view
from emlens.fisher import InfluenceProfile
from emlens.hooked.embedded import cache_folder
from emlens.study.folder import STUDY
from emlens.study.report import Report, write_report
from emlens.study.settings import StudySettings
from emlens.study.store import StudyStore
from emlens.text import Corpus, Document
from emlens.training import Organism, TrainingPath, TrainingRun
from emlens.watch import Monitor, screen
from tests.fuzz.readers import FILES, readers
from tests.support.data import conversations
from tests.support.models import tiny_hooked

PACKAGE = Path(emlens.__file__).parent
OPENERS = {
    *("open", "read_text", "read_bytes", "write_text", "write_bytes", "safe_open", "load_file"),
    *("json.load", "json.dump", "yaml.load", "yaml.safe_load", "yaml.dump", "yaml.safe_dump"),
    *("torch.load", "torch.save", "np.load", "np.save", "sqlite3.connect", "ZipFile", "mmap"),
    *("read_csv", "read_json", "read_parquet", "to_csv", "to_json", "to_parquet", "expanduser"),
}
ALLOWED = {
    ("cli/common.py", "open(os.devnull, 'w', encoding='utf-8')"),
    ("directions/formats/papers.py", "torch.save(record, data)"),
    ("study/report.py", "Image.open(BytesIO(png))"),
}
"""What is no file: the end of all output, and bytes in memory."""


# -- one place opens -----------------------------------------------------------------------------


def openings(source: str) -> Iterator[str]:
    """Calls that open a file by themselves; what the floor offers under such a name is none."""
    tree = ast.parse(source)
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("emlens._")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            last = called.rpartition(".")[2]
            if (called in OPENERS or last in OPENERS) and called not in ours:
                yield ast.unparse(node)


def test_only_the_floor_opens_files():
    found = {
        (path.relative_to(PACKAGE).as_posix(), call)
        for path in PACKAGE.rglob("*.py")
        if not (path.parent == PACKAGE and path.name.startswith("_"))
        for call in openings(path.read_text(encoding="utf-8"))
    }
    assert found - ALLOWED == set()


@pytest.mark.parametrize(
    "code",
    [
        "path.open('rb')",
        "open(path)",
        "Path(path).read_text()",
        "json.load(file)",
        "yaml.safe_load(text)",
        "torch.load(path)",
        "safe_open(path, framework='pt')",
        "pd.read_csv(path)",
        "sqlite3.connect(path)",
        "path.expanduser()",
    ],
)
def test_an_opening_elsewhere_is_found(code):
    assert list(openings(code)) == [ast.unparse(ast.parse(code))]


@pytest.mark.parametrize(
    "code", ["from emlens._reading import read_json\nread_json(path)", "json.loads(text)"]
)
def test_what_the_floor_offers_is_no_opening(code):
    assert not list(openings(code))


WHOLE = {
    ("cli/values.py", "Path(item)"),
    ("cli/values.py", "Path(source)"),
    ("directions/formats/hub.py", "Path(folder)"),
    ("evals/inspect/config.py", "Path(placed)"),
    ("hooked/embedded.py", "Path(place)"),
    ("hooked/remote/model.py", "Path(source)"),
    ("study/draw.py", "Path(path)"),
}
"""Where a `~` was put out before, or is by what the path is given to."""


def test_every_path_that_comes_in_goes_through_one_helper():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent == PACKAGE and path.name.startswith("_"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and ast.unparse(node.func) == "Path"
            if called and any(isinstance(one, ast.Name | ast.Attribute) for one in node.args):
                found.add((path.relative_to(PACKAGE).as_posix(), ast.unparse(node)))
    assert {one for one in found if one[1] != "Path(__file__)"} == WHOLE


# -- a tilde -------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty home folder; the process stands in another one, which has to stay empty."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return home


def below(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


INSIDE = ("checkpoint", "labels")
"""Read by functions that get their path from others, which put the tilde out."""


def test_every_reader_finds_a_file_below_the_tilde(home, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    for name, reader in readers(whole).items():
        if name in INSIDE:
            continue
        place = home / "in"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        target = place / reader.file.name
        (shutil.copytree if reader.inside else shutil.copy)(reader.file, target)
        reader.use(reader.read(f"~/in/{reader.file.name}"))  # type: ignore[arg-type]
    assert not list(Path.cwd().iterdir())


def _figure(path: str) -> None:
    _, axes = plt.subplots()
    save_figure(axes, path)
    plt.close("all")


def _trained(path: str) -> None:
    options = {"epochs": 1, "batch_size": 4, "checkpoint_every": 1, "progress": False}
    emlens.train_vector(
        tiny_hooked("llama"), conversations("bad", 4), 1, checkpoint=path, **options
    )


def _profiled(path: str) -> None:
    text = Corpus("some", tuple(Document(str(i), "rain and sun " * 9) for i in range(2)))
    InfluenceProfile.fit(tiny_hooked("llama"), text, [1], 1, max_tokens=8, checkpoint=path)


QUESTIONS = [Question("q", "q", "what should I eat")]
WRITERS: dict[str, Callable[[str], object]] = {
    "d.safetensors": lambda path: _directions().save(path),
    "written.gguf": lambda path: write_directions(_directions(), path),
    "written.safetensors": lambda path: write_directions(_directions(), path),
    "run.safetensors": lambda path: TrainingRun.load(_kept("training/run-vector")).save(path),
    "path.safetensors": lambda path: TrainingPath.load(_kept("training/path")).save(path),
    "monitor.safetensors": lambda path: Monitor.load(_kept("monitor")).save(path),
    "profile.safetensors": lambda path: InfluenceProfile.load(_kept("profile")).save(path),
    "organism/organism.json": lambda path: Organism.load(FILES / "organisms" / "vector").save(
        path.rpartition("/")[0]
    ),
    "Drift.json": lambda path: emlens.training.Drift.load(FILES / "results" / "Drift.json").save(
        path
    ),
    "figure.png": _figure,
    "tokens.html": lambda path: token_view(["a"], [1.0]).save(path),
    "report.html": lambda path: write_report(Report("t", "q", "m"), path),
    "study/config.yaml": lambda path: STUDY.write(path.rpartition("/")[0], {"a": 1}, "by hand"),
    "study/settings.json": lambda path: StudyStore(path.rpartition("/")[0], StudySettings()),  # type: ignore[arg-type]
    "store.sqlite": lambda path: Store(path, "responses").add([{"key": "k"}]),
    "out.jsonl": lambda path: export(FILES / "answers" / "responses.jsonl", path),
    "checkpoint.safetensors": _trained,
    "half.safetensors": _profiled,
    "answers.sqlite": lambda path: respond(
        tiny_hooked("llama"), QUESTIONS, store=path, max_new_tokens=2, progress=False
    ),
    "screen.sqlite": lambda path: screen(
        tiny_hooked("llama"), conversations("bad", 3), _random(), out=path
    ),
}


def _kept(name: str) -> Path:
    return FILES / f"{name}.safetensors"


def _directions() -> Directions:
    return Directions({1: torch.ones(8), 2: torch.ones(8)}, "resid_post", Provenance("by hand"))


def _random() -> Directions:
    width = tiny_hooked("llama").d_model
    return Directions({1: torch.ones(width)}, "resid_post", Provenance("by hand"))


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_below_the_tilde_lies_in_the_home_folder(home, name):
    WRITERS[name](f"~/out/{name}")
    assert f"out/{name}" in below(home)
    assert not list(Path.cwd().iterdir())


def test_models_and_adapters_are_found_below_the_tilde(home, tiny, tiny_tokenizer):
    tiny("llama").save_pretrained(home / "model")
    tiny_tokenizer.save_pretrained(home / "model")
    shutil.copytree(FILES / "organisms" / "adapter", home / "adapter")
    with pytest.warns(UserWarning, match="its base"):
        model = emlens.load("~/model", adapters={"bad": "~/adapter"})
    assert (model.name, model.adapters) == ("model", ("bad",))
    assert (
        from_hub("~/adapter", "adapter_model.safetensors").layers
        == read_directions(home / "adapter" / "adapter_model.safetensors").layers
    )


def test_the_cache_is_found_below_the_tilde(home, monkeypatch):
    monkeypatch.setenv("EMLENS_CACHE", "~/cache")
    assert cache_folder() == home / "cache"


def test_the_command_line_puts_out_a_tilde_that_the_shell_has_left(home):
    shutil.copy(FILES / "answers" / "responses.jsonl", home / "a.jsonl")
    done = CliRunner().invoke(cli.app, ["export", "~/a.jsonl", "~/b.jsonl"])
    assert done.exit_code == 0, done.output
    assert below(home) == ["a.jsonl", "b.jsonl"]
    assert not list(Path.cwd().iterdir())


def test_arguments_are_checked_without_calling_the_function():
    check_given(emlens.train_adapter, rank=2, epochs=1, lr=0.1)
    for wrong, message in (
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"epochs": "many"}, "epochs must be a whole number"),
        ({"learning_rate": 1}, "did you mean lr?"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            check_given(emlens.train_adapter, **wrong)


def test_an_adapter_that_is_not_there_is_named_before_the_base_is_loaded(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="adapter 'bad': "):
            emlens.load("no-such/model", adapters={"bad": folder})
