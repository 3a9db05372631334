"""Operators of token pruning, one per file. The ``reference`` function of each file defines its operator in PyTorch."""

from .attention import attention
from .cls_prune_tokens import cls_prune_tokens
from .cls_scores import cls_scores
from .column_mean_attention import column_mean_attention
from .gather_tokens import gather_tokens
from .int8_linear import int8_linear
from .prune_epilogue import prune_epilogue
from .prune_tokens import prune_tokens
from .pruned_attention import pruned_attention
from .select_tokens import select_tokens

__all__ = [
    "attention",
    "cls_prune_tokens",
    "cls_scores",
    "column_mean_attention",
    "gather_tokens",
    "int8_linear",
    "prune_epilogue",
    "prune_tokens",
    "pruned_attention",
    "select_tokens",
]
