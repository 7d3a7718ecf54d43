"""Directions in the formats of others: read, written, and turned into their objects."""

from emlens.directions.formats.hub import from_hub, push_to_hub
from emlens.directions.formats.lora import adapter_directions, adapter_rows
from emlens.directions.formats.neighbours import (
    from_repeng,
    from_steering_vectors,
    to_repeng,
    to_steering_vectors,
)
from emlens.directions.formats.read import read_checkpoints, read_directions, write_directions

__all__ = [
    "adapter_directions",
    "adapter_rows",
    "from_hub",
    "from_repeng",
    "from_steering_vectors",
    "push_to_hub",
    "read_checkpoints",
    "read_directions",
    "to_repeng",
    "to_steering_vectors",
    "write_directions",
]
