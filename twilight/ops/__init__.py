"""Operators: one file each, with the public function and the torch reference that specifies it."""

from twilight.ops.append import append
from twilight.ops.attention_mass import attention_mass
from twilight.ops.attention_weights import attention_weights
from twilight.ops.budget import budget
from twilight.ops.dense_attention import dense_attention, exact_logits
from twilight.ops.fused_decode import NewTokens, fused_decode
from twilight.ops.label_scores import label_scores
from twilight.ops.label_top_k import label_top_k
from twilight.ops.merge import merge
from twilight.ops.page_scores import dequantize_bounds, page_scores, quantize_bounds
from twilight.ops.page_tail import page_tail
from twilight.ops.paging import new_positions
from twilight.ops.quantize import dequantize, quantize
from twilight.ops.rotate import rotate
from twilight.ops.sparse_attention import sparse_attention
from twilight.ops.spgemv import estimate_scores
from twilight.ops.summaries import Summary, key_labels, page_bounds, page_means
from twilight.ops.tail import MeanValues, Tail, mean_tail
from twilight.ops.threshold import threshold
from twilight.ops.top_k import top_k
from twilight.ops.top_p import join_group, keep_all, top_p
from twilight.ops.window_scores import window, window_scores

__all__ = [
    "MeanValues",
    "NewTokens",
    "Summary",
    "Tail",
    "append",
    "attention_mass",
    "attention_weights",
    "budget",
    "dense_attention",
    "dequantize",
    "dequantize_bounds",
    "estimate_scores",
    "exact_logits",
    "fused_decode",
    "join_group",
    "keep_all",
    "key_labels",
    "label_scores",
    "label_top_k",
    "mean_tail",
    "merge",
    "new_positions",
    "page_bounds",
    "page_means",
    "page_scores",
    "page_tail",
    "quantize",
    "quantize_bounds",
    "rotate",
    "sparse_attention",
    "threshold",
    "top_k",
    "top_p",
    "window",
    "window_scores",
]
