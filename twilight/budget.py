"""How large B0 is: the tokens that a selector may propose for a kv head."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

from twilight import ops
from twilight.checks import check_positive

if TYPE_CHECKING:
    from twilight.geometry import Geometry
    from twilight.layer_cache import LayerCache
    from twilight.selector import StateSpec


@dataclass(frozen=True)
class Budget:
    """What a selector is given: a number of tokens for each sequence and kv head.

    Attributes:
        tokens: `[b, Hkv]` int32, between 1 and the sequence's length (0 for an empty sequence).
        capacity: an upper bound of `tokens` known on the host; shapes are made from it.
        known_pages: what `pages` returns, for the page sizes that it has been asked for.
    """

    tokens: torch.Tensor
    capacity: int
    known_pages: dict[int, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def pages(self, page_size: int) -> torch.Tensor:
        """Return `[b, Hkv]` int32: the pages that hold `tokens` tokens, rounded up."""
        if page_size not in self.known_pages:
            self.known_pages[page_size] = (self.tokens + page_size - 1) // page_size
        return self.known_pages[page_size]

    def page_capacity(self, page_size: int) -> int:
        """Return the host's upper bound of `pages`."""
        return -(-self.capacity // page_size)


@dataclass(frozen=True, eq=False)
class UniformBudget:
    """The same budget for every layer and kv head, and the class that other policies subclass.

    A policy is given what it makes of `value` for everybody, once a step, and may change it layer by layer in
    `for_layer`. Like a selector it may keep state for rows, and observe prompts to fill it.

    Attributes:
        value: an int of tokens, or a float in (0, 1] that is a fraction of the current length. 1 is one token, 1.0 is
            all of them.
        min_tokens: a fraction never asks for fewer tokens than this.
    """

    value: int | float = 0.25
    min_tokens: int = 64

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise TypeError(f"budget: expected tokens (int) or a fraction (float), got {type(self.value).__name__}")
        if isinstance(self.value, float) and not (math.isfinite(self.value) and 0.0 < self.value <= 1.0):
            raise ValueError(f"budget: expected an int of tokens or a fraction in (0, 1], got {self.value}")
        if isinstance(self.value, int):
            check_positive("budget", self.value)
        check_positive("min_tokens", self.min_tokens)

    def check_capacity(self, capacity: int | None) -> None:
        """Refuse more tokens than a cache can hold; `capacity` is None for one that grows."""
        if capacity is not None and isinstance(self.value, int) and self.value > capacity:
            raise ValueError(f"budget: {self.value} tokens are more than the {capacity} that the cache can hold")

    def resolve(self, seq_lens: torch.Tensor, num_kv_heads: int, *, max_seq_len: int, page_size: int = 16) -> Budget:
        """Turn the policy into tokens, in one launch on a GPU. A cache does it once a step, for all of its layers.

        Args:
            seq_lens: `[b]` int32, tokens of each sequence.
            num_kv_heads: kv heads of the layer.
            max_seq_len: the longest that any of `seq_lens` is, known on the host.
            page_size: the page size for which `Budget.pages` is known at once.
        """
        if isinstance(self.value, float):
            capacity = max(self.min_tokens, math.ceil(max_seq_len * self.value))
        else:
            capacity = self.value
        tokens, pages = ops.budget(seq_lens, num_kv_heads, self.value, min_tokens=self.min_tokens, page_size=page_size)
        return Budget(tokens, max(1, min(capacity, max_seq_len)), {page_size: pages})

    def for_layer(self, mean: Budget, layer: LayerCache) -> Budget:
        """Return a layer's budget; `mean` as it comes, by default.

        Args:
            mean: what `resolve` gives every layer and kv head at this step.
            layer: the layer's cache, with the state that was asked for.
        """
        return mean

    def state(self, geometry: Geometry) -> tuple[StateSpec, ...]:
        """Return the tensors to be kept for each row, as `Selector.state` does; none by default.

        Their names must not be a selector's.
        """
        return ()

    def observe(self, q: torch.Tensor, layer: LayerCache) -> None:
        """See tokens that are attended to densely, as `Selector.observe` does."""

    def _identity(self) -> tuple[Any, ...]:
        # With types: a budget of 1 is one token, a budget of 1.0 is all of them, and 1 == 1.0.
        values = [getattr(self, field.name) for field in fields(self)]
        return type(self), *((type(value), value) for value in values)

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, UniformBudget) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity())


def parse_budget(value: int | float | UniformBudget) -> UniformBudget:
    """Return a policy for what a user wrote: tokens, a fraction, or a policy already."""
    return value if isinstance(value, UniformBudget) else UniformBudget(value)
