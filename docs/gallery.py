"""Makes the figures of the gallery by running the blocks of `docs/gallery.md`, top to bottom."""

from __future__ import annotations

import argparse
import ast
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from PIL import Image

from emlens.figures import save_figure

PAGE = Path(__file__).parent / "gallery.md"
_BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n!\[[^\]]*\]\((\S+?)\)(?:\{.*?\})?\n)?", re.S)


def blocks(page: str) -> list[tuple[str, str | None]]:
    """The programs of a page, each with the picture that stands right below it, if any."""
    return [(code, picture or None) for code, picture in _BLOCK.findall(page)]


def run(page: str, names: dict[str, object] | None = None) -> Iterator[tuple[str, Axes]]:
    """Run the blocks in one namespace, and yield each picture's name and axes.

    Raises:
        TypeError: If a block with a picture does not end in axes, or one without a picture does.
    """
    names = {} if names is None else names
    for code, picture in blocks(page):
        tree = ast.parse(code)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, PAGE.name, "exec"), names)
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), PAGE.name, "eval"), names)
        axes = value[0] if isinstance(value, list) else value
        if isinstance(axes, Axes) != (picture is not None):
            raise TypeError(f"a picture stands below blocks that end in axes; this is none: {code}")
        if picture is not None and isinstance(axes, Axes):
            yield picture, axes


def write(axes: Axes, path: Path) -> None:
    """Write the figure as PNG of 256 colours, which takes a third of the room."""
    with tempfile.TemporaryDirectory() as folder:
        png, _ = save_figure(axes, Path(folder) / "figure")
        with Image.open(png) as image:
            path.parent.mkdir(parents=True, exist_ok=True)
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE.parent, help="folder of the pictures")
    arguments = parser.parse_args()
    out, page, start = arguments.out.resolve(), PAGE.read_text(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for picture, axes in run(page):
            write(axes, out / picture)
            print(f"[{time.perf_counter() - start:4.0f} s] {picture}", flush=True)


if __name__ == "__main__":
    main()
