"""Cells of the grid: what is measured, how many bytes it cannot avoid, and what fits the memory of a card.

Bytes are those that a step cannot avoid: metadata of every token, 4-bit keys of the candidates, K and V of what is
kept. What could stay on the chip, such as scores, does not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from twilight.ops.quantize import shadow_bytes

GRID_HEADS = ("32/8", "32/32")
GRID_BATCHES = (1, 8, 32, 64)
GRID_LENGTHS = (8192, 32768, 131072)
ELEMENT = 2
"""Bytes of a K or V element: half or bfloat16."""
UNION = 64
"""The workload's mean group union is the length over this."""
_MAX_LAYERS = 256
_QUEST_BYTES = 17.0
"""Metadata a token and kv head, at d=128 and page 16, that layers are counted and memory is planned with."""
_SLACK = 3 << 30
"""Bytes for torch, CuPy and temporaries."""


@dataclass(frozen=True)
class Cell:
    """One batch size, length and shape of the heads."""

    batch: int
    length: int
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    def __post_init__(self) -> None:
        if self.length % self.page_size:
            raise ValueError(f"cells: expected lengths in whole pages of {self.page_size}, got {self.length}")
        if self.length < 64:
            raise ValueError(f"cells: expected lengths of at least 64, got {self.length}")

    def __str__(self) -> str:
        return f"b={self.batch} N={self.length} heads={self.q_heads}/{self.kv_heads} d={self.head_dim}"

    @property
    def tokens(self) -> int:
        """Tokens of a layer, once for each kv head."""
        return self.batch * self.length * self.kv_heads

    @property
    def token_bytes(self) -> int:
        """K and V of one token of one kv head."""
        return 2 * self.head_dim * ELEMENT

    @property
    def shadow_token_bytes(self) -> float:
        """The 4-bit key of one token of one kv head."""
        return shadow_bytes(self.page_size, self.head_dim) / self.page_size

    @property
    def dense_bytes(self) -> int:
        """K and V of a layer."""
        return self.tokens * self.token_bytes

    def stage_bytes(
        self, metadata: float, candidates: float, read: float, *, estimates: bool, tail: float = 0.0
    ) -> dict[str, float]:
        """Return the bytes that each stage of a step cannot avoid.

        Args:
            metadata: that the selector reads of each token of the sequence and kv head.
            candidates: tokens a kv head, B0.
            read: tokens a kv head that attention reads, the group's union.
            estimates: whether candidates are scored at all.
            tail: bytes a kv head of the page means that attention reads.
        """
        heads = self.batch * self.kv_heads
        return {
            "select": heads * self.length * metadata,
            "estimate": heads * candidates * self.shadow_token_bytes if estimates else 0.0,
            "attend": heads * (read * self.token_bytes + tail),
        }

    def layer_bytes(self, metadata: float = _QUEST_BYTES) -> float:
        """Return the memory of one layer's cache."""
        return self.tokens * (self.token_bytes + self.shadow_token_bytes + metadata)

    def layers(self, l2_bytes: float, free: float = math.inf) -> int:
        """Return how many layers a replay goes through.

        So many that attention alone, the stage that reads least, reads twice the L2 cache; fewer if `free` bytes hold
        no more.
        """
        attend = self.tokens / UNION * self.token_bytes
        wanted = min(_MAX_LAYERS, math.ceil(2 * l2_bytes / attend))
        room = (free - _SLACK) / (self.memory(1) - _SLACK)
        return max(1, wanted if room >= wanted else int(room))

    def memory(self, layers: int) -> float:
        """Return the bytes that measuring so many layers takes, the selectors' scores and lists included."""
        lists = layers * self.batch * self.length * (2 * self.q_heads + 4 * self.kv_heads)
        return layers * self.layer_bytes() + 2 * lists + _SLACK

    def fits(self, free: float) -> bool:
        """Return whether one layer can be measured in so many free bytes."""
        return self.memory(1) <= free

    def as_dict(self) -> dict[str, int]:
        """Return the fields that results are found by."""
        return {
            "batch": self.batch, "length": self.length, "q_heads": self.q_heads, "kv_heads": self.kv_heads,
            "head_dim": self.head_dim, "page_size": self.page_size,
        }  # fmt: skip


def make_cells(
    cells: Sequence[str] | None, heads: Sequence[str], *, grid: bool = False, head_dim: int = 128, page_size: int = 16
) -> list[Cell]:
    """Return the cells that a command line asks for, those of the grid if `grid` is set.

    Args:
        cells: words ``batch:length``; 8k is 8192.
        heads: words ``query/kv``.
        grid: all of the grid's batches and lengths instead of `cells`.
        head_dim: d.
        page_size: P.
    """
    if grid and cells:
        raise ValueError("--grid: says which cells, and so does --cells; use one of them")
    pairs = [(batch, length) for length in GRID_LENGTHS for batch in GRID_BATCHES] if grid else _pairs(cells or ())
    return [Cell(batch, length, *parse_heads(word), head_dim, page_size) for word in heads for batch, length in pairs]


def parse_heads(word: str) -> tuple[int, int]:
    """Return the query and kv heads of ``"32/8"``."""
    query, slash, kv = word.partition("/")
    if not (slash and query.isdecimal() and kv.isdecimal() and int(kv) > 0 and int(query) % int(kv) == 0):
        raise ValueError(f"heads: expected QUERY/KV such as 32/8, one a multiple of the other, got '{word}'")
    return int(query), int(kv)


def parse_length(word: str) -> int:
    """Return the tokens of ``"32768"`` or ``"32k"``."""
    digits, factor = (word[:-1], 1024) if word[-1:] in "kK" else (word, 1)
    if not digits.isdecimal() or not int(digits):
        raise ValueError(f"cells: expected a length such as 32768 or 32k, got '{word}'")
    return int(digits) * factor


def _pairs(words: Sequence[str]) -> list[tuple[int, int]]:
    pairs = []
    for word in words:
        batch, colon, length = word.partition(":")
        if not (colon and batch.isdecimal() and int(batch)):
            raise ValueError(f"cells: expected BATCH:LENGTH such as 64:32k, got '{word}'")
        pairs.append((int(batch), parse_length(length)))
    return pairs
