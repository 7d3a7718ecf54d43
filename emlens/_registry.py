"""Registries of kinds by name, used by errors, files and help.

To add a kind, write it in a file of its own and add a line below. Kinds are imported on first use,
so that listing the names is cheap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from importlib import import_module
from typing import Any

from emlens._arguments import listed, shown


class Registry(Set[str]):
    """Kinds by name.

    Args:
        noun: The name of one in errors.
        places: `module:name` of each, or the kind itself.
    """

    def __init__(self, noun: str, places: Mapping[str, Any]) -> None:
        self._noun, self._places = noun, dict(places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Any:
        """The kind of a name.

        Raises:
            ValueError: If there is none; the names are listed.
        """
        if not isinstance(name, str) or name not in self._places:
            raise ValueError(f"unknown {self._noun} {shown(name)}; choose {self}")
        place = self._places[name]
        if isinstance(place, str):
            module, _, attribute = place.partition(":")
            place = self._places[name] = getattr(import_module(module), attribute)
        return place

    def __str__(self) -> str:
        return listed([repr(name) for name in self._places])


CONSTRUCTIONS = Registry(
    "construction",
    {
        "mean-diff": "emlens.directions.fitted:MEAN_DIFF",
        "logistic probe": "emlens.directions.fitted:LOGISTIC",
        "LDA probe": "emlens.directions.fitted:LDA",
        "PCA of differences": "emlens.directions.fitted:PCA",
    },
)
FORMATS = Registry(
    "format",
    {
        "emlens": "emlens.directions.formats.read:EMLENS",
        "papers": "emlens.directions.formats.papers:PAPERS",
        "gguf": "emlens.directions.formats.llama_cpp:GGUF",
        "peft": "emlens.directions.formats.lora:PEFT",
    },
)
EDITS = Registry(
    "edit",
    {
        "add": "emlens.edits.edits:Add",
        "ablate": "emlens.edits.edits:Ablate",
        "clamp": "emlens.edits.edits:Clamp",
    },
)
CONTROLS = Registry(
    "controls",
    {
        "random": "emlens.measures.controls:RANDOM",
        "activation differences": "emlens.measures.controls:DIFFERENCES",
        "shuffled labels": "emlens.measures.controls:SHUFFLED",
    },
)
JUDGES = Registry(
    "judge",
    {
        "probe": "emlens.cli.judges:probe_judge",
        "local": "emlens.cli.judges:local_judge",
    },
)
