"""What is kept of answers, scores and screens: `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emlens.cli.app import app
from emlens.cli.common import Call, verb


@verb(
    app,
    "emlens export runs/base/responses.sqlite responses.jsonl",
    "emlens export runs/screen/scores.sqlite screened.jsonl --json",
)
def export(
    call: Call,
    store: Annotated[Path, typer.Argument(help="Store of answers, of scores or of a screen.")],
    out: Annotated[Path, typer.Argument(help="JSON Lines file to write; a new one.")],
) -> None:
    """Write a store as JSON Lines; the store stays as it is.

    Stores in JSON Lines that an earlier version wrote can be given, too.
    """
    from emlens._store import export as write

    written = write(store, out)
    call.result({"file": out, "rows": written}, f"written: {out} ({written} rows)")
