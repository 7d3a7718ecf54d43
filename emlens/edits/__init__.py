"""What to do with a direction in the forward pass: pure functions of a residual."""

from emlens.edits.edits import Ablate, Add, Clamp, Shift

__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "Shift",
]


def __dir__() -> list[str]:
    return list(__all__)
