"""The fused operations of the library: each a definition in torch and, where it pays, a Triton twin in `kernels`."""

from .blocks import (
    BLOCK_KERNEL_CHANNELS,
    MEMORY_MODES,
    PRECISIONS,
    coupling_blocks,
    flow,
    flow_definition,
    flow_path,
)
from .codebook import code_statistics, nearest_code
from .condition import (
    Condition,
    ConditionTables,
    condition_convolution,
    condition_tables,
    convolve_tables,
    dense_condition,
)
from .coupling import affine_coupling, affine_coupling_backward
from .dispatch import BACKENDS, fused, path
from .mixture import (
    SCORE_ROWS,
    MixtureScores,
    log_weights,
    mixture_losses,
    mixture_scores,
    mixture_terms,
    mixture_terms_backward,
    own_class_scores,
)
from .parameters import Block, Blocks, Position, SeparablePosition
from .place import place_distances

__all__ = [
    "BACKENDS",
    "BLOCK_KERNEL_CHANNELS",
    "MEMORY_MODES",
    "PRECISIONS",
    "SCORE_ROWS",
    "Block",
    "Blocks",
    "Condition",
    "ConditionTables",
    "MixtureScores",
    "Position",
    "SeparablePosition",
    "affine_coupling",
    "affine_coupling_backward",
    "code_statistics",
    "condition_convolution",
    "condition_tables",
    "convolve_tables",
    "coupling_blocks",
    "dense_condition",
    "flow",
    "flow_definition",
    "flow_path",
    "fused",
    "log_weights",
    "mixture_losses",
    "mixture_scores",
    "mixture_terms",
    "mixture_terms_backward",
    "nearest_code",
    "own_class_scores",
    "path",
    "place_distances",
]
