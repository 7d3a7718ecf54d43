"""Reading YAML, with file and line in every error, and limits on its size."""

from __future__ import annotations

import os
from typing import Any

import yaml

from emlens._reading import DEEPEST, expanded, read_text

_LARGEST = 2 * 2**20
"""Characters; PyYAML takes three seconds and sixteen times as much memory for each million."""
_KINDS = {dict: "names and values, one `name: value` a line", list: "a list, one `- item` a line"}
_SHARED = 10
"""How many times larger than the file what its aliases stand for may be."""


def read_yaml(path: str | os.PathLike[str], kind: type | tuple[type, ...], what: str = "") -> Any:
    """Read a mapping or a list from YAML; plain values only.

    Args:
        path: The file.
        kind: What it must hold: `dict`, `list`, or both.
        what: What that is, for the error; needed for both.

    Raises:
        OSError: As `readable`.
        ValueError: If it is not text, not YAML, names a key twice, is too deep or too large, its
            aliases stand for far more than is there, or it holds another kind; file and line are
            named.
    """
    path = expanded(path)
    text = read_text(path)
    if len(text) > _LARGEST:
        raise ValueError(f"{path} is too large for YAML ({len(text)} characters); use JSON Lines")
    loader = None
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except _Found as error:
        raise ValueError(f"{path}, line {error.mark.line + 1}: {error.what}") from error
    except RecursionError:
        raise ValueError(f"{path}, line {_line(loader)}: nested too deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        said = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise ValueError(f"{path}{where}: not valid YAML ({said})") from error
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path}, line {_line(loader)}: not valid YAML ({said})") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(value, kind):
        found = {dict: "a mapping", list: "a list"}.get(type(value), type(value).__name__)
        raise ValueError(f"{path} must hold {what or _KINDS[kind]}, not {found}")
    return value


def yaml_text(value: dict) -> str:
    """Plain values as YAML, in their order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


class _Found(Exception):
    def __init__(self, mark: yaml.Mark, what: str) -> None:
        super().__init__(what)
        self.mark, self.what = mark, what


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which lets repeated keys, deep nests and alias bombs pass."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise _Found(mark, f"nested too deep; {DEEPEST} levels are read")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            seen: dict[int, int] = {}
            whole = _size(node, seen)
            if whole > _SHARED * len(seen) + 1000:
                raise _Found(
                    node.start_mark,
                    f"its aliases (*name) stand for {whole:,} values; {len(seen):,} are written",
                )
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _Found(key.start_mark, f"the key {key.value[:60]!r} occurs twice")
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, TypeError, OverflowError, AttributeError, KeyError) as error:
            text = node.value if isinstance(node.value, str) else node.tag
            said = f"{text[:40]!r} is no value that can be read ({error})"
            if len(text) > 4300:
                said = "a number of more than 4,300 digits"
            raise _Found(node.start_mark, said) from error


def _size(node: Any, seen: dict[int, int]) -> int:
    """Values that a node stands for, what its aliases repeat included."""
    known = seen.get(id(node))
    if known == 0:
        raise _Found(node.start_mark, "it holds itself by an alias (*name)")
    if known is not None:
        return known
    seen[id(node)] = 0
    held = node.value if isinstance(node, yaml.CollectionNode) else ()
    parts = (part for item in held for part in (item if isinstance(item, tuple) else (item,)))
    seen[id(node)] = size = 1 + sum(_size(part, seen) for part in parts)
    return size


def _line(loader: _Loader | None) -> int:
    return 1 if loader is None else loader.line + 1
