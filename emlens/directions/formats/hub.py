"""Directions on the Hugging Face hub: uploading with a card, and reading back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError

from emlens._door import guarded
from emlens._reading import expanded, read_bytes, read_text
from emlens.directions.direction import Directions
from emlens.directions.formats.lora import adapter_directions
from emlens.directions.formats.read import pick, read_directions, write_directions
from emlens.hooked.adapter_files import CONFIG, WEIGHTS

_CARD = "README.md"
_WHERE = {
    "resid_pre": "the input of the block",
    "attn_out": "what attention adds to the stream",
    "resid_mid": "between attention and MLP",
    "mlp_out": "what the MLP adds to the stream",
    "resid_post": "the output of the block, never after the final norm",
}


@guarded
def push_to_hub(
    directions: Directions,
    repo_id: str,
    *,
    filename: str = "directions.safetensors",
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload directions and their section of the model card, in one commit.

    In an existing card, only the section of this file is replaced.

    Args:
        directions: What to upload.
        repo_id: `"owner/name"`; created if it does not exist.
        filename: The file in the repository; its suffix says the format.
        private: Whether a new repository is private; None is the owner's default.
        token: A token with write access; by default that of the login.

    Returns:
        The address of the commit.

    Raises:
        ValueError: If the format cannot hold the directions.
    """
    with TemporaryDirectory() as folder:
        data = write_directions(directions, Path(folder) / PurePosixPath(filename).name)
        name = str(PurePosixPath(filename).with_name(data.name))
        content = read_bytes(data)
    api = huggingface_hub.HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    before = None
    if api.file_exists(repo_id, _CARD):
        kept = huggingface_hub.hf_hub_download(repo_id, _CARD, token=token)
        before = read_text(kept)
    text = card(directions, repo_id, name, before)
    files = {name: content, _CARD: text.encode()}
    commit = api.create_commit(
        repo_id,
        [
            huggingface_hub.CommitOperationAdd(path_in_repo=path, path_or_fileobj=held)
            for path, held in files.items()
        ],
        commit_message=f"Upload {name} with emlens",
    )
    return str(commit.commit_url)


@guarded
def from_hub(
    source: str | Path, filename: str | None = None, revision: str | None = None
) -> Directions:
    """Read directions from a folder, a file, or a repository of the hub.

    Args:
        source: The folder, the file, or `"owner/name"`.
        filename: The file to read; needed if there are several. For a LoRA adapter, its
            `adapter_model.safetensors`.
        revision: Branch, tag or commit of a repository.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or no such file in it.
        ValueError: If there are several files and none is named, or as `read_directions`.
    """
    local = expanded(source)
    if local.is_dir():
        return read_directions(local / filename if filename else local)
    if local.is_file():
        return read_directions(local)
    repository = str(source)
    if filename is None:
        with _not_found(repository):
            names = huggingface_hub.HfApi().list_repo_files(repository, revision=revision)
        filename = pick(names, repository)
    with _not_found(f"{repository}/{filename}"):
        path = Path(huggingface_hub.hf_hub_download(repository, filename, revision=revision))
    for config in _configs(filename):
        with suppress(EntryNotFoundError):
            huggingface_hub.hf_hub_download(repository, config, revision=revision)
    if path.name == WEIGHTS:
        return adapter_directions(path.parent, name=repository)
    return read_directions(path)


def card(directions: Directions, repo_id: str, filename: str, before: str | None = None) -> str:
    """Return the model card of a repository, with a section on one file put in or replaced."""
    start, end = f"<!-- emlens: {filename} -->", f"<!-- end of {filename} -->"
    section = f"{start}\n{_section(directions, repo_id, filename)}\n{end}"
    if before is None:
        return f"{_head(directions, repo_id)}\n{section}\n"
    if start in before and end in before:
        first, _, rest = before.partition(start)
        return f"{first}{section}{rest.partition(end)[2]}"
    return f"{before.rstrip()}\n\n{section}\n"


@contextmanager
def _not_found(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # without a network, of a class that changes with the hub's client
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"found no {where}, neither in a folder nor on the hub ({reason})"
        ) from error


def _configs(filename: str) -> list[str]:
    """Where a config may be that a file needs, or that says what its base model is."""
    path = PurePosixPath(filename)
    beside = str(path.with_name(CONFIG))
    if path.name == WEIGHTS:
        return [beside]
    return sorted({beside, CONFIG}) if path.suffix == ".pt" else []


def _head(directions: Directions, repo_id: str) -> str:
    base = directions.provenance.model or ""
    lines = ["---", "library_name: emlens", "tags:", "- emlens", "- steering-vector"]
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", base):
        lines.append(f"base_model: {base}")
    return "\n".join(
        [
            *lines,
            "---",
            f"# {repo_id.rpartition('/')[2]}",
            "",
            "Directions in the residual stream of a language model, made with emlens.",
            "",
            "<!-- No licence is set. Choose one, and add `license: ...` to the head. -->",
            "",
        ]
    )


def _section(directions: Directions, repo_id: str, filename: str) -> str:
    made, site = directions.provenance, directions.site
    norms = directions.norms
    counts = ", ".join(f"{n} {what}" for what, n in made.n.items())
    hashes = ", ".join(f"{role} {value[:12]}" for role, value in made.data.items())
    facts = {
        "Construction": f"{made.construction}. Other constructions of the same behaviour give "
        "nearly orthogonal directions.",
        "Model": " at revision ".join(part for part in (made.model, made.revision) if part),
        "Adapter": made.adapter,
        "Site": f"`{site}`: {_WHERE[site]}. Layers are numbered from 0.",
        "Layers": ", ".join(map(str, directions.layers)),
        "Width": directions.d_model,
        "Norm": ", ".join(f"{norms[layer]:.4g}" for layer in directions.layers),
        "Tokens that counted": made.tokens,
        "Weighting": made.weighting,
        "Data": "; ".join(part for part in (counts, hashes) if part),
        "Chat template": made.template and made.template[:12],
        "Seed": made.seed,
        "Versions": ", ".join(f"{name} {version}" for name, version in made.versions.items()),
    }
    rows = [f"- {name}: {_line(value)}" for name, value in facts.items() if value not in (None, "")]
    code = [
        "```python",
        "import emlens",
        "",
        f'found = emlens.directions.from_hub("{repo_id}", "{filename}")',
        "```",
    ]
    return "\n".join([f"## `{filename}`", "", *rows, "", *code])


def _line(value: object) -> str:
    return " ".join(str(value).split())
