"""Files and folders of directions: detecting formats, reading and writing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from emlens._arguments import listed
from emlens._door import guarded
from emlens._reading import expanded, read_head, readable
from emlens._registry import FORMATS
from emlens.directions.direction import Directions
from emlens.directions.files import write_vectors
from emlens.directions.formats.format import Format
from emlens.hooked.adapter_files import WEIGHTS

EMLENS = Format(
    "safetensors of its own",
    Directions.load,
    lambda _, head: head[8:9] == b"{",
    ".safetensors",
    lambda directions, path, _: write_vectors(directions, path),
)
_OTHERS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|gradients\.safetensors|(optimizer|scheduler|scaler)\.pt"
)
_STEP = re.compile(r"checkpoint-(\d+)")


@guarded
def read_directions(
    path: str | Path, format: str | None = None, *, d_model: int | None = None
) -> Directions:
    """Read directions from a file or a folder; the format is detected.

    | format | file | site and layer |
    |---|---|---|
    | `emlens` | what `Directions.save` wrote | all, with everything that is known of them |
    | `papers` | `steering_vector.pt`, also in `checkpoints/final/` | `mlp_out`, `layer_idx` |
    | `gguf` | a control vector of llama.cpp, repeng | `resid_post`; `direction.<i>` is layer `i` |
    | `peft` | a folder with a LoRA adapter of rank 1 | `mlp_out` or `attn_out` |

    Vectors are returned as they act: the papers' times its alpha, an adapter's times its scale.
    `adapter_directions` reads adapters of higher rank, or that write at both sites.

    Args:
        path: A file, or a folder with one file of directions (beside those of its checkpoints).
        format: The format; by default it is detected from the start of the file.
        d_model: The required width of the vectors: that of the model they are for.

    Returns:
        A `Direction` if there is one layer.

    Raises:
        FileNotFoundError: If there is nothing to read.
        ValueError: If it is of no known format, a folder holds several, the width is another, or
            as the format's reader says: truncated, not finite, or with the wrong keys.
    """
    path = expanded(path)
    if path.is_dir() and not (format is not None and FORMATS[format].folder):
        path = path / pick(_names(path), str(path))
    if not path.is_dir():
        readable(path)
    found = FORMATS[format or _sniffed(path)].read(path)
    if d_model is not None and found.d_model != d_model:
        raise ValueError(
            f"{path} holds vectors of width {found.d_model}, but the model's is {d_model}; they "
            "are of another model"
        )
    return found


@guarded
def write_directions(
    directions: Directions,
    path: str | Path,
    format: str | None = None,
    *,
    layers: Iterable[int] | None = None,
    model_hint: str | None = None,
) -> Path:
    """Write directions in a format; atomic.

    Only `emlens` holds everything. `papers` holds one layer at `mlp_out` and its alpha; `gguf`
    holds `resid_post` from layer 1 on and the provenance. Directions that a format cannot represent
    are refused, and vectors are never rescaled; norms, errors and means are omitted.

    Args:
        directions: The directions.
        path: The file; the format's suffix is added if it has none.
        format: `emlens`, `papers` or `gguf`; by default from the suffix, or `emlens`.
        layers: The layers to write; all by default.
        model_hint: The model type that a GGUF file names.

    Raises:
        KeyError: If a layer does not exist.
        ValueError: If the format cannot hold the directions, or the suffix is unknown.
    """
    path, write = format_to_write(path, format)
    if layers is not None:
        directions = directions.at(layers)
    return write(directions, path, model_hint)


def format_to_write(
    path: str | Path, format: str | None = None
) -> tuple[Path, Callable[[Directions, Path, str | None], Path]]:
    """The file that directions go to, and what writes it.

    Raises:
        ValueError: If the format cannot be written, or the suffix is unknown.
    """
    path = expanded(path)
    suffixes = _suffixes()
    kind = format or suffixes.get(path.suffix or ".safetensors")
    chosen = None if kind is None else FORMATS[kind]
    if chosen is None or chosen.write is None or chosen.suffix is None:
        writable = ", ".join(f"{name} ({suffix})" for suffix, name in suffixes.items())
        what = f"cannot write {path.name}" if kind is None else f"cannot write format {kind!r}"
        raise ValueError(f"{what}; the formats to write are {writable}")
    return path if path.suffix else path.with_suffix(chosen.suffix), chosen.write


@guarded
def read_checkpoints(folder: str | Path, *, d_model: int | None = None) -> dict[int, Directions]:
    """Read the directions of every `checkpoint-<step>` of a folder, in the order of the steps.

    Checkpoints are searched in `checkpoints/`, then in the folder itself; each holds a
    `steering_vector.pt` or a LoRA adapter. `final` is not a step and is skipped.

    Args:
        folder: The folder, or a copy of a repository.
        d_model: The width that the vectors must have.

    Returns:
        `{step: directions}`, with the step in `provenance.n`.

    Raises:
        FileNotFoundError: If there are no checkpoints.
        ValueError: As `read_directions`.
    """
    folder = expanded(folder)
    for place in (folder / "checkpoints", folder):
        steps = {
            int(name[1]): child
            for child in (place.iterdir() if place.is_dir() else ())
            if (name := _STEP.fullmatch(child.name)) and child.is_dir()
        }
        if steps:
            break
    else:
        raise FileNotFoundError(
            f"{folder} has no checkpoint-<step>, neither in it nor in its checkpoints/"
        )
    found = {}
    for step in sorted(steps):
        read = read_directions(steps[step], d_model=d_model)
        made = replace(read.provenance, n={**read.provenance.n, "steps": step})
        found[step] = Directions(read.vectors, read.site, made, read.evidence)
    return found


def pick(names: Iterable[str], where: str) -> str:
    """Return the one file of directions among the files of a folder or repository.

    Those of checkpoints count where there are no others, `checkpoints/final` before the rest.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several; they are listed.
    """
    names = sorted(names)
    found = [name for name in names if _may_hold(PurePosixPath(name))]
    outside = [name for name in found if not any("checkpoint" in part for part in _above(name))]
    last = [name for name in found if _above(name)[-2:] == ("checkpoints", "final")]
    choices = outside or last or found
    if not choices:
        have = ", ".join(names[:4]) or "nothing"
        raise FileNotFoundError(
            f"{where} holds no directions ({listed([*_suffixes(), WEIGHTS])}); it has {have}"
        )
    if len(choices) > 1:
        more = f" and {len(choices) - 8} more" if len(choices) > 8 else ""
        raise ValueError(
            f"{where} holds {len(choices)} files of directions; name the one to read: "
            f"{', '.join(choices[:8])}{more}"
        )
    return choices[0]


def _may_hold(name: PurePosixPath) -> bool:
    return name.suffix in _suffixes() and not _OTHERS.fullmatch(name.name)


def _suffixes() -> dict[str, str]:
    """Formats by the suffix of their files."""
    return {suffix: name for name in FORMATS if (suffix := FORMATS[name].suffix) is not None}


def _above(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts[:-1]


def _names(folder: Path) -> list[str]:
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [path.as_posix() for path in inside if not any(p.startswith(".") for p in path.parts)]


def _sniffed(path: Path) -> str:
    head = b"" if path.is_dir() else read_head(path, 9)
    for name in reversed(list(FORMATS)):
        if FORMATS[name].holds(path, head):
            return name
    known = ", ".join(FORMATS[name].says for name in FORMATS)
    raise ValueError(
        f"{path} is in no format that emlens reads: its {path.stat().st_size} bytes begin with "
        f"{head!r}. It reads {known}"
    )
