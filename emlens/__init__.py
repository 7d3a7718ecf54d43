"""Find, train, edit and measure the directions by which finetuning changes a chat model.

The names below are imported when they are first used, so `import emlens` costs nothing; the rest
is reached through its room (`emlens.directions`, `emlens.measures`, ...).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emlens import directions as directions
    from emlens import edits as edits
    from emlens import evals as evals
    from emlens import figures as figures
    from emlens import fisher as fisher
    from emlens import hooked as hooked
    from emlens import measures as measures
    from emlens import study as study
    from emlens import text as text
    from emlens import training as training
    from emlens import watch as watch
    from emlens.directions import Direction, Directions, compare, mean_diff
    from emlens.edits import Ablate, Add, Clamp, bake
    from emlens.hooked import HookedModel, load, wrap
    from emlens.measures import efficiency, influence, interval_level, log_odds, stability
    from emlens.study import run_study
    from emlens.text import Conversation, Pair, corpus, load_conversations, load_pairs
    from emlens.training import KLPenalty, Organism, train_adapter, train_vector

__version__ = "0.1.0"

__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "Conversation",
    "Direction",
    "Directions",
    "HookedModel",
    "KLPenalty",
    "Organism",
    "Pair",
    "bake",
    "compare",
    "corpus",
    "efficiency",
    "influence",
    "interval_level",
    "load",
    "load_conversations",
    "load_pairs",
    "log_odds",
    "mean_diff",
    "run_study",
    "stability",
    "train_adapter",
    "train_vector",
    "wrap",
]

_ROOMS = (
    "directions",
    "edits",
    "evals",
    "figures",
    "fisher",
    "hooked",
    "measures",
    "study",
    "text",
    "training",
    "watch",
)
_HOMES = {
    "Ablate": "edits",
    "Add": "edits",
    "Clamp": "edits",
    "Conversation": "text",
    "Direction": "directions",
    "Directions": "directions",
    "HookedModel": "hooked",
    "KLPenalty": "training",
    "Organism": "training",
    "Pair": "text",
    "bake": "edits",
    "compare": "directions",
    "corpus": "text",
    "efficiency": "measures",
    "influence": "measures",
    "interval_level": "measures",
    "load": "hooked",
    "load_conversations": "text",
    "load_pairs": "text",
    "log_odds": "measures",
    "mean_diff": "directions",
    "run_study": "study",
    "stability": "measures",
    "train_adapter": "training",
    "train_vector": "training",
    "wrap": "hooked",
}


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return import_module(f"emlens.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'emlens' has no attribute {name!r}{_advice(name)}")
    value = getattr(import_module(f"emlens.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS, "__version__"})


def _advice(name: str) -> str:
    """Where a name is, or which one is nearly it; no room is imported for that."""
    import ast
    from pathlib import Path

    from emlens._guesses import nearest

    if name.startswith("_"):
        return ""
    homes: dict[str, str] = {}
    for room in reversed(_ROOMS):
        for line in ast.parse(
            Path(__file__).with_name(room).joinpath("__init__.py").read_text()
        ).body:
            if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "__all__":
                homes |= {item: f"emlens.{room}.{item}" for item in ast.literal_eval(line.value)}
    homes |= {item: f"emlens.{item}" for item in (*__all__, *_ROOMS)}
    if name in homes:
        return f"; it is {homes[name]}"
    found = nearest(name, homes)
    return f"; did you mean {homes[found]}?" if found else ""
