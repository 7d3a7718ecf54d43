"""LoRA adapters as PEFT keeps them: the files of a folder, the names in them, and reading them."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from emlens._folders import recovered
from emlens._reading import expanded, read_json
from emlens._tensors import check_torch_file, opened_tensors

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TORCH_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."
"""What stands in a file before the name of a weight in the base model."""
SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""The options that the scale of an adapter hangs on."""
_FACTOR = re.compile(rf"({re.escape(PREFIX)})?(?P<path>.+)\.lora_(?P<part>[AB])\.weight")
_PATTERN = dict, "an object, a number for each pattern of module names"
_TYPES = {
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _PATTERN),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), (bool, "true or false")),
    **dict.fromkeys(("base_model_name_or_path", "revision"), (str, "text or null")),
}


def find_adapter(name: str, source: str) -> tuple[str, dict[str, Any]]:
    """Say where PEFT finds an adapter; a folder is looked at, the hub is not asked.

    Returns:
        A folder or a repository, and further arguments for PEFT.

    Raises:
        FileNotFoundError: If a folder holds no adapter.
        ValueError: If its files are damaged.
    """
    local = recovered(expanded(source))
    if local.exists():
        if not (local / CONFIG).is_file():
            inside = sorted(str(p.parent.relative_to(local)) for p in local.rglob(CONFIG))
            hint = f"; there are some inside: {', '.join(inside[:3])}" if inside else ""
            raise FileNotFoundError(f"adapter {name!r}: {local} has no {CONFIG}{hint}")
        _check_files(name, local)
        return str(local), {}
    if source.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"adapter {name!r}: there is not a folder {source}")
    if source.count("/") > 1:
        owner, repository, subfolder = source.split("/", 2)
        return f"{owner}/{repository}", {"subfolder": subfolder}
    return source, {}


def read_adapter(name: str, source: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read the config and the weights of a LoRA adapter, by their names in the base model.

    Args:
        name: What errors call it.
        source: A folder or a hub name.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If it is not LoRA, or its weights are truncated.
    """
    # importing PEFT takes seconds
    from peft import LoraConfig, PeftConfig
    from peft.utils import load_peft_weights

    source, where = find_adapter(name, source)
    local = expanded(source)
    try:
        config = PeftConfig.from_pretrained(source, **where)
        weights = load_peft_weights(source, device="cpu", **where)
    except (OSError, ValueError) as error:
        if local.exists() and (local / CONFIG).is_file() and _has_weights(local):
            raise _unreadable(name, "config or weights", source, error) from error
        raise FileNotFoundError(
            f"adapter {name!r}: found none at {source!r}, neither as a folder nor on the hub "
            f"({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # PEFT checks no types, and torch raises anything
        raise _unreadable(name, "config or weights", source, error) from error
    check_kind(name, config)
    assert isinstance(config, LoraConfig)
    _check_types(name, config)
    return config, {key.removeprefix(PREFIX): value for key, value in weights.items()}


def check_kind(name: str, config: Any) -> None:
    """Refuse an adapter that is no LoRA.

    Raises:
        ValueError: If it is none.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(f"adapter {name!r} is of the kind {kind}; emlens runs LoRA adapters")


def factor_of(key: str) -> tuple[str, str] | None:
    """The module that a weight in a file is for, and `"A"` or `"B"`; None of another weight."""
    found = _FACTOR.fullmatch(key)
    return None if found is None else (found["path"], found["part"])


def rank_at(config: Mapping[str, Any], path: str) -> int:
    """The rank of an adapter at a module, `rank_pattern` included."""
    return _at(config.get("rank_pattern"), path, config.get("r", 8))


def scale_at(config: Mapping[str, Any], path: str) -> float:
    """What PEFT multiplies `B A` by at a module: `alpha / r`, or `alpha / sqrt(r)` (rsLoRA)."""
    rank = rank_at(config, path)
    alpha = _at(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _at(pattern: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    from peft.utils.other import get_pattern_key

    return (pattern or {}).get(get_pattern_key(list(pattern or {}), path), otherwise)


def _check_types(name: str, config: LoraConfig) -> None:
    """Refuse what PEFT takes as it comes, and fails on later."""
    for option, (kind, what) in _TYPES.items():
        value = getattr(config, option)
        if value is not None and not isinstance(value, kind):
            raise ValueError(
                f"adapter {name!r}: {option} is {value!r:.60} in its {CONFIG}; it has to be {what}"
            )


def _has_weights(folder: Path) -> bool:
    return any((folder / file).exists() for file in (WEIGHTS, _TORCH_WEIGHTS))


def _unreadable(name: str, what: str, source: str, error: Exception) -> ValueError:
    return ValueError(
        f"adapter {name!r}: its {what} in {source} are not readable "
        f"({str(error).partition(chr(10))[0]}); were they downloaded completely?"
    )


def _check_files(name: str, folder: Path) -> None:
    """Read what PEFT would fail on, or allocate for, without a word of the file."""
    try:
        read_json(folder / CONFIG, dict)
    except ValueError as error:
        raise ValueError(f"adapter {name!r}: {error}") from error
    try:
        if (weights := folder / WEIGHTS).exists():
            with opened_tensors(weights):
                pass
        elif (weights := folder / _TORCH_WEIGHTS).exists():
            check_torch_file(weights)
    except ValueError as error:
        raise _unreadable(name, "weights", str(folder), error) from error


def compare_bases(name: str, recorded: str | None, model_name: str) -> None:
    """Warn of an adapter that records another base than the model's."""
    if recorded and _plain(recorded) != _plain(model_name):
        warnings.warn(
            f"adapter {name!r} records {recorded!r} as its base, but this model is "
            f"{model_name!r}; its effect is only that of its training on the same weights",
            stacklevel=4,
        )


def _plain(name: str) -> str:
    """A model's name without owner, case, and the marks of a quantised copy."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return last.removesuffix("-bnb-4bit").removesuffix("-unsloth")
