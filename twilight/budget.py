"""How large B0 is: the tokens that a selector may propose for a kv head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from twilight.checks import check_positive


@dataclass(frozen=True)
class Budget:
    """What a selector is given: a number of tokens for each sequence and kv head.

    Attributes:
        tokens: `[b, Hkv]` int32, between 1 and the sequence's length (0 for an empty sequence).
        capacity: an upper bound of `tokens` known on the host; shapes are made from it.
    """

    tokens: torch.Tensor
    capacity: int

    def pages(self, page_size: int) -> torch.Tensor:
        """Return `[b, Hkv]` int32: the pages that hold `tokens` tokens, rounded up."""
        known: dict[int, torch.Tensor] = self.__dict__.setdefault("_pages", {})  # all layers of a step ask for the same
        if page_size not in known:
            known[page_size] = (self.tokens + page_size - 1) // page_size
        return known[page_size]

    def page_capacity(self, page_size: int) -> int:
        """Return the host's upper bound of `pages`."""
        return -(-self.capacity // page_size)


@dataclass(frozen=True)
class UniformBudget:
    """The same budget for every layer and kv head.

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

    def resolve(self, seq_lens: torch.Tensor, num_kv_heads: int, *, max_seq_len: int) -> Budget:
        """Turn the policy into tokens.

        Args:
            seq_lens: `[b]` int32, tokens of each sequence.
            num_kv_heads: kv heads of the layer.
            max_seq_len: the longest that any of `seq_lens` is, known on the host.
        """
        if isinstance(self.value, float):
            # In float64: float32 would turn 0.1 * 2**24 into a different number of tokens than the host's arithmetic.
            wanted = torch.ceil(seq_lens.double() * self.value).clamp(min=self.min_tokens)
            capacity = max(self.min_tokens, math.ceil(max_seq_len * self.value))
        else:
            wanted = torch.full_like(seq_lens, self.value, dtype=torch.float64)
            capacity = self.value
        tokens = torch.minimum(wanted, seq_lens.double()).to(torch.int32)
        return Budget(tokens[:, None].expand(-1, num_kv_heads).contiguous(), max(1, min(capacity, max_seq_len)))


def parse_budget(value: int | float | UniformBudget) -> UniformBudget:
    """Return a policy for what a user wrote: tokens, a fraction, or a policy already."""
    return value if isinstance(value, UniformBudget) else UniformBudget(value)
