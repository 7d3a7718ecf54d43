"""What a direction is, how to read one out of a model, and how to compare many."""

from emlens._registry import CONSTRUCTIONS
from emlens.directions.adapters import AdapterScalars, adapter_scalars, adapter_vectors
from emlens.directions.compare import Comparison, compare, projection
from emlens.directions.confounds import confounds
from emlens.directions.counting import CountingOptions
from emlens.directions.decompose import (
    Decomposition,
    PromotedTokens,
    decompose,
    promoted_tokens,
)
from emlens.directions.direction import Direction, Directions
from emlens.directions.effects import convergence, edit_diff
from emlens.directions.extract import (
    both_diff,
    mean_diff,
    model_diff,
    random_direction,
    residual_norm,
)
from emlens.directions.features import FeatureDecomposition, in_features
from emlens.directions.fitted import extract_all, pca, probe
from emlens.directions.formats.hub import from_hub, push_to_hub
from emlens.directions.formats.lora import adapter_directions
from emlens.directions.formats.neighbours import (
    from_repeng,
    from_steering_vectors,
    to_repeng,
    to_steering_vectors,
)
from emlens.directions.formats.read import read_checkpoints, read_directions, write_directions
from emlens.directions.layer_comparison import LayerComparison, compare_layers
from emlens.directions.prompted import system_prompt_diff
from emlens.directions.provenance import Provenance
from emlens.directions.sides import matched, select_answers
from emlens.directions.subspace import SubspaceOverlap, subspace_overlap
from emlens.directions.vectors import Evidence, cosine

__all__ = [
    "CONSTRUCTIONS",
    "AdapterScalars",
    "Comparison",
    "CountingOptions",
    "Decomposition",
    "Direction",
    "Directions",
    "Evidence",
    "FeatureDecomposition",
    "LayerComparison",
    "PromotedTokens",
    "Provenance",
    "SubspaceOverlap",
    "adapter_directions",
    "adapter_scalars",
    "adapter_vectors",
    "both_diff",
    "compare",
    "compare_layers",
    "confounds",
    "convergence",
    "cosine",
    "decompose",
    "edit_diff",
    "extract_all",
    "from_hub",
    "from_repeng",
    "from_steering_vectors",
    "in_features",
    "matched",
    "mean_diff",
    "model_diff",
    "pca",
    "probe",
    "projection",
    "promoted_tokens",
    "push_to_hub",
    "random_direction",
    "read_checkpoints",
    "read_directions",
    "residual_norm",
    "select_answers",
    "subspace_overlap",
    "system_prompt_diff",
    "to_repeng",
    "to_steering_vectors",
    "write_directions",
]


def __dir__() -> list[str]:
    return list(__all__)
