"""Top-k over long rows: how a row is dealt to blocks. What is selected, tests/ops/test_top_k.py tests."""

from __future__ import annotations

import math
import re

import pytest

from twilight import resources
from twilight.ops import token_top_k

KEYS = 200 * 1024
"""Bytes of shared memory for keys, on an H200."""


@pytest.mark.parametrize("clusters", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 64, 512, 4096])
@pytest.mark.parametrize("n", [1, 8, 1000, 8192, 32768, 131072, 1_000_000])
def test_slices_cover_a_row_and_blocks_run_together(n: int, rows: int, clusters: bool) -> None:
    blocks, entries = token_top_k._team(rows, n, KEYS, 132, clusters=clusters, most=16)
    assert entries % 8 == 0 and blocks * entries >= n
    # No block is without work: the last slice begins inside the row.
    assert (blocks - 1) * entries < n
    assert blocks in (1, 2, 4, 8, 16) if clusters else blocks * rows <= max(132, rows)
    # Keys leave shared memory only where no team is large enough.
    assert 4 * entries <= KEYS or blocks == 16 or not clusters


def test_few_rows_are_spread_and_many_share_a_multiprocessor() -> None:
    def blocks(rows: int, n: int, clusters: bool = True) -> int:
        return token_top_k._team(rows, n, KEYS, 132, clusters=clusters, most=16)[0]

    # What was fastest on an H200.
    assert blocks(8, 131072) == blocks(8, 32768) == blocks(16, 32768) == 8 and blocks(8, 8192) == blocks(32, 32768) == 4
    assert blocks(64, 32768) == blocks(128, 32768) == 2 and blocks(128, 8192) == 1 and blocks(64, 131072) == 8
    assert blocks(8, 131072, clusters=False) == 16 and blocks(8, 8192, clusters=False) == 8
    # Two blocks and what they need beside their keys fit one multiprocessor.
    for n in (8192, 32768, 131072):
        of_row, entries = token_top_k._team(512, n, KEYS, 132, clusters=True, most=16)
        assert 2 * (4 * entries + token_top_k._STATIC_SMEM) <= KEYS + token_top_k._STATIC_SMEM
        assert of_row == {8192: 1, 32768: 2, 131072: 8}[n]


@pytest.mark.parametrize("rows", [8, 32, 64])
def test_where_clusters_are_of_8_at_most_none_is_larger(rows: int) -> None:
    for n in (8192, 65536, 262144, 1_000_000):
        blocks, entries = token_top_k._team(rows, n, 99 * 1024 - token_top_k._STATIC_SMEM, 170, clusters=True, most=8)
        assert blocks <= 8 and blocks * entries >= n


def test_blocks_without_clusters_have_room_for_what_they_exchange() -> None:
    source = (resources.folder("raw_kernels") / "token_team.cuh").read_text()
    sizes = {"kRadixBins": 2048, "kCoarse": 64, "kMaxGroup": 16, "2": 2}
    body = re.search(r"^struct Exchange {\n(.*?)^};", source, re.M | re.S)
    assert body and all(
        f"{name} = {size}" in source for name, size in sizes.items() if name in ("kCoarse", "kMaxGroup")
    )
    members = re.sub(r"//[^\n]*|\b(?:int|float)\b", "", body[1]).replace(";", ",").split(",")
    words = [
        math.prod(sizes[each] for each in re.findall(r"\[(\w+)\]", member)) for member in members if member.strip()
    ]
    assert 4 * sum(words) == token_top_k._EXCHANGE_BYTES
