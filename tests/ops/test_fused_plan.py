"""How rows of the fused kernel are cut: what an H200 liked best, and that whatever is cut fits where it is to lie."""

from __future__ import annotations

import re

import pytest

from tests.fused_launches import H200
from tests.nvrtc import NVRTC
from twilight.compiling import compile_source
from twilight.ops.fused_plan import _SMEM_OF_TWO, Layout, Shape, cut_row, late_rows, lay_out, static_bytes
from twilight.resources import folder


@pytest.mark.parametrize(
    "batch,length,cluster,warps,late,ns",
    [
        (1, 8192, 4, 8, 0, 0),
        (1, 32768, 8, 8, 0, 0),
        (1, 131072, 8, 16, 0, 0),
        (8, 32768, 2, 16, 0, 0),
        (16, 32768, 1, 16, 42, 3),
        (32, 32768, 1, 8, 132, 8),
        (64, 32768, 1, 8, 132, 8),
        (8, 131072, 2, 16, 0, 0),
        (32, 131072, 2, 16, 22, 2),
    ],
)
@pytest.mark.parametrize("tail", [False, True])
def test_cuts_rows_as_an_h200_liked_it_best(batch, length, cluster, warps, late, ns, tail):
    # Measured: each against its neighbours; how many rows begin late, and by how much a page.
    shape = Shape(batch * 8, length // 16, length // 64, 4, 128, 2, 16, tail)
    plan = cut_row(shape, **H200)
    assert (plan.cluster, plan.warps) == (cluster, warps)
    assert late_rows(plan, shape, H200["num_sms"]) == (late, pytest.approx(ns, abs=0.1))


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("vectors", [0, 1, 2])
@pytest.mark.parametrize("dim,group,page", [(64, 1, 16), (128, 4, 16), (128, 8, 32), (256, 8, 16)])
@pytest.mark.parametrize(
    "gpu", [H200, {"num_sms": 84, "block_limit": 99 * 1024, "total": 100 * 1024, "most_blocks": 1}]
)
def test_every_cut_holds_the_row_and_fits(vectors, dim, group, page, gpu, tail):
    for rows in (1, 8, 100, 2000):
        for length in (page, 1000, 40000, 300000):
            pages = -(-length // page)
            capacity = -(-pages // 4) if vectors else pages
            plan = cut_row(Shape(rows, pages, capacity, group, dim, vectors, page, tail), **gpu)
            if plan is None:
                assert length > 1000 and gpu["most_blocks"] == 1 or length == 300000
                continue
            assert plan.pages * plan.cluster >= pages and plan.pages % 16 == 0
            assert plan.entries * plan.cluster >= capacity
            assert plan.smem + static_bytes(group, dim) <= gpu["block_limit"]
            assert plan.warps == 8 or dim < 256
            # What lies side by side at the end: logits, two lists, who is kept and what pages have lost.
            tokens = plan.entries * page
            of_heads = group * (2 * tokens + 4 * tail * plan.entries)
            assert plan.layout.list >= max(4 * tokens, 4 * plan.warps * group * dim)
            assert plan.smem >= of_heads + 8 * plan.entries + tokens // 8


def test_the_layout_is_the_kernels_field_by_field():
    # All are ints: the check of sizes that a launch makes does not see two that have changed places.
    source = (folder("raw_kernels") / "fused_decode.cu").read_text().split("struct Layout {")[1].split("};")[0]
    assert re.findall(r"^  int (\w+);", source, re.M) == [name for name, _ in Layout._fields_]


def test_what_fits_no_cluster_is_for_the_stages():
    assert cut_row(Shape(8, 65536, 65536, 8, 128, 2, 16, False), **H200) is None


def test_no_two_blocks_leave_nothing_to_l1():
    # 8 warps and 106 KB would be the fastest if a multiprocessor took one such block; it takes two.
    plan = cut_row(Shape(256, 2048, 61, 8, 64, 1, 16, False), **H200)
    room = plan.smem + static_bytes(8, 64)
    assert plan.warps == 16 or not _SMEM_OF_TWO // 2 < room <= H200["total"] // 2


@pytest.mark.parametrize("cluster", [1, 2, 16])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("vectors", [0, 1, 2])
def test_regions_of_shared_memory_hold_what_lies_there(vectors, tail, cluster):
    mail = (folder("raw_kernels") / "fused_select.cuh").read_text().split("struct Mail {")[1].split("};")[0]
    boxes = len(re.findall(r"^  u64 \w+;", mail, re.M))
    assert boxes > 1
    for group in range(1, 9):
        for dim, warps, entries, pages in ((64, 16, 1, 16), (128, 8, 37, 2048), (256, 8, 512, 48)):
            shape = Shape(1, pages, entries, group, dim, vectors, 16, tail)
            at, size = lay_out(shape, pages, entries, cluster, warps)
            tokens, heads = entries * 16, 4 if group <= 4 else 8
            # Phase by phase, what begins at 0: scores, numbers and keys; logits; rows of K and V; outputs of the warps.
            scores = 4 * group * pages
            if vectors:
                assert at.numbers >= scores and at.keys >= at.numbers + 4 * pages
                assert at.list >= at.keys + 4 * pages * cluster
            assert at.list >= max(2 * group * tokens, 4 * tokens, 4 * warps * group * dim)
            assert at.keep >= at.list + 8 * entries and at.bins >= at.keep + tokens // 8
            histograms = max(2048, 512 * group * (2 if cluster > 1 else 1), group * entries if tail else 0)
            assert at.mail >= at.bins + 4 * histograms
            assert at.results >= at.mail + (8 * boxes if cluster > 1 else 0)
            assert at.parts >= at.results + (4 * group * dim if cluster > 1 else 0)  # a piece of each block's output
            assert size >= at.parts + 2 * 8 * heads * cluster + 4 * cluster
            names = [name for name, _ in Layout._fields_ if vectors or name not in ("numbers", "keys")]
            assert all(getattr(at, name) % 16 == 0 for name in names)


@NVRTC
def test_large_workloads_leave_92_kb_to_l1():
    """256 KB of a multiprocessor are divided in steps, 164 for shared memory, then 196; 1 KB a block is the GPU's."""
    words = [f"fused_decode<128, 1, 2, {warps}, false, {plain}>" for warps in (8, 16) for plain in ("false", "true")]
    static = {each.expression: each.smem for each in compile_source("fused_decode", words, "sm_90")}
    for batch, length, blocks in ((64, 32768, 2), (32, 131072, 1)):
        plan = cut_row(Shape(batch * 8, length // 16, length // 64, 4, 128, 2, 16, True), **H200)
        own = max(size for word, size in static.items() if f", {plan.warps}, " in word) + 1024
        assert own <= static_bytes(4, 128)
        assert blocks * (plan.smem + own) <= 164 * 1024


@pytest.mark.parametrize(
    "batch,length,cut",
    [
        (1, 32768, (8, 8)),
        (8, 32768, (2, 16)),
        (16, 32768, (1, 16)),
        (64, 32768, (1, 16)),
        (4, 131072, (4, 16)),
        (8, 131072, (4, 16)),
        (16, 65536, (2, 16)),
        (32, 131072, (4, 16)),
    ],
)
def test_lists_of_tokens_are_cut_as_an_h200_liked_it(batch, length, cut):
    # Each within 9 % of the best of its neighbours; blocks that leave L1 nothing were a fifth slower than stages.
    plan = cut_row(Shape(batch * 8, length // 16, length // 64, 4, 128, 0, 16, False, listed=True), **H200)
    assert (plan.cluster, plan.warps) == cut
    assert plan.smem + static_bytes(4, 128) <= 196 * 1024


@pytest.mark.parametrize("group,dim", [(1, 64), (4, 128), (8, 128), (8, 256)])
@pytest.mark.parametrize("kib,blocks", [(99, 1), (99, 8), (163, 1)])
def test_lists_fit_smaller_gpus_or_are_for_the_stages(kib, blocks, group, dim):
    gpu = {"num_sms": 108, "block_limit": kib * 1024, "total": (kib + 1) * 1024, "most_blocks": blocks}
    for rows in (1, 8, 100, 2000):
        for tokens in (1, 500, 8192, 32768):
            plan = cut_row(Shape(rows, 2048, -(-tokens // 16), group, dim, 0, 16, False, listed=True), **gpu)
            if plan is None:
                # Places, logits, and outputs of the warps.
                assert tokens // blocks * 4 * (group + 2) + 32 * group * dim > kib * 512
                continue
            assert plan.cluster <= blocks and plan.entries * plan.cluster * 16 >= tokens
            assert plan.smem + static_bytes(group, dim) <= gpu["block_limit"]


@pytest.mark.parametrize("group,dim", [(1, 64), (4, 128), (8, 128), (8, 256)])
def test_a_listed_token_has_a_word_that_says_where_it_lies(group, dim):
    for rows, tokens in ((8, 8192), (8, 32768), (64, 8192), (512, 8192), (256, 32768), (8, 1)):
        shape = Shape(rows, 2048, -(-tokens // 16), group, dim, 0, 32, False, listed=True)
        plan = cut_row(shape, **H200)
        assert plan.entries * plan.cluster * 16 >= tokens  # whatever the size of a page
        at, held = plan.layout, plan.entries * 16
        assert at.list >= 2 * group * held and at.keep >= at.list + 4 * held and at.bins >= at.keep + held // 8
        assert at.keep % 16 == at.bins % 16 == 0
        assert plan.smem + static_bytes(group, dim) <= H200["block_limit"]
    assert cut_row(Shape(8, 65536, 65536, 8, 128, 0, 16, False, listed=True), **H200) is None
