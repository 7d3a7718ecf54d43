"""Reading a LoRA adapter from a folder or from the hub."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor

from emlens._folders import recovered

_FILE = "adapter_config.json"


def read_adapter(name: str, source: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read the config and the weights of a LoRA adapter, by their names in the base model.

    Args:
        name: What errors call it.
        source: A folder or a hub name.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If it is not LoRA, or its weights are truncated.
    """
    local = recovered(Path(source).expanduser())
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
    try:
        config = PeftConfig.from_pretrained(source, **where)
        weights = load_peft_weights(source, device="cpu", **where)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"adapter {name!r}: found none at {source!r}, neither as a folder nor on the hub "
            f"({str(error).splitlines()[0]})"
        ) from error
    except SafetensorError as error:
        raise ValueError(
            f"adapter {name!r}: its weights in {source} are not readable ({error}); were they "
            "fetched as a whole?"
        ) from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    if not isinstance(config, LoraConfig) or kind != "LORA":
        raise ValueError(f"adapter {name!r} is of the kind {kind}; emlens runs LoRA adapters")
    return config, {key.removeprefix("base_model.model."): value for key, value in weights.items()}


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
