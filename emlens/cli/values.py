"""Conversion of command line values for the Python API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from emlens.directions import Direction, Directions
    from emlens.hooked import HookedModel
    from emlens.text import Conversation


def named(files: Sequence[Path]) -> dict[str, Path]:
    """Files by their stems, or in full where two share one."""
    stems = [path.stem for path in files]
    short = len(set(stems)) == len(stems)
    return {path.stem if short else str(path): path for path in files}


def layers_of(text: str | None) -> range | None:
    """Layers from `15` or `10-20`."""
    if text is None:
        return None
    first, _, last = str(text).partition("-")
    try:
        return range(int(first), int(last or first) + 1)
    except ValueError:
        raise typer.BadParameter(
            f"--layers takes a layer or a range, 10-20, not {text!r}"
        ) from None


def settings_from(items: Sequence[str] | None, option: str = "--set") -> dict[str, Any]:
    """Read `name=value` settings; values are JSON where they can be, else text."""
    options: dict[str, Any] = {}
    for item in items or ():
        name, mark, text = item.partition("=")
        if not mark:
            raise typer.BadParameter(f"{option} takes name=value, not {item!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        options[name] = tuple(value) if isinstance(value, list) else value
    return options


def adapters_of(items: Sequence[str] | None) -> dict[str, str]:
    """Adapters from `name=folder`, or from folders, which are named by their last part.

    Raises:
        ValueError: If two share a name.
    """
    found: dict[str, str] = {}
    for item in items or ():
        name, mark, source = item.partition("=")
        if not mark:
            name, source = Path(item).name, item
        if name in found:
            raise ValueError(
                f"two adapters are called {name!r}; name them: --adapter one={source} ..."
            )
        found[name] = source
    return found


def at_layer(kept: Directions, model: HookedModel, layer: int | None) -> Direction:
    """The only direction, or that at a layer, the middle one by default."""
    middle = model.n_layers // 2 if layer is None else layer
    return kept[kept.layers[0] if len(kept) == 1 else middle]


def directions_of(files: Sequence[Path] | None) -> Directions | dict[str, Directions] | None:
    """Directions of files: None for none, one as it is, several by name."""
    from emlens.directions import read_directions

    found = {name: read_directions(path) for name, path in named(files or []).items()}
    return next(iter(found.values())) if len(found) == 1 else found or None


def is_embedded(source: str) -> bool:
    """Whether this is the name of an embedded set of pairs."""
    from emlens.text.datasets import EMBEDDED

    return source in EMBEDDED


def conversations_of(source: str, side: str, limit: int | None = None) -> list[Conversation]:
    """Conversations of an embedded set, of stored responses, or of a JSON Lines file.

    Raises:
        ValueError: If the side is unknown, or a row is not a conversation (file and line given).
        FileNotFoundError: If there is no such file.
    """
    from emlens.text import Conversation, load_pairs
    from emlens.watch.screen_rows import examples

    if side not in ("aligned", "misaligned"):
        raise ValueError(f"--side is aligned or misaligned, not {side!r}")
    if is_embedded(source):
        return [pair.conversation(side) for pair in load_pairs(source)[:limit]]
    if not _are_responses(Path(source)):
        return [one.conversation for one in islice(examples(source), limit)]
    from emlens.evals import Responses

    answered = [row for row in Responses.load(source) if row.text.strip()]
    return [
        Conversation.of(
            row.prompt,
            row.text,
            system=row.system,
            id=f"{row.condition}: {row.question}/{row.sample}",
        )
        for row in answered[:limit]
    ]


def _are_responses(path: Path) -> bool:
    """Whether a file is a store, or responses of an earlier version by its first line."""
    from emlens._reading import parsed_json, read_lines, readable
    from emlens._store import is_store

    readable(path, f"{str(path)!r} is neither an embedded set nor a file")
    if is_store(path):
        return True
    try:
        first = parsed_json(next(read_lines(path), (1, "null"))[1], str(path))
    except ValueError:
        return False
    return isinstance(first, dict) and {"condition", "text", "sampling"} <= set(first)
