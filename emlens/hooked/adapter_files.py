"""Reading a LoRA adapter from a folder or from the hub."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from torch import Tensor

from emlens._folders import recovered
from emlens._reading import expanded, read_json
from emlens._tensors import check_torch_file, opened_tensors

_FILE = "adapter_config.json"
_PATTERN = dict, "an object, a number for each pattern of module names"
_TYPES = {
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _PATTERN),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), (bool, "true or false")),
    **dict.fromkeys(("base_model_name_or_path", "revision"), (str, "text or null")),
}


def read_adapter(name: str, source: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read the config and the weights of a LoRA adapter, by their names in the base model.

    Args:
        name: What errors call it.
        source: A folder or a hub name.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If it is not LoRA, or its weights are truncated.
    """
    local = recovered(expanded(source))
    where: dict[str, Any] = {}
    if local.exists():
        source = str(local)
        if not (local / _FILE).is_file():
            inside = sorted(str(p.parent.relative_to(local)) for p in local.rglob(_FILE))
            hint = f"; there are some inside: {', '.join(inside[:3])}" if inside else ""
            raise FileNotFoundError(f"adapter {name!r}: {source} has no {_FILE}{hint}")
    elif source.count("/") > 1 and not source.startswith(("/", ".", "~")):
        owner, repository, where["subfolder"] = source.split("/", 2)
        source = f"{owner}/{repository}"
    if local.exists():
        _check_files(name, local)
    try:
        config = PeftConfig.from_pretrained(source, **where)
        weights = load_peft_weights(source, device="cpu", **where)
    except (OSError, ValueError) as error:
        if local.exists() and (local / _FILE).is_file() and _has_weights(local):
            raise _unreadable(name, "config or weights", source, error) from error
        raise FileNotFoundError(
            f"adapter {name!r}: found none at {source!r}, neither as a folder nor on the hub "
            f"({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # PEFT checks no types, and torch raises anything
        raise _unreadable(name, "config or weights", source, error) from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    if not isinstance(config, LoraConfig) or kind != "LORA":
        raise ValueError(f"adapter {name!r} is of the kind {kind}; emlens runs LoRA adapters")
    _check_types(name, config)
    return config, {key.removeprefix("base_model.model."): value for key, value in weights.items()}


def _check_types(name: str, config: LoraConfig) -> None:
    """Refuse what PEFT takes as it comes, and fails on later."""
    for option, (kind, what) in _TYPES.items():
        value = getattr(config, option)
        if value is not None and not isinstance(value, kind):
            raise ValueError(
                f"adapter {name!r}: {option} is {value!r:.60} in its {_FILE}; it has to be {what}"
            )


def _has_weights(folder: Path) -> bool:
    return any((folder / file).exists() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))


def _unreadable(name: str, what: str, source: str, error: Exception) -> ValueError:
    return ValueError(
        f"adapter {name!r}: its {what} in {source} are not readable "
        f"({str(error).partition(chr(10))[0]}); were they fetched as a whole?"
    )


def _check_files(name: str, folder: Path) -> None:
    """Read what PEFT would fail on, or allocate for, without a word of the file."""
    try:
        read_json(folder / _FILE, dict)
    except ValueError as error:
        raise ValueError(f"adapter {name!r}: {error}") from error
    try:
        if (weights := folder / SAFETENSORS_WEIGHTS_NAME).exists():
            with opened_tensors(weights):
                pass
        elif (weights := folder / WEIGHTS_NAME).exists():
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
