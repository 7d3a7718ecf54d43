"""A model to be evaluated as a file: base, adapters and edits, for `emlens/<config.yaml>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from emlens._reading import expanded, readable
from emlens._registry import EDITS
from emlens._yaml import read_yaml
from emlens.directions import Directions, read_directions
from emlens.hooked import Condition, Edit, HookedModel, load
from emlens.hooked.sites import check_layers

_SHARED = {"layer", "layers", "site", "where"}
_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "model": (str, "a name or a folder"),
    "engine": (str, "a name"),
    "dtype": (str, "a name"),
    "device_map": ((str, dict), "a name, or modules and devices"),
    "revision": (str, "a name"),
    "adapters": (dict, "names and folders, e.g. {medical: runs/medical}"),
    "adapter": (str, "a name"),
    "edits": (list, "a list"),
    "batch_tokens": (int, "a whole number"),
}


@dataclass(frozen=True)
class ModelConfig:
    """A hooked model, the adapter and the edits in force, as a YAML file says it.

    ```yaml
    model: smollm2-135m-instruct     # a hub name or a folder
    adapters: {medical: runs/medical}
    adapter: medical                 # which acts; the only one by default
    edits:
      - ablate: runs/direction.safetensors
        layer: 15                    # which of the file's layers; its only one by default
        layers: all                  # where it acts; that layer by default
      - add: runs/vector.safetensors
        dose: 0.1
    ```

    Files and folders are looked for beside the YAML file first, then from the working directory.

    Attributes:
        model: Name or folder, as for `emlens.load`.
        engine: Engine.
        dtype: Dtype of the weights.
        device_map: Placement of the weights.
        revision: Revision on the hub.
        adapters: LoRA adapters by name.
        adapter: The one in force, or None for the base.
        edits: Entries of edits: `add`, `ablate` or `clamp` with a file of directions, and
            `scale`, `dose` or `value`, `layer`, `layers`, `site`, `where`.
        batch_tokens: Padded tokens of a batch, answers included.
        folder: Where relative paths are looked for.
    """

    model: str
    engine: str = "nnsight"
    dtype: str = "auto"
    device_map: str | dict | None = None
    revision: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    adapter: str | None = None
    edits: Sequence[Mapping[str, Any]] = ()
    batch_tokens: int = 4096
    folder: Path = Path()

    @classmethod
    def read(cls, source: str | Path) -> Self:
        """Read a YAML file; any other name is that of a model without adapters and edits.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no mapping, lacks the model, or has an unknown entry (named).
        """
        path = expanded(source)
        if path.suffix not in (".yaml", ".yml"):
            return cls(str(source))
        readable(path, "no configuration {}")
        what = "a mapping that names a model, e.g. 'model: org/name'"
        record = read_yaml(path, dict, what)
        if "model" not in record:
            raise ValueError(f"{path} must hold {what}")
        known = {item.name for item in fields(cls)} - {"folder"}
        strange = [str(key) for key in record if key not in known]
        if strange:
            raise ValueError(
                f"{path}: unknown {', '.join(strange)}; there are {', '.join(sorted(known))}"
            )
        given = {key: value for key, value in record.items() if value is not None}
        for key, value in given.items():
            kind, meant = _TYPES[key]
            if not isinstance(value, kind):
                raise ValueError(f"{path}: {key} must be {meant}, not {value!r}")
        made = cls(**given, folder=path.parent)
        made._check(path)
        return made

    def load(self) -> tuple[HookedModel, Condition]:
        """The model, and the condition that its answers are given under.

        Raises:
            FileNotFoundError: If a file of directions or an adapter is not there.
            ValueError: If an entry is wrong, or as `emlens.load`.
        """
        placed = self._found(self.model)
        model = load(
            placed if Path(placed).is_dir() else self.model,
            engine=self.engine,  # type: ignore[arg-type]
            dtype=self.dtype,
            device_map=self.device_map,
            revision=self.revision,
            adapters={name: self._found(path) for name, path in self.adapters.items()} or None,
        )
        edits = []
        for place, entry in enumerate(self.edits):
            try:
                edits.append(self._edit(entry, model))
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"edit {place + 1} of {model.name}: {error}") from error
        acting = self._acting
        return model, Condition(None if acting is None else (acting,), tuple(edits))

    @property
    def _acting(self) -> str | None:
        if self.adapter is None and len(self.adapters) == 1:
            return next(iter(self.adapters))
        return self.adapter

    def _check(self, path: Path) -> None:
        if self.adapter is not None and self.adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"{path}: no adapter {self.adapter!r}; adapters are {known}")
        if self.adapter is None and len(self.adapters) > 1:
            raise ValueError(
                f"{path}: say with 'adapter:' which of {', '.join(self.adapters)} acts"
            )
        for place, entry in enumerate(self.edits):
            kinds = [kind for kind in EDITS if isinstance(entry, dict) and kind in entry]
            if len(kinds) != 1:
                raise ValueError(
                    f"{path}: edit {place + 1} must have one of {', '.join(EDITS)}, "
                    f"each with a file of directions; it is {entry!r}"
                )
            numbers = EDITS[kinds[0]].own_settings()
            known = {kinds[0], *numbers, *_SHARED}
            strange = [str(key) for key in entry if key not in known]
            if strange:
                raise ValueError(
                    f"{path}: edit {place + 1} ({kinds[0]}) has unknown {', '.join(strange)}; "
                    f"it may have {', '.join(sorted(known))}"
                )
            for key in numbers:
                if not isinstance(entry.get(key, 0), int | float):
                    raise ValueError(
                        f"{path}: edit {place + 1} ({kinds[0]}): {key} must be a number, "
                        f"not {entry[key]!r}"
                    )

    def _edit(self, entry: Mapping[str, Any], model: HookedModel) -> Edit:
        (kind,) = set(entry) & set(EDITS)
        source = read_directions(self._found(entry[kind]), d_model=model.d_model)
        options = {
            key: entry[key]
            for key in ("site", "where", *EDITS[kind].own_settings())
            if key in entry
        }
        if entry.get("layers") is not None:
            options["layers"] = check_layers(entry["layers"], model.n_layers)
        return EDITS[kind](_picked(source, entry.get("layer")), **options)

    def _found(self, path: str) -> str:
        beside = self.folder / expanded(path)
        return str(beside) if beside.exists() else str(path)


def _picked(source: Directions, layer: int | None) -> Directions:
    if layer is None:
        return source
    if layer not in source:
        raise ValueError(f"the file has no layer {layer}; it has {source.layers}")
    return source[layer]
