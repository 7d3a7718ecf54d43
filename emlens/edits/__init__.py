"""What to do with a direction in the forward pass: pure functions of a residual."""

from emlens.edits.bake import Baked, bake
from emlens.edits.edits import Ablate, Add, Clamp, Shift, to_vllm_lens

__all__ = [
    "Ablate",
    "Add",
    "Baked",
    "Clamp",
    "Shift",
    "bake",
    "to_vllm_lens",
]


def __dir__() -> list[str]:
    return list(__all__)
