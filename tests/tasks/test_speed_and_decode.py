"""Speed, whose times mean nothing on a CPU but whose columns do; and decode as a task."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from twilight import TwilightAttention, kernels
from twilight.cli import main
from twilight.errors import UnsupportedModelError

SMALL = ("task=speed", "task.context=512", "task.repeats=2", "task.heads=8/2", "task.head_dim=32", "model.device=cpu",
         "task.allow_cpu=true")  # fmt: skip


def test_a_row_has_every_stage_and_what_was_read(run_task):
    found = run_task(*SMALL, "task.batch=2", "p=0.9")
    (row,) = found.rows
    assert (row["method"], row["gpu"], row["batch"], row["context"]) == ("twilight", "cpu", 2, 512)
    for name in ("select_us", "estimate_us", "prune_us", "attend_us", "total_us", "dense_us"):
        assert row[name] > 0
    assert row["ratio"] == pytest.approx(row["dense_us"] / row["total_us"])
    assert row["seq_len"] == 512 and row["b1_query"] < row["b0"] == 128
    # One layer, one token: K and V of 512 tokens of two kv heads, in float32.
    assert row["dense_kv_bytes"] == 512 * 2 * 2 * 32 * 4
    assert row["kv_fraction"] == pytest.approx(row["kv_bytes"] / row["dense_kv_bytes"])
    assert (row["sparse_layers"], row["dense_layers"]) == (1, 0)
    assert [each["head"] for each in found.tables["budgets"]] == list(range(8))


def test_every_selector_that_needs_no_prompt_runs(run_task):
    for selector in ("full", "double_sparsity", "streaming_llm"):
        assert run_task(*SMALL, f"selector={selector}").rows[0]["total_us"] > 0
    with pytest.raises(UnsupportedModelError, match="selector 'h2o' goes by what it observed of a prompt"):
        run_task(*SMALL, "selector=h2o")
    with pytest.raises(UnsupportedModelError, match="budget=ada goes by what it observed"):
        run_task(*SMALL, "budget=ada")
    # Without a pruner there is nothing to estimate.
    (row,) = run_task(*SMALL, "pruner=none").rows
    assert row["estimate_us"] is row["prune_us"] is None and row["b1_query"] == row["b0"]


@pytest.mark.parametrize("how, apart", [("one_launch", ()), ("one_after_select", ("select_us",))])
def test_what_one_launch_does_has_no_times_of_its_own(how, apart, run_task, monkeypatch):
    show = TwilightAttention._show
    monkeypatch.setattr(TwilightAttention, "_show", lambda self, step: show(self, replace(step, **{how: True})))
    (row,) = run_task(*SMALL, "p=0.9").rows
    for name in ("select_us", "estimate_us", "prune_us", "attend_us"):
        assert (row[name] is not None) == (name in apart)
    assert row["total_us"] > 0


@pytest.mark.skipif(torch.cuda.is_available() and kernels.available(torch.device("cuda")), reason="there is a GPU")
def test_without_a_gpu_it_says_so(run_task):
    with pytest.raises(ValueError, match=r"need an NVIDIA GPU(.|\n)*task.allow_cpu=true"):
        run_task("task=speed")


@pytest.mark.gpu
def test_one_launch_has_no_stages_of_its_own(run_task):
    (row,) = run_task("task=speed", "task.context=8192", "task.repeats=3").rows
    assert row["select_us"] is None and row["total_us"] > 0 and 0 < row["floor_fraction"] < 1.2


def test_decode_as_a_task_has_what_decode_shows(run_task, capsys):
    pytest.importorskip("transformers", reason="needs the extra 'hf'")
    found = run_task("task.prompt_tokens=800", "task.num_facts=2")
    dense, sparse = found.rows
    assert (dense["method"], dense["correct"], dense["asked"]) == ("dense", 2, 2)
    assert (sparse["method"], sparse["correct"], sparse["agreement"]) == ("twilight", 2, 1)
    assert sparse["context"] == 800 and sparse["b1_query"] < sparse["b0"]
    assert len(found.tables["budgets"]) == 30
    assert capsys.readouterr().out == ""


def test_decode_is_for_one_prompt(capfd):
    assert main(["decode", "task=facts"]) != 0
    assert "measure with: twilight run task=facts" in capfd.readouterr().err
