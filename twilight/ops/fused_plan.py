"""Which cluster, block and shared memory a row of the fused kernel gets: the launch of raw_kernels/fused_decode.cu."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import NamedTuple

from twilight import kernels
from twilight.ops.scratch import max_cluster, shared_memory

TILE = 16
"""Tokens of a list that a block is dealt at a time."""


class Layout(ctypes.Structure):
    """Mirrors the struct of raw_kernels/fused_decode.cu."""

    _fields_ = [
        (name, ctypes.c_int) for name in ("numbers", "keys", "list", "keep", "bins", "mail", "results", "parts")
    ]


class Shape(NamedTuple):
    """What a launch has to do.

    Attributes:
        rows: sequences times kv heads.
        max_pages: of a sequence.
        capacity: candidates of a row: pages, or tiles of `TILE` tokens where these are listed.
        group: query heads of a kv head.
        dim: d.
        vectors: of d bytes, of each page.
        page_size: P.
        tail: whether what is pruned leaves one.
        listed: candidates are a list of tokens.
    """

    rows: int
    max_pages: int
    capacity: int
    group: int
    dim: int
    vectors: int
    page_size: int
    tail: bool
    listed: bool = False

    @property
    def entry_size(self) -> int:
        """Tokens of a candidate."""
        return TILE if self.listed else self.page_size


@dataclass(frozen=True)
class Plan:
    """How a row is cut: blocks of a cluster, warps of a block, pages and candidate pages of a block, its memory."""

    cluster: int
    warps: int
    pages: int
    entries: int
    layout: Layout
    smem: int


@functools.lru_cache(maxsize=1024)
def plan(shape: Shape, index: int) -> Plan | None:
    """Return the cut that should take least time on a device; None if a row fits no cluster."""
    block_limit, total = shared_memory(index)
    return cut_row(
        shape, num_sms=kernels.num_sms(index), block_limit=block_limit, total=total, most_blocks=max_cluster(index)
    )


def cut_row(shape: Shape, *, num_sms: int, block_limit: int, total: int, most_blocks: int) -> Plan | None:
    """Choose among blocks of a cluster and warps of a block by what a wave of blocks takes.

    A block streams its share of the row and then searches in it, and its neighbour does the same at the same time. On
    an H200: 32 bytes a nanosecond a multiprocessor, 24 for 8 warps alone; 18 us of searching for 16 warps and 15 for 8,
    and 1.5 and 2.4 more for every thousand candidates, a fifth more beside a neighbour. Fitted to what was measured
    from b=1 at 8k to b=64 at 32k and b=32 at 128k, with the cuts of either side; the sums are 3 us off at b=1, and 7 %
    above. Of lists of tokens rows are more and shorter, so that waves overlap, and a token takes 4 bytes more, which
    may be L1's: with both the choice is within 9 % of the best of up to ten cuts, at eight sizes from b=1 at 32k to
    b=32 at 128k.
    """
    dim, vectors, rows = shape.dim, shape.vectors, shape.rows
    best, least = None, float("inf")
    for cluster, fitting in FITTING.items():
        if cluster > most_blocks:
            break
        pages, entries = -(-shape.max_pages // (16 * cluster)) * 16, -(-shape.capacity // cluster)
        tokens = entries * shape.entry_size
        # Of what is chosen, a sixteenth is attended to.
        # A token by itself takes a sector of 32 bytes for its scale and zero, and twice 4 bytes to find it.
        size = vectors * dim * pages + tokens * (dim // 2 + (40 if shape.listed else 4)) + tokens // 16 * 4 * dim
        for warps in (16, 8) if dim < 256 else (8,):
            layout, smem = lay_out(shape, pages, entries, cluster, warps)
            room = smem + static_bytes(shape.group, dim)
            if room > block_limit:
                continue
            # Two blocks of 8 warps, if they leave something to L1; 256 channels take the registers of 16 warps.
            resident = 2 if warps == 8 and dim < 256 and room <= total // 2 else 1
            if resident == 2 and room > _SMEM_OF_TWO // 2:
                continue
            at_once = min(rows, int(fitting * num_sms * resident) // cluster)
            if at_once == 0:
                continue
            together = -(-at_once * cluster // num_sms)
            waves: float = -(-rows // at_once)
            streams = size * max(together / 32e3, 1 / (32e3 if warps == 16 else 24e3))
            if shape.listed:
                waves = max(1.0, rows / at_once)
                streams *= _SHORT_OF_L1 if room * resident > _SMEM_OF_TWO else 1.0
            search = 18 + 1.5e-3 * tokens if warps == 16 else (15 + 2.4e-3 * tokens) * (1.2 if together > 1 else 1.0)
            time = waves * (streams + search + _BARRIERS[cluster])
            if time < least:
                best, least = Plan(cluster, warps, pages, entries, layout, smem), time
    return best


def late_rows(cut: Plan, shape: Shape, num_sms: int) -> tuple[int, float]:
    """Return how many rows begin late, after as many that do not, and by how many ns for each page.

    All rows of a wave would stream together and search together. With two blocks a multiprocessor its second one waits
    for nearly as long as the first one reads pages: 2 % at b=64, 32k. Where each row has a multiprocessor and nearly
    all have one, a third of them waits for 3 ns a page: 3 % at b=16, 32k (70.7 to 68.6 us), 2 and 4 ns as much within
    0.3 us; a quarter of the rows gains 2 %, half of them nothing. Where a row has two and there are several waves, a
    third of the first waits for 2 ns: 1 % at b=32, 128k (463.3 to 456.4 us; 1 ns 460.7). One wave gains nothing.
    """
    if cut.cluster > 2 or shape.dim == 256 or not shape.vectors:
        return 0, 0.0
    rows, bytes_a_page = shape.rows, shape.vectors * shape.dim
    if cut.cluster == 2:
        return (num_sms // 6, bytes_a_page / 128) if cut.warps == 16 and rows > num_sms // 2 else (0, 0.0)
    if cut.warps == 8:
        return (num_sms, bytes_a_page / 32) if rows > num_sms else (0, 0.0)
    return (rows // 3, bytes_a_page / 85) if 0.9 * num_sms <= rows <= num_sms else (0, 0.0)


FITTING = {1: 1.0, 2: 1.0, 4: 0.93, 8: 0.9, 16: 0.84}
"""Blocks of a cluster, and the share of an H200's places that such clusters find: they must lie in one GPC."""
_BARRIERS = {1: 0.6, 2: 1.2, 4: 2.4, 8: 4.8, 16: 18.0}
"""Microseconds that blocks of a cluster wait for one another. 16 of them get 16 to 18 multiprocessors, not one each."""
_SMEM_OF_TWO = 196 * 1024
"""What two blocks may take together on sm_90: the rest, 60 KB, is L1, without which loads have no place to wait in.

With 164 KB it has 92, which is 5 % faster at b=64, 32k; `cut_row` does not tell the two apart."""

_SHORT_OF_L1 = 1.7
"""How much longer streams take where blocks leave L1 less: 313 instead of 265 us at b=8, 128k with Double Sparsity."""


_MAIL = 80
"""Bytes of the struct of raw_kernels/fused_select.cuh, to a multiple of 16."""


def static_bytes(group: int, dim: int) -> int:
    """Return what a block takes besides, at most: the queries, 3 KB of scratch, and what the GPU keeps for itself."""
    return 4096 + 24 * (1 if group <= 4 else 2) * dim


def lay_out(shape: Shape, pages: int, entries: int, cluster: int, warps: int) -> tuple[Layout, int]:
    """Return where things lie in the shared memory of a block, of so many pages and entries, and their bytes."""
    group, dim, tokens = shape.group, shape.dim, entries * shape.entry_size
    numbers = 4 * group * pages
    keys = numbers + 4 * pages
    # One after another in one place: scores and keys of pages, logits, rows of K and V, O.
    first = max(2 * group * tokens, 4 * tokens, 4 * warps * group * dim)
    if shape.vectors:
        first = max(first, keys + 4 * pages * cluster)
    keep = first + -(-(4 * tokens if shape.listed else 8 * entries) // 16) * 16
    bins = keep + -(-tokens // 128) * 16
    mail = bins + max(
        8192, 2048 * group * (2 if cluster > 1 else 1), -(-group * entries // 4) * 16 if shape.tail else 0
    )
    results = mail + (_MAIL if cluster > 1 else 0)
    parts = results + (4 * group * dim if cluster > 1 else 0)
    size = parts + 16 * cluster * (4 if group <= 4 else 8) + -(-cluster // 4) * 16
    return Layout(numbers, keys, first, keep, bins, mail, results, parts), size
