"""Runs the tutorials from top to bottom and writes each as a notebook beside its source.

`python tutorials/execute.py` runs all of them in full, `python tutorials/execute.py 01 06` two of
them, and `--short --out FOLDER` tries them with a few examples.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent
CELL_SECONDS = 3600

_BAR = re.compile(r"\d+%\||\d\s*\w*/s[\],]|s/\w+[\],]|IProgress not found|notebook_tqdm")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
MACHINE_PATH = re.compile(r"(?<![\w.~/:])/(?:home|root|tmp|work|var|opt|usr|mnt|Users|private)/\S*")
"""An absolute path of somebody's machine."""


def sources(names: list[str] | None = None) -> list[Path]:
    """The tutorials whose file names start with one of `names`; all by default.

    Raises:
        ValueError: If a name is that of no tutorial.
    """
    found = sorted(FOLDER.glob("[0-9]*.py"))
    for name in names or ():
        if not any(path.name.startswith(name) for path in found):
            raise ValueError(f"no tutorial {name!r}; there are {', '.join(p.stem for p in found)}")
    return [path for path in found if not names or path.name.startswith(tuple(names))]


def cells(path: Path) -> list[tuple[str, str]]:
    """Kind and text of each cell of a source or a notebook: what the pair has in common."""
    return [(cell["cell_type"], cell["source"]) for cell in jupytext.read(path)["cells"]]


def execute(source: Path, *, short: bool = False) -> nbformat.NotebookNode:
    """Run one tutorial in a kernel and a folder of its own, and return it with clean outputs.

    Raises:
        CellExecutionError: If a cell raises.
    """
    notebook = jupytext.read(source)
    environment = {**os.environ, "EMLENS_SHORT": "1" if short else ""}
    # colours of a terminal would land in the outputs, and another backend would hide the figures
    environment |= {"NO_COLOR": "1", "TQDM_MININTERVAL": "10"}
    environment.pop("MPLBACKEND", None)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            store_widget_state=False,
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=environment, cwd=folder)
        places = {folder: ".", str(FOLDER.parent): ".", str(Path.home()): "~"}
    for place, cell in enumerate(notebook.cells):
        cell.id = f"cell-{place:02d}"
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [kept for each in cell.outputs if (kept := cleaned(each, places))]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["emlens"] = {"short": short}
    nbformat.validate(notebook)
    return notebook


def cleaned(output: Any, places: dict[str, str]) -> Any | None:
    """The output without bars, widgets and paths of the machine; None where nothing is left."""
    if output["output_type"] == "stream":
        text = output["text"]
        if output["name"] == "stderr":
            text = "\n".join(
                line
                for line in text.replace("\r", "\n").split("\n")
                if line.strip() and not _BAR.search(line)
            )
        output["text"] = without_paths(text, places)
        return output if output["text"].strip() else None
    data = output.get("data", {})
    for kind in [kind for kind in data if "jupyter.widget" in kind]:
        del data[kind]
        data.pop("text/plain", None)
    for kind in data:
        if kind.startswith("text/"):
            data[kind] = without_paths(data[kind], places)
        elif kind == "image/png":
            data[kind] = smaller(data[kind])
    return output if data else None


def without_paths(text: str, places: dict[str, str]) -> str:
    """The text with packages named from their own folder on, and known folders by short names."""
    text = re.sub(r"\S*/site-packages/", "", _COLOUR.sub("", text))
    text = re.sub(r"\S*/ipykernel_\d+/\d+\.py:\d+:", "this cell:", text)
    for place, name in places.items():
        text = text.replace(place, name)
    return text


def smaller(png: str) -> str:
    """The picture in 256 colours, which takes a third of the room."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        buffer = io.BytesIO()
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
            buffer, format="png", optimize=True
        )
    return base64.b64encode(buffer.getvalue()).decode() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="how file names start; all tutorials by default")
    parser.add_argument("--short", action="store_true", help="a few examples only")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the notebooks")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for source in sources(arguments.names):
        start = time.perf_counter()
        notebook = execute(source, short=arguments.short)
        target = arguments.out / f"{source.stem}.ipynb"
        temporary = target.with_suffix(".tmp")
        nbformat.write(notebook, temporary)
        temporary.replace(target)
        size = target.stat().st_size / 1e6
        print(f"{target.name}: {time.perf_counter() - start:.0f} s, {size:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
