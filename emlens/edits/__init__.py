"""What to do with a direction in the forward pass: pure functions of a residual."""

from emlens.edits.base import DirectionEdit
from emlens.edits.deltas import ablate_delta, add_delta, clamp_delta
from emlens.edits.edits import Ablate, Add, Clamp, Shift, edit_from_dict

__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "DirectionEdit",
    "Shift",
    "ablate_delta",
    "add_delta",
    "clamp_delta",
    "edit_from_dict",
]
