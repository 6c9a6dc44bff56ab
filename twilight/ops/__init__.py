"""Operators: one file each, with the public function and the torch reference that specifies it."""

from twilight.ops.append import append
from twilight.ops.dense_attention import dense_attention, exact_logits
from twilight.ops.merge import merge
from twilight.ops.quantize import dequantize, quantize
from twilight.ops.sparse_attention import sparse_attention
from twilight.ops.spgemv import estimate_scores
from twilight.ops.top_p import keep_all, top_p

__all__ = [
    "append",
    "dense_attention",
    "dequantize",
    "estimate_scores",
    "exact_logits",
    "keep_all",
    "merge",
    "quantize",
    "sparse_attention",
    "top_p",
]
