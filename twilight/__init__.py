"""Twilight: adaptive sparse attention for long-context LLM decoding.

A *selector* proposes candidate tokens, a *pruner* scores them with a 4-bit copy of the keys and keeps the smallest set
whose attention mass reaches p, exact attention runs on the rest (arXiv 2502.02770).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twilight import ops
from twilight.attention import TwilightAttention
from twilight.budget import Budget, UniformBudget
from twilight.budgets import AdaBudget, DynamicBudget, PyramidBudget
from twilight.cache import PagedKVCache
from twilight.errors import OutOfPagesError, TwilightError
from twilight.geometry import Geometry
from twilight.hookspecs import hookimpl
from twilight.layer_cache import LayerCache
from twilight.pruner import BoundedTopP, NoPruning, Pruner, Threshold, TopP
from twilight.selection import Selection
from twilight.selector import Contract, MetadataSpec, PageRanking, Selector, StateSpec, check_reduce, combine_group

if TYPE_CHECKING:
    from twilight.integrations.transformers import attach

__version__ = "0.1.0"

__all__ = [
    "AdaBudget",
    "BoundedTopP",
    "Budget",
    "Contract",
    "DynamicBudget",
    "Geometry",
    "LayerCache",
    "MetadataSpec",
    "NoPruning",
    "OutOfPagesError",
    "PageRanking",
    "PagedKVCache",
    "Pruner",
    "PyramidBudget",
    "Selection",
    "Selector",
    "StateSpec",
    "Threshold",
    "TopP",
    "TwilightAttention",
    "TwilightError",
    "UniformBudget",
    "attach",
    "check_reduce",
    "combine_group",
    "hookimpl",
    "ops",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import and is an extra: only `attach` needs it.
    if name == "attach":
        from twilight.integrations.transformers import attach

        return attach
    raise AttributeError(f"module 'twilight' has no attribute '{name}'")
