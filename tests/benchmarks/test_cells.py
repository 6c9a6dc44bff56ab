"""Cells: what a command line asks for, bytes counted by hand, layers, and what fits."""

from __future__ import annotations

import pytest

from twilight.benchmarks.cells import Cell, make_cells, parse_heads, parse_length

H200_L2 = 50 * 2**20


def test_words_become_cells():
    cells = make_cells(["64:32k", "1:8192"], ["32/8", "32/32"], head_dim=64, page_size=32)
    assert cells == [
        Cell(64, 32768, 32, 8, 64, 32), Cell(1, 8192, 32, 8, 64, 32),
        Cell(64, 32768, 32, 32, 64, 32), Cell(1, 8192, 32, 32, 64, 32),
    ]  # fmt: skip
    assert str(cells[0]) == "b=64 N=32768 heads=32/8 d=64"


def test_the_grid_is_two_shapes_of_four_batches_and_three_lengths():
    cells = make_cells(None, ["32/8", "32/32"], grid=True)
    assert len(set(cells)) == 24
    assert {cell.kv_heads for cell in cells} == {8, 32}
    assert {cell.batch for cell in cells} == {1, 8, 32, 64}
    assert {cell.length for cell in cells} == {8192, 32768, 131072}


@pytest.mark.parametrize(
    ("words", "heads", "message"),
    [
        (["64"], ["32/8"], "BATCH:LENGTH such as 64:32k, got '64'"),
        (["0:8k"], ["32/8"], "got '0:8k'"),
        (["1:8m"], ["32/8"], "length such as 32768 or 32k, got '8m'"),
        (["1:100"], ["32/8"], "whole pages of 16, got 100"),
        (["1:32"], ["32/8"], "at least 64, got 32"),
        (["1:8k"], ["32"], "QUERY/KV such as 32/8"),
        (["1:8k"], ["32/7"], "QUERY/KV such as 32/8"),
        (["1:8k"], ["32/0"], "QUERY/KV such as 32/8"),
    ],
)
def test_a_wrong_word_is_named(words, heads, message):
    with pytest.raises(ValueError, match=message):
        make_cells(words, heads)


def test_grid_and_cells_exclude_each_other():
    with pytest.raises(ValueError, match="--grid"):
        make_cells(["1:8k"], ["32/8"], grid=True)


def test_lengths_and_heads():
    assert [parse_length(word) for word in ("32k", "128K", "512")] == [32768, 131072, 512]
    assert parse_heads("32/8") == (32, 8)


def test_bytes_of_a_layer_counted_by_hand():
    # 32/8 heads of 128, b = 64, N = 32768: 2^24 tokens of kv heads, 512 bytes each. At 4.3 TB/s that is 1998 us.
    cell = Cell(64, 32768)
    assert cell.dense_bytes == 8_589_934_592
    assert cell.dense_bytes / 4.3e6 == pytest.approx(1998, abs=1)
    # Quest's 8-bit bounds: 256 bytes of codes and 4 of scale and zero a page, 16.25 a token; 17 tokens of 68 bytes...
    moved = cell.stage_bytes(16.25, candidates=8192, read=512, estimates=True)
    assert moved["select"] == 64 * 8 * 32768 * 16.25 == 272_629_760
    assert moved["estimate"] == 64 * 8 * 8192 * 68 == 285_212_672
    assert moved["attend"] == 64 * 8 * 512 * 512 == 134_217_728
    assert cell.stage_bytes(16.25, 4096, 4096, estimates=False)["estimate"] == 0


def test_bytes_follow_the_shape():
    # Half the channels: 256 bytes of K and V; 4-bit keys of 32 + 4 bytes; four times the kv heads.
    cell = Cell(2, 1024, 32, 32, head_dim=64)
    assert (cell.token_bytes, cell.shadow_token_bytes, cell.tokens) == (256, 36, 65536)
    # K, V, 4-bit keys and 17 bytes of metadata.
    assert cell.layer_bytes() == 65536 * (256 + 36 + 17)


@pytest.mark.parametrize(
    ("batch", "length", "layers"),
    # Attention reads 8 bytes of a token and kv head: 524288 bytes at b = 1 and N = 8k, so 200 layers for 100 MiB.
    [(1, 8192, 200), (1, 32768, 50), (1, 131072, 13), (8, 32768, 7), (64, 32768, 1), (64, 131072, 1)],
)
def test_enough_layers_that_attention_alone_misses_the_l2(batch, length, layers):
    assert Cell(batch, length).layers(H200_L2) == layers


def test_never_more_layers_than_the_memory_holds():
    cell = Cell(1, 32768)
    assert cell.layers(H200_L2, free=cell.memory(50)) == 50
    assert cell.layers(H200_L2, free=cell.memory(20) + 1) == 20
    assert cell.memory(20) < cell.memory(21)


def test_what_fits_which_card():
    h200, h100 = 0.97 * 141e9, 0.97 * 79.6e9
    large = Cell(64, 131072, 32, 32)  # K and V alone are 137 GB
    assert large.dense_bytes > 137e9
    assert not large.fits(h200)
    assert Cell(32, 131072, 32, 32).fits(h200)
    assert not Cell(32, 131072, 32, 32).fits(h100)
    assert Cell(64, 131072).fits(h100)
    assert [cell for cell in make_cells(None, ["32/8", "32/32"], grid=True) if not cell.fits(h200)] == [large]
