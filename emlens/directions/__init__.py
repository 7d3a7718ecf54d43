"""What a direction is, how to read one out of a model, and how to compare many."""

from emlens.directions.compare import Comparison, compare, null_band
from emlens.directions.direction import Direction, Directions, cosine
from emlens.directions.extract import edit_diff, mean_diff, random_direction, residual_norm
from emlens.directions.moments import Moments
from emlens.directions.provenance import Provenance

__all__ = [
    "Comparison",
    "Direction",
    "Directions",
    "Moments",
    "Provenance",
    "compare",
    "cosine",
    "edit_diff",
    "mean_diff",
    "null_band",
    "random_direction",
    "residual_norm",
]
