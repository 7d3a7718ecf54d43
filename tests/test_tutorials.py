"""The tutorials: sources that run with a few examples, and notebooks that are what they make."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

from tests.test_docs_site import complaints as wrong_names
from tests.test_docs_site import known
from tutorials import execute

FOLDER = Path(execute.__file__).parent
SOURCES = execute.sources()
TOGETHER = 2
LARGEST = 2_000_000  # a view of coloured tokens is 1.3 MB by itself
each = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def complaints(source: Path, path: Path) -> list[str]:
    """What is wrong with the notebook of a source."""
    if not path.exists():
        return [f"{path.name} is missing; run make tutorials"]
    found = []
    if execute.cells(source) != execute.cells(path):
        found.append(f"{path.name} has other cells than {source.name}; run make tutorials")
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("not every cell was run, in their order")
    if not any("image/png" in output.get("data", {}) for output in outputs):
        found.append("there is no figure among the outputs")
    if notebook.metadata.get("emlens") != {"short": False}:
        found.append("it was run with a few examples only")
    for output in outputs:
        if output.output_type == "error":
            found.append(f"a cell raised {output.ename}: {output.evalue}")
        said = texts(output)
        found += [f"a path of a machine: {one}" for one in execute.MACHINE_PATH.findall(said)]
        if output.get("name") == "stderr" and "%|" in said:
            found.append("a progress bar was left in the outputs")
    if path.stat().st_size > LARGEST:
        found.append(f"it takes {path.stat().st_size / 1e6:.1f} MB")
    return found


def texts(output: nbformat.NotebookNode) -> str:
    data = output.get("data", {})
    parts = [str(data[kind]) for kind in data if kind.startswith("text/")]
    return "\n".join([output.get("text", ""), *parts, *output.get("traceback", [])])


@each
def test_the_notebook_is_the_source_run_in_full(source):
    assert complaints(source, source.with_suffix(".ipynb")) == []


def made(folder: Path) -> tuple[Path, Path]:
    """A source and its notebook, as `execute` leaves them."""
    source = folder / "00_made.py"
    source.write_text("# %% [markdown]\n# # Made\n\n# %%\n1 + 1\n")
    text, code = nbformat.v4.new_markdown_cell("# Made"), nbformat.v4.new_code_cell("1 + 1")
    code.execution_count = 1
    figure = {"image/png": "AAAA", "text/plain": "<Axes>"}
    code.outputs = [nbformat.v4.new_output("display_data", figure)]
    notebook = nbformat.v4.new_notebook(cells=[text, code], metadata={"emlens": {"short": False}})
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    return source, source.with_suffix(".ipynb")


def _drift(notebook):
    notebook.cells[1].source = "1 + 2"


def _unrun(notebook):
    notebook.cells[1].execution_count = None


def _empty(notebook):
    notebook.cells[1].outputs = []


def _short(notebook):
    notebook.metadata.emlens = {"short": True}


def _add(kind: str, **fields):
    def change(notebook):
        notebook.cells[1].outputs.append(nbformat.v4.new_output(kind, **fields))

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_drift, "has other cells than 00_made.py; run make tutorials"),
        (_unrun, "not every cell was run"),
        (_empty, "there is no figure"),
        (_short, "a few examples only"),
        (_add("error", ename="ValueError", evalue="no", traceback=[]), "raised ValueError: no"),
        (_add("stream", text="kept in /home/ada/runs"), "a path of a machine: /home/ada/runs"),
        (_add("display_data", data={"text/html": "<td>/tmp/x/y</td>"}), "a path of a machine"),
        (_add("stream", name="stderr", text=" 50%|##  | 1/2"), "a progress bar"),
        (_add("display_data", data={"text/html": "a" * LARGEST}), "it takes 2.0 MB"),
    ],
)
def test_a_notebook_that_is_not_as_it_should_be_is_found(tmp_path, change, complaint):
    source, path = made(tmp_path)
    assert complaints(source, path) == []
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)
    (found,) = complaints(source, path)
    assert complaint in found


def test_a_missing_notebook_is_found(tmp_path):
    source, path = made(tmp_path)
    path.unlink()
    assert complaints(source, path) == ["00_made.ipynb is missing; run make tutorials"]


@each
def test_a_tutorial_says_what_is_to_come_and_how_to_go_on(source):
    cells = execute.cells(source)
    (first, opening), (last, ending) = cells[0], cells[-1]
    assert first == last == "markdown"
    assert opening.startswith("# ") and "minutes" in opening
    assert "## Exercises" in ending
    assert "Qwen/Qwen2.5-14B-Instruct" in ending and "ModelOrganismsForEM/" in ending


@each
def test_a_tutorial_opens_with_something_that_works_and_says_what_to_look_for(source):
    cells = execute.cells(source)
    prose = [" ".join(text.split()) for kind, text in cells if kind == "markdown"]
    assert any("positive control" in text for text in prose) or source.stem.startswith("08")
    assert sum("What to look for" in text for text in prose) >= 2


@each
def test_every_exercise_has_a_folded_solution_that_is_a_program_of_the_package(source):
    ending = execute.cells(source)[-1][1].partition("## Exercises")[2]
    tasks = re.findall(r"^\*\*(\d)\.\*\*", ending, re.M)
    solutions = re.findall(r"<details markdown=\"1\">(.*?)</details>", ending, re.S)
    assert [int(task) for task in tasks] == list(range(1, len(solutions) + 1))
    for solution in solutions:
        (program,) = re.findall(r"```python\n(.*?)```", solution, re.S)
        compile(program, source.name, "exec")
        assert wrong_names(program, known()) == []


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """The tutorials that were asked for, with a few examples, two at a time."""
    asked = [
        item.callspec.params["source"]
        for item in request.session.items
        if getattr(item, "originalname", "") == test_a_tutorial_runs_with_a_few_examples.__name__
    ]
    folder = tmp_path_factory.mktemp("notebooks")

    def run(source: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(FOLDER / "execute.py"), source.stem, "--short"]
        return subprocess.run(
            [*command, "--out", str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    with ThreadPoolExecutor(TOGETHER) as pool:
        yield {source: pool.submit(run, source) for source in asked}


@pytest.mark.real
@each
def test_a_tutorial_runs_with_a_few_examples(source, runs):
    done = runs[source].result()
    assert done.returncode == 0, done.stderr[-3000:]


def test_outputs_are_kept_without_bars_widgets_and_paths_of_the_machine():
    places = {"/home/ada/work": "."}
    bar = "training:  50%|#####     | 1/2 [00:01<00:01,  1.2s/it]"
    warned = "/home/ada/env/site-packages/lens/run.py:3: UserWarning: slow in /home/ada/work/x"
    noise = nbformat.v4.new_output("stream", name="stderr", text=f"\r{bar}\r{bar}\n")
    assert execute.cleaned(noise, places) is None
    mixed = nbformat.v4.new_output("stream", name="stderr", text=f"{bar}\n{warned}\n")
    assert execute.cleaned(mixed, places)["text"] == "lens/run.py:3: UserWarning: slow in ./x"
    plain = nbformat.v4.new_output("stream", name="stdout", text="50% of /home/ada/work\n")
    assert execute.cleaned(plain, places)["text"] == "50% of .\n"
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"}
    assert execute.cleaned(nbformat.v4.new_output("display_data", widget), places) is None


def test_a_tutorial_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="no tutorial '77'; there are 00_quickstart"):
        execute.sources(["77"])
