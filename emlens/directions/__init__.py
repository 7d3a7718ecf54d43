"""What a direction is, how to read one out of a model, and how to compare many."""

from emlens.directions.adapters import AdapterScalars, adapter_scalars, adapter_vectors
from emlens.directions.compare import Comparison, compare, null_band
from emlens.directions.direction import Direction, Directions, cosine
from emlens.directions.extract import edit_diff, mean_diff, random_direction, residual_norm
from emlens.directions.moments import Moments
from emlens.directions.provenance import Provenance

__all__ = [
    "AdapterScalars",
    "Comparison",
    "Direction",
    "Directions",
    "Moments",
    "Provenance",
    "adapter_scalars",
    "adapter_vectors",
    "compare",
    "cosine",
    "edit_diff",
    "mean_diff",
    "null_band",
    "random_direction",
    "residual_norm",
]
