"""Dense peers: the same attention whichever way it is asked for. FlashInfer is played by a reference."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn.attention import SDPBackend

from tests.benchmarks.fake_flashinfer import FakeWrapper, attend, install, sequence
from twilight import Geometry
from twilight.benchmarks import dense
from twilight.benchmarks.check import WrongOutput, check_close
from twilight.benchmarks.methods import make
from twilight.benchmarks.timing import Deadline, OutOfTime
from twilight.benchmarks.workload import make_workload
from twilight.graph import StaticCache

LENGTH = 128


@pytest.fixture
def work():
    return make_workload(Geometry(2, 8, 2, 32, 16, torch.float32), 3, LENGTH, make("quest"), 4)


@pytest.fixture
def flashinfer(monkeypatch):
    install(monkeypatch)


@pytest.mark.parametrize("folded", [False, True])
def test_sdpa_attends_to_all_of_a_sequence(work, folded):
    layer = work.cache.layers[1]
    k, v = (dense.contiguous(pages, 3) for pages in (layer.k_pages, layer.v_pages))
    out = dense.sdpa(work.queries[1], k, v, SDPBackend.MATH, folded=folded)
    for row in range(3):
        expected = attend(work.queries[1][row], k[row].transpose(0, 1), v[row].transpose(0, 1))
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_paged_peers_attend_to_the_same_tokens(work, flashinfer):
    static = StaticCache(work.cache, LENGTH)
    peers = [dense.twilight_peer(work, static), *dense.flashinfer_peers(work, static)]
    assert [peer.name for peer in peers] == ["twilight, paged", "flashinfer", "flashinfer, tensor cores"]
    layer, table = work.cache.layers[1], work.cache.table.rows
    for peer in peers:
        out = peer.call(1)
        for row in range(3):
            k, v = (sequence(pages, table[row], LENGTH) for pages in (layer.k_pages, layer.v_pages))
            torch.testing.assert_close(out[row].double(), attend(work.queries[1][row], k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [LENGTH, LENGTH - 5])
def test_flashinfer_is_told_of_a_token_that_is_appended(work, flashinfer, length):
    layer = work.cache.layers[0]
    flash = dense.FlashInfer(work.cache.geometry, work.cache.page_table, length, tensor_cores=False)
    k, v = torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    flash.append(k, v, (layer.k_pages, layer.v_pages))
    out = flash.attend(work.queries[0], (layer.k_pages, layer.v_pages))
    for row in range(3):
        keys, values = (sequence(pages, work.cache.table.rows[row], length) for pages in (layer.k_pages, layer.v_pages))
        assert torch.equal(keys[-1], k[row])
        assert torch.equal(values[-1], v[row])
        torch.testing.assert_close(out[row].double(), attend(work.queries[0][row], keys, values), rtol=1e-4, atol=1e-5)


def test_all_that_run_are_timed_and_what_is_not_there_is_named(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # import raises
    found, skipped = dense.measure_dense(work, StaticCache(work.cache, LENGTH), 1, 1000, Deadline(None))
    assert set(found) == {"torch math", "torch math, folded", "twilight, paged"}
    assert all(times["us"] > 0 and times["error"] < 1e-3 for times in found.values())
    assert set(skipped) == {"flashinfer"}
    assert "flashinfer" in skipped["flashinfer"]


def test_a_peer_that_computes_something_else_is_no_baseline(work, flashinfer, monkeypatch):
    monkeypatch.setattr(FakeWrapper, "break_tensor_cores", True)
    found, skipped = dense.measure_dense(work, StaticCache(work.cache, LENGTH), 1, 1000, Deadline(None))
    assert "flashinfer" in found
    assert skipped["flashinfer, tensor cores"].startswith("WrongOutput: flashinfer, tensor cores: the output is")


def test_our_own_wrong_output_ends_the_run(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    right = dense.twilight_peer
    monkeypatch.setattr(
        dense, "twilight_peer", lambda *args: dense.Peer(dense.TWILIGHT, lambda i: right(*args).call(i) * 1.1, True)
    )
    with pytest.raises(WrongOutput, match="twilight, paged: the output is 0.1 away"):
        dense.measure_dense(work, StaticCache(work.cache, LENGTH), 1, 1000, Deadline(None))


def test_time_runs_out_between_kernels(work, flashinfer):
    deadline = Deadline(1e-9)
    with pytest.raises(OutOfTime):
        dense.measure_dense(work, StaticCache(work.cache, LENGTH), 1, 1000, deadline)


def test_a_nan_is_no_small_error():
    with pytest.raises(WrongOutput, match="nan away"):
        check_close(torch.tensor([1.0, torch.nan]), torch.ones(2), "x")
    assert check_close(torch.tensor([1.0, 1.001]), torch.ones(2), "x") == pytest.approx(7e-4, rel=0.1)
