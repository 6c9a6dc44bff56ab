"""`twilight bench`: every line on a CPU, the loop over cells, and what a wrong command line is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twilight import cli, kernels
from twilight.benchmarks import cell as cells
from twilight.benchmarks import layer_step, main, runs
from twilight.benchmarks.results import Results, load
from twilight.benchmarks.timing import Deadline, OutOfTime

ROOT = Path(__file__).parents[2]
SMALL = ["--device", "cpu", "--heads", "4/2", "--head-dim", "32", "--repeats", "1"]
NEEDS_GPU = pytest.mark.skipif(
    not (torch.cuda.is_available() and kernels.available(torch.device("cuda"))),
    reason="needs an NVIDIA GPU of compute capability 8.0 or more, and CuPy",
)


def test_a_run_on_a_cpu_goes_through_everything(tmp_path, capsys):
    out = tmp_path / "x.json"
    assert cli.main(["bench", *SMALL, "--cells", "1:128", "2:256", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    data = load(out)
    assert data["gpu"] == "cpu"
    assert [(cell["batch"], cell["length"], cell["p"]) for cell in data["cells"]] == [(1, 128, 0.9), (2, 256, 0.9)]
    for cell in data["cells"]:
        assert {"quest top-k, N/8", "quest + top-p", "full + top-p", "double_sparsity + top-p"} <= set(cell["methods"])
        assert cell["best_dense"] == min(cell["dense"], key=lambda name: cell["dense"][name]["us"])
        dense = cell["dense"][cell["best_dense"]]["us"]
        for name, row in cell["methods"].items():
            assert row["speedup"] == pytest.approx(dense / row["total"]["us"])
            moved = sum(row["bytes"].values())
            assert row["gbps"] == pytest.approx(moved / row["total"]["us"] / 1e3)
            assert row["floor_fraction"] == pytest.approx(moved / (row["total"]["us"] * 1e6 * cell["bandwidth"]))
            assert f"  {name} " in said
        assert cell["fill_s"] > 0
    # A second call adds to the file, and leaves out what is there.
    assert cli.main(["bench", *SMALL, "--cells", "1:128", "1:64", "--missing", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "b=1 N=128 heads=4/2 d=32: there already" in said
    assert len(load(out)["cells"]) == 3


def test_a_method_out_of_memory_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    right = cells.measure_method

    def fail(method, *args):
        if method.name.startswith("double"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB.\nmore")
        return right(method, *args)

    monkeypatch.setattr(cells, "measure_method", fail)
    out = tmp_path / "x.json"
    assert main([*SMALL, "--cells", "1:64", "--out", str(out)]) == 0
    (cell,) = load(out)["cells"]
    assert "double_sparsity + top-p" not in cell["methods"]
    assert cell["skipped"]["double_sparsity + top-p"].startswith("out of memory: CUDA out of memory. Tried")
    assert "full + top-p" in cell["methods"]


def loop(tmp_path, names, run, *, fits=lambda cell: True, deadline=None, missing=False):
    said: list[str] = []
    head = {"benchmark": "decode", "gpu": "G", "versions": {}, "raw_kernels": "0123456789"}
    results = Results(tmp_path / "x.json", head)
    left = runs.run_all(
        names, run, fits, results, lambda name: sizes(name), deadline or Deadline(None), missing=missing,
        say=said.append,
    )  # fmt: skip
    return left, said, [cell["batch"] for cell in results.data["cells"]]


def sizes(batch: int) -> dict[str, object]:
    return {"batch": batch, "length": 64, "q_heads": 1, "kv_heads": 1, "head_dim": 1, "page_size": 16, "p": 0.9}


def test_what_does_not_fit_is_skipped_and_named(tmp_path):
    left, said, done = loop(tmp_path, [1, 2, 3], sizes, fits=lambda cell: cell != 2)
    assert (left, done) == (0, [1, 3])
    assert "2: skipped, does not fit this card's memory" in said


def test_time_runs_out_before_a_cell_or_in_it_and_what_is_there_is_kept(tmp_path):
    now = [0.0]
    deadline = Deadline(1, clock=lambda: now[0])

    def run(cell):
        now[0] += {1: 20, 2: 25, 3: 1, 4: 1}[cell]
        return sizes(cell)

    left, said, done = loop(tmp_path, [1, 2, 3, 4], run, deadline=deadline)
    assert (left, done) == (2, [1, 2])  # 45 + 25 > 60
    assert said[-2:] == ["3: no time left", "4: no time left"]

    def stop(cell):
        if cell == 3:
            raise OutOfTime
        return sizes(cell)

    left, said, done = loop(tmp_path, [1, 2, 3, 4], stop, missing=True)
    assert (left, done) == (1, [1, 2, 4])
    assert said[:3] == ["1: there already", "2: there already", "3: not finished in time"]


def test_the_grid_is_asked_for_with_both_shapes():
    args = layer_step.parse(["--grid", "--minutes", "9"])
    assert args.heads == ["32/8", "32/32"]
    assert args.cells is None
    assert args.minutes == 9
    args = layer_step.parse([])
    assert args.heads == ["32/8"]
    assert "64:32k" in args.cells
    assert layer_step.parse(["--device", "cpu"]).cells == ["1:512", "2:1k"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cells", "1"], "cells: expected BATCH:LENGTH such as 64:32k, got '1'"),
        (["--grid", "--cells", "1:8k"], "--grid: says which cells"),
        (["--p", "1.5"], "p: expected"),
        (["--minutes", "0"], "--minutes: expected more than 0, got 0.0"),
        (["--bandwidth", "-1"], "--bandwidth: expected more than 0 TB/s, got -1.0"),
        (["--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (["--device", "gpu"], "--device: expected cuda, cuda:1 or cpu, got 'gpu'"),
        (["modle"], "no benchmark 'modle'. Did you mean 'model'?"),
    ],
)
def test_a_wrong_command_line_is_told_what_is_wrong(words, message, capsys):
    device = [] if "--device" in words or words == ["modle"] else ["--device", "cpu"]
    assert cli.main(["bench", *words, *device]) != 0
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("benchmark", ["decode", "model"])
def test_without_a_gpu_it_says_what_there_is_instead(benchmark, capsys, tmp_path):
    assert cli.main(["bench", benchmark, "--out", str(tmp_path / "x.json")]) == 1
    error = capsys.readouterr().err
    assert "need an NVIDIA GPU of compute capability 8.0" in error
    assert "twilight doctor" in error
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("script", ["decode", "model"])
def test_the_scripts_run_from_a_checkout_that_is_not_installed(script, tmp_path):
    """With nothing of twilight in the environment but the checkout on the path."""
    site = tmp_path / "site"
    site.mkdir()
    hide = "[f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]"
    (site / "sitecustomize.py").write_text(f"import sys\nsys.meta_path[:] = {hide}\n")
    env = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    command = [sys.executable, f"benchmarks/{script}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: twilight bench{' model' if script == 'model' else ''} [-h]")


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("heads", ["32/8", "8/8"])
def test_a_small_cell_on_a_gpu(tmp_path, heads):
    out = tmp_path / "x.json"
    assert main(["--cells", "2:4k", "--heads", heads, "--repeats", "3", "--out", str(out)]) == 0
    (cell,) = load(out)["cells"]
    assert {"cudnn", "flash", "twilight, paged"} & set(cell["dense"])
    assert len(cell["methods"]) >= 4
    for row in cell["methods"].values():
        assert row["check"]["error_to_reference"] < 1e-2
        assert 0 < row["append"]["us"] < row["decode"]["us"]


def test_installed_selectors_are_timed_beside_the_others(tmp_path, capsys):
    out = tmp_path / "x.json"
    words = ["--selector", "oracle_topk", "block_mean:reduce=max,metadata_type=native"]
    assert cli.main(["bench", *SMALL, "--cells", "1:128", *words, "--out", str(out)]) == 0
    (cell,) = load(out)["cells"]
    mine = {"oracle_topk + top-p", "block_mean:reduce=max,metadata_type=native + top-p"}
    assert mine | {"quest + top-p", "full + top-p"} <= set(cell["methods"])
    # Each reads what its own metadata takes: all keys, and a mean a page.
    read = [cell["methods"][name]["bytes"]["select"] for name in sorted(mine)]
    assert read == [2 * 128 * 32 * 4 / 16, 2 * 128 * 32 * 4]


@pytest.mark.parametrize(
    ("word", "status", "said"),
    [
        ("qest", cli.USAGE, "no selector 'qest'. Did you mean 'quest'?"),
        ("quest:reduc=max", cli.USAGE, "no parameter 'reduc'"),
        ("snapkv", cli.FAILED, "--selector: 'snapkv' keeps state that prompts fill"),
    ],
)
def test_selectors_that_cannot_be_timed_are_refused_at_once(word, status, said, capsys):
    assert cli.main(["bench", *SMALL, "--cells", "1:128", "--selector", word]) == status
    assert said in capsys.readouterr().err
