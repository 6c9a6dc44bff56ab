"""`twilight bench launch`: every line on a CPU, what is counted as a launch, and its table."""

from __future__ import annotations

import time

import pytest
import torch

from twilight import cli, kernels
from twilight.benchmarks import host_cost
from twilight.benchmarks.results import load
from twilight.benchmarks.tables import render

SMALL = ["launch", "--device", "cpu", "--heads", "4/2", "--head-dim", "32", "--repeats", "1"]


def test_a_run_on_a_cpu_goes_through_every_operator(tmp_path, capsys):
    out = tmp_path / "x.json"
    assert cli.main(["bench", *SMALL, "--cells", "1:64", "2:128", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    data = load(out)
    assert data["benchmark"] == "launch"
    assert [(cell["batch"], cell["length"]) for cell in data["cells"]] == [(1, 64), (2, 128)]
    for cell in data["cells"]:
        assert set(cell["calls"]) == {
            "append", "budget", "page_scores", "top_k", "estimate_scores", "top_p", "sparse_attention",
            "dense_attention", "fused_decode", "TwilightAttention.attend",
        }  # fmt: skip
        for name, row in cell["calls"].items():
            assert 0 < row["p10"] <= row["us"] <= row["p90"]
            assert f"  {name} " in said
    assert cli.main(["bench", "report", str(out)]) == 0
    table = capsys.readouterr().out
    assert "|  | b=1, N=64 | b=2, N=128 | around launches |" in table
    assert "| TwilightAttention.attend | " in table


def test_the_mean_of_many_calls_is_timed():
    seen = []

    def call():
        seen.append(1)
        time.sleep(0.002)

    times = host_cost.time_host(call, 3, torch.device("cpu"), calls=4)
    assert len(seen) == 5 * 4
    assert 2000 < times["p10"] <= times["us"]


def test_launches_are_counted_and_still_made(monkeypatch):
    made = []
    monkeypatch.setattr(kernels.Kernel, "launch", lambda self, *words, **options: made.append((words, options)))
    before = kernels.Kernel.launch
    kernel = object.__new__(kernels.Kernel)

    def call():
        kernel.launch((1, 1, 1), cluster=2)
        kernel.launch((2, 1, 1))

    assert host_cost.count_launches(call) == 2
    assert made == [(((1, 1, 1),), {"cluster": 2}), (((2, 1, 1),), {})]
    assert kernels.Kernel.launch is before

    def fail():
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        host_cost.count_launches(fail)
    assert kernels.Kernel.launch is before


def test_what_is_around_the_launches_is_in_the_table():
    cell = {"batch": 8, "length": 4096, "calls": {
        "Kernel.launch": {"us": 3.0}, "top_p": {"us": 21.5, "launches": 1, "around": 18.5},
    }}  # fmt: skip
    lines = render("launch", {"cells": [cell]}).splitlines()
    assert lines[2:] == ["| Kernel.launch | 3.0 | – |", "| top_p | 21.5 | 18.5 |"]


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and kernels.available(torch.device("cuda"))),
    reason="needs an NVIDIA GPU of compute capability 8.0 or more, and CuPy",
)
def test_a_run_on_a_gpu_counts_launches(tmp_path):
    out = tmp_path / "x.json"
    assert cli.main(["bench", "launch", "--cells", "1:1k", "--repeats", "3", "--out", str(out)]) == 0
    (cell,) = load(out)["cells"]
    rows = cell["calls"]
    assert 0.5 < rows["Kernel.launch"]["us"] < 100
    for name in set(rows) - {host_cost.LAUNCH, host_cost.CLUSTER, "TwilightAttention.attend"}:
        assert rows[name]["launches"] == 1, name
        assert rows[name]["around"] > 0, name
