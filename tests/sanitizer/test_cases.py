"""The sanitizer's scripts without a GPU: every file has a case that its reference can run, and no finding is missed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import fused_launches
from tests.nvrtc import NVRTC
from tests.sanitizer import cases, run, sweep
from twilight import compiling, kernels

FAKE = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
if words == ["--help"]:
    sys.exit(print("--initcheck-track-filtered-global-memory" if {follows} else "old"))
tool, words = words[1], words[2:]
filters = [words[i + 1] for i, word in enumerate(words) if word == "--kernel-name"]
command = words[words.index({python!r}):]
print("filters", *filters, "caching", os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING", "yes"))
if "--canary" in command:
    assert command[-1] == tool
    print({canary!r})
    sys.exit(86)
stem = command[-1]
if stem in {slow}:
    child = subprocess.Popen([{python!r}, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
    child.wait()
print(f"{{stem}}: 12 launches of 3 instantiations")
bad = stem in {bad}
print("========= ERROR SUMMARY: " + ("2 errors" if bad else "0 errors"))
sys.exit(86 if bad else 0)
"""


@pytest.fixture
def sanitizer(tmp_path):
    """Make a compute-sanitizer that answers as told; returns its path, for `--sanitizer`."""

    def make(*, canary="=========     at void canary<(int)0>(CanaryParams)+0x50", bad=(), slow=(), follows=True):
        program = tmp_path / "compute-sanitizer"
        told = {"canary": canary, "bad": tuple(bad), "slow": tuple(slow), "follows": follows}
        program.write_text(FAKE.format(python=sys.executable, **told))
        program.chmod(0o755)
        return ["--sanitizer", str(program), "--logs", str(tmp_path / "logs")]

    return make


def test_every_kernel_file_has_a_case():
    assert cases.missing() == []
    assert set(cases.CASES) <= set(cases.stems())


@pytest.mark.parametrize("stem", cases.stems())
def test_the_reference_runs_every_case(stem):
    made = [
        tensor for function in cases.CASES[stem] for each in function(cases.At("cpu")) for tensor in run.tensors(each)
    ]
    assert made
    assert all(isinstance(tensor, torch.Tensor) and tensor.numel() for tensor in made)


def test_the_one_launch_is_shown_in_every_kind(monkeypatch):
    made, at = fused_launches.record(monkeypatch), cases.At("cpu")
    at.backend = "cuda"
    for function in cases.CASES["fused_decode"]:
        list(function(at))

    def kind(expression):
        dim, tiles, vectors, warps, *flags = expression.removeprefix("fused_decode<").removesuffix(">").split(", ")
        return vectors, *flags

    shown = {kind(expression) for expression, _ in made}
    assert shown == {kind(expression) for expression in sys.modules["twilight.ops.fused_decode"].INSTANTIATIONS}
    # And a new token beside bounds, means or nothing, with a tail that it changes, and without one.
    assert {(kind(expression)[0], bool(params.value_codes)) for expression, params in made if params.k} == {
        (vectors, tail) for vectors in "012" for tail in (False, True)
    }


def test_a_file_without_a_case_fails(monkeypatch, capsys, sanitizer):
    monkeypatch.setattr(cases, "stems", lambda: ["append", "brand_new"])
    assert run.main(["--cpu"]) == 2
    assert "no case in tests/sanitizer/cases.py for: brand_new" in capsys.readouterr().err
    assert sweep.main(sanitizer()) == 2
    assert "brand_new" in capsys.readouterr().err


def test_an_unknown_file_gets_a_hint(capsys):
    assert run.main(["--cpu", "--kernel", "spgmv"]) == 2
    assert "Did you mean 'spgemv'" in capsys.readouterr().err


def test_a_case_that_launches_none_of_its_kernels_fails(monkeypatch, capsys):
    class Launched:
        expression = "top_k<512, 1, 0>"

    def other(at):
        kernels.Kernel.launch(Launched(), (1, 1, 1), (1, 1, 1), None)
        yield torch.zeros(1)

    monkeypatch.setattr(kernels.Kernel, "launch", lambda *_: None)
    monkeypatch.setattr(run, "initialise_counters", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setitem(cases.CASES, "top_p", [other])
    monkeypatch.setitem(cases.CASES, "top_k", [other])
    assert run.run("top_p", "cuda") == 1
    captured = capsys.readouterr()
    assert captured.out == "top_p: 0 launches of 0 instantiations\n"
    assert "top_p: none of its kernels ran: top_k<512, 1, 0>" in captured.err
    assert run.run("top_k", "cuda") == 0
    assert capsys.readouterr().out == "top_k: 1 launches of 1 instantiations\n"


def test_a_case_must_say_what_is_written():
    with pytest.raises(TypeError, match="a case yielded dict"):
        list(run.tensors(({},)))


def test_one_line_for_each_tool_and_kernel(sanitizer, capsys, tmp_path):
    assert sweep.main([*sanitizer(), "--kernel", "append", "top_p"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        [tool, stem, verdict]
        for tool in run.TOOLS
        for stem, verdict in (("canary", "found"), ("append", "ok"), ("top_p", "ok"))
    ]
    assert lines[1].endswith("12 launches of 3 instantiations")
    logs = {path.stem: path.read_text().splitlines()[0] for path in (tmp_path / "logs").iterdir()}
    assert len(logs) == 12
    assert logs["memcheck-append"] == "filters kns=_Z6append caching 1"
    assert logs["racecheck-top_p"] == "filters kns=_Z5top_p caching yes"
    assert logs["initcheck-canary"] == "filters kns=_Z6canary caching 1"


def test_findings_fail_and_are_told_with_their_number(sanitizer, capsys):
    words = [*sanitizer(bad=["top_p"]), "--kernel", "append", "top_p", "top_k", "--tool", "synccheck"]
    assert sweep.main(words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["found", "ok", "FOUND", "ok"]
    assert lines[2].endswith("12 launches of 3 instantiations; ERROR SUMMARY: 2 errors")


def test_what_takes_too_long_is_ended_with_its_children(sanitizer, capsys, tmp_path):
    words = [*sanitizer(slow=["top_k"]), "--kernel", "top_k", "append", "--tool", "memcheck", "--timeout", "5"]
    assert sweep.main(words) == 1
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["found", "TIMEOUT", "ok"]
    child = int((tmp_path / "logs" / "memcheck-top_k.log").read_text().split()[-1])
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child is still there")


def test_a_tool_that_misses_a_planted_error_is_not_trusted(sanitizer, capsys):
    # The script failed for another reason, which the tool reports as an error too.
    words = sanitizer(canary="ImportError: canary<\n========= Target application returned an error")
    assert sweep.main([*words, "--kernel", "append", "--tool", "racecheck"]) == 1
    out = capsys.readouterr().out
    assert "NOT FOUND" in out and "racecheck does not see a planted error" in out
    assert "append" not in out


def test_an_old_initcheck_gets_no_filter(sanitizer, tmp_path):
    assert sweep.main([*sanitizer(follows=False), "--kernel", "append", "--tool", "initcheck", "memcheck"]) == 0
    logs = {path.stem: path.read_text().splitlines()[0] for path in (tmp_path / "logs").iterdir()}
    assert logs["initcheck-append"] == "filters caching 1"
    assert logs["memcheck-append"] == "filters kns=_Z6append caching 1"


def test_a_missing_sanitizer_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "_PLACES", ())
    assert sweep.main(["--kernel", "append"]) == 2
    assert "compute-sanitizer is not here" in capsys.readouterr().err


def test_the_scripts_run_from_anywhere(tmp_path):
    script = Path(run.__file__)
    command = [sys.executable, str(script), "--cpu", "--kernel", "budget"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "budget: 1 case(s) through the reference\n"


@NVRTC
def test_the_canary_compiles():
    expressions = [f"canary<{fault}>" for fault in range(4)]
    here = Path(run.__file__).parent
    found = compiling.compile_source("canary", expressions, "sm_80", structs=(run.CanaryParams,), source_folder=here)
    assert [each.expression for each in found] == expressions
