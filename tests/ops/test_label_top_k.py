"""Label top-k's reference against a loop over bytes in float64, and how the kernel's blocks divide a row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests import oracles
from tests.ops.test_label_scores import DIM, Case
from twilight import ops
from twilight.ops.label_top_k import _STATIC, cut_tokens

H200 = {"num_sms": 132, "block_limit": 227 * 1024, "most": 16}


def ranked(case, row, kv_head, reduce):
    """Combined score of each token of a row, from its bytes."""
    heads = []
    for head in range(kv_head * case.group, (kv_head + 1) * case.group):
        query = oracles.array(case.q[row, head])[case.channels[kv_head].tolist()]
        scores = [float(query @ case.label_of(row, kv_head, at)) / math.sqrt(DIM) for at in range(case.lengths[row])]
        weights = np.exp(np.array(scores) - max(scores))
        heads.append(weights / weights.sum() if reduce == "softmax" else np.array(scores))
    return np.stack(heads).max(0) if reduce == "max" else np.stack(heads).sum(0)


@pytest.mark.parametrize("reduce", ["softmax", "sum", "max"])
@pytest.mark.parametrize("bits", [2, 4, None])
def test_lists_the_best_of_the_oracle(bits, reduce):
    case = Case([13, 0, 1, 40], bits)
    counts = torch.tensor([[5, 13], [3, 0], [2, 1], [0, 11]], dtype=torch.int32)
    inputs = (case.q, case.label, case.channels, case.table, case.seq_lens, counts)
    for newest in (False, True):
        got = ops.label_top_k(*inputs, capacity=12, reduce=reduce, force_newest=newest)
        assert got.granularity == 1 and got.capacity == 12
        for row, length in enumerate(case.lengths):
            for head in range(2):
                count = min(int(counts[row, head]), length, 12)
                assert int(got.lengths[row, head]) == count
                score = ranked(case, row, head, reduce) if length else np.empty(0)
                if newest and length:
                    score[-1] = np.inf
                assert got.indices[row, head, :count].tolist() == sorted(np.argsort(-score)[:count].tolist())


def test_refuses_what_does_not_fit_together():
    case = Case([13, 1], 4)
    counts = torch.ones(2, 2, dtype=torch.int32)
    inputs = [case.q, case.label, case.channels, case.table, case.seq_lens, counts]
    with pytest.raises(ValueError, match=r"counts: expected shape \[2, 2\], got \[2, 1\]"):
        ops.label_top_k(*inputs[:5], counts[:, :1], capacity=3)
    with pytest.raises(ValueError, match="capacity: expected"):
        ops.label_top_k(*inputs, capacity=0)
    with pytest.raises(TypeError, match="page_table: expected dtype int32, got int64"):
        ops.label_top_k(*inputs[:3], case.table.long(), *inputs[4:], capacity=3)
    with pytest.raises(ValueError, match=r"q: expected shape \[2, any, any\], got \[1, 6, 24\]"):
        ops.label_top_k(case.q[:1], *inputs[1:], capacity=3)
    with pytest.raises(ValueError, match="q: expected a multiple of 2 heads, got 5"):
        ops.label_top_k(case.q[:, :5], *inputs[1:], capacity=3)
    with pytest.raises(ValueError, match="label: expected"):
        ops.label_top_k(case.q, (), *inputs[2:], capacity=3)
    with pytest.raises(ValueError, match="backend: 'cuda' needs CUDA tensors"):
        ops.label_top_k(*inputs, capacity=3, backend="cuda")


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("rows", [1, 8, 16, 32, 64, 128, 512])
def test_rows_run_at_once_or_by_two_launches(rows, group):
    for n in (1, 1000, 8192, 32768, 131072, 1_000_000):
        cut = cut_tokens(rows, n, group, **H200)
        if cut is None:
            assert rows > 64 or n * 2 * max(group, 2) > 64 * 1024
            continue
        blocks, pitch = cut
        assert rows * blocks <= 132 and pitch % 8 == 0
        # Steps of 64 tokens are dealt out whole: each slice has room for its own.
        assert pitch >= math.ceil(math.ceil(n / 64) / blocks) * 64
        assert 2 * max(group, 2) * pitch + _STATIC <= H200["block_limit"]


def test_few_rows_are_spread():
    blocks = [cut_tokens(rows, 32768, 4, **H200)[0] for rows in (8, 16, 32, 64)]
    assert blocks == [8, 4, 2, 2]
    assert cut_tokens(8, 131072, 4, **H200)[0] == 8 and cut_tokens(8, 1000, 4, **H200)[0] == 1
    # Of 128 rows each would have a multiprocessor, which does not hold it; 512 are several waves.
    assert cut_tokens(128, 32768, 4, **H200) is None and cut_tokens(512, 8192, 4, **H200) is None
    # Without clusters a row has one block.
    assert cut_tokens(8, 8192, 4, num_sms=132, block_limit=227 * 1024, most=1)[0] == 1
