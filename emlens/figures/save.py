"""Figures as files: PNG for reading, SVG for papers, byte for byte reproducible."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from emlens._files import atomic_path
from emlens._reading import expanded, read_bytes
from emlens.figures.style import PAPER, house_style

DPI = 200
_METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
_ENDS = {"png": b"IEND\xaeB`\x82", "svg": b"</svg>\n"}


def save_figure(figure: Figure | Axes | Sequence[Axes], path: str | Path) -> list[Path]:
    """Write a figure as PNG (200 dpi) and as SVG whose text stays text.

    The same figure gives the same bytes on every run with the same version of matplotlib. Files
    are written atomically.

    Args:
        figure: The figure, any axes of it, or all of them, as `plot` returns them.
        path: Path without a suffix; `.png` and `.svg` are removed.

    Returns:
        The two files, PNG first. The folder is made if it is missing.

    Raises:
        ValueError: If the axes no longer belong to a figure.
    """
    if isinstance(figure, Sequence):
        figure = figure[0]
    if isinstance(figure, Axes):
        root = figure.get_figure(root=True)
        if root is None:
            raise ValueError("these axes were removed from their figure; draw them again")
        figure = root
    path = expanded(path)
    stem = path.stem if path.suffix in (".png", ".svg") else path.name
    return [_write(figure, path.parent / f"{stem}.{kind}", kind) for kind in ("png", "svg")]


def _write(figure: Figure, target: Path, kind: str) -> Path:
    with (
        atomic_path(target, partial(_check, kind)) as temporary,
        house_style(),
        mpl.rc_context({"svg.hashsalt": "emlens"}),
    ):
        figure.savefig(
            temporary,
            format=kind,
            dpi=DPI,
            bbox_inches="tight",
            pad_inches=0.06,
            facecolor=PAPER,
            metadata=_METADATA[kind],
        )
    return target


def _check(kind: str, written: Path) -> None:
    if not read_bytes(written).endswith(_ENDS[kind]):
        raise ValueError(f"the end of the {kind.upper()} is missing")
