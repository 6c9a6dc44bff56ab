"""``twilight kernels``: its verbs on the command line, what they print, and their exit statuses."""

from __future__ import annotations

import json

import pytest
import torch

from twilight import compiling, kernel_verbs, kernels
from twilight.cli import main
from twilight.compiling import Resources


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A compiler that finds what the test says; the results folder is the test's own."""
    made = {"spills": 0, "units": []}

    def compile_source(stem, expressions, arch):
        made["units"].append((stem, arch))
        registers = 40 if arch == "sm_80" else 60
        return [Resources(stem, each, arch, registers, made["spills"], 0, 0, 0.25) for each in expressions]

    monkeypatch.setattr(compiling, "compile_source", compile_source)
    monkeypatch.setattr(compiling, "cores", lambda: 1)
    monkeypatch.setattr(compiling, "supported_archs", lambda: ("sm_80", "sm_90", "sm_100"))
    monkeypatch.setattr(kernels, "versions", lambda: "NVRTC 13.5 and CuPy 14.2.0")
    monkeypatch.setattr(kernel_verbs, "checkout", lambda: tmp_path)
    compiling._key.cache_clear()
    yield made
    compiling._key.cache_clear()


def test_list_counts_the_instantiations_of_every_file(site, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["kernels", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "instantiations"]
    counts = dict(line.split() for line in lines[1:-1])
    assert counts == {f"{stem}.cu": str(len(all_of)) for stem, all_of in kernels.instantiations()}
    assert lines[-1] == "no GPU here that the kernels run on"


def test_list_says_what_is_compiled_for_the_gpu(site, monkeypatch, capsys):
    first = dict(kernels.instantiations())["append"][0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Fake")
    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(kernels, "arch_of", lambda index: "sm_90")
    monkeypatch.setattr(kernels, "is_cached", lambda stem, expression, index: expression == first)
    assert main(["kernels", "list", "--stem", "append", "top_p"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split() == ["file", "instantiations", "compiled"]
    assert lines[1].split() == ["append.cu", str(len(dict(kernels.instantiations())["append"])), "1"]
    assert lines[2].split()[::2] == ["top_p.cu", "0"]
    assert f"  {first}  compiled\n" in out
    assert "  append<half, 64, 1>\n" in out
    assert lines[-1].startswith("for NVIDIA Fake (sm_90) with ")
    assert main(["kernels", "list", "--stem", "append", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["stem"] == "append" and row["instantiations"][0] == first
    assert row["compiled"][:2] == [True, False]


def test_compile_prints_a_summary_and_remembers(site, compiled, capsys):
    words = ["kernels", "compile", "--stem", "append", "dense_attention"]
    assert main(words) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["file", "instantiations", "sm_80", "sm_90", "sm_100", "seconds"]
    count = len(dict(kernels.instantiations())["append"])
    assert lines[1].split() == ["append.cu", str(3 * count), "40", "60", "60", f"{0.75 * count:.1f}"]
    total = 3 * sum(len(all_of) for _, all_of in kernels.instantiations(["append", "dense_attention"]))
    assert lines[-1].startswith(f"{total} instantiations with NVRTC 13.5 and CuPy 14.2.0: {total} compiled in ")
    assert lines[-1].endswith(", 0 known from before")
    assert f"compiling for sm_80, sm_90, sm_100: 0 of {total}" in captured.err
    compiled["units"].clear()
    assert main(words) == 0
    assert f"0 compiled in 0 s, {total} known from before" in capsys.readouterr().out
    assert not compiled["units"]
    assert main([*words, "--fresh", "--arch", "sm_90"]) == 0
    assert {arch for _, arch in compiled["units"]} == {"sm_90"}


def test_compile_prints_every_instantiation_when_asked(site, compiled, capsys):
    assert main(["kernels", "compile", "--stem", "dense_attention", "--arch", "sm_80", "--verbose"]) == 0
    out = capsys.readouterr().out
    for expression in dict(kernels.instantiations())["dense_attention"]:
        assert f"sm_80 dense_attention: {expression}: 40 registers, 0 B smem\n" in out


def test_spills_fail_also_when_they_were_found_before(site, compiled, capsys):
    compiled["spills"] = 44
    for _ in range(2):
        assert main(["kernels", "compile", "--stem", "dense_attention", "--arch", "sm_90"]) == 1
        captured = capsys.readouterr()
        assert "dense_attention.cu" in captured.out
        all_of = dict(kernels.instantiations())["dense_attention"]
        first = captured.err.splitlines()[-len(all_of)]
        assert first.endswith(f"{all_of[0]}: 60 registers, 0 B smem, 44 B SPILLED, 0 B LOCAL")
        assert "error: kernels use local memory:\n" in captured.err
    assert len(compiled["units"]) == -(-len(all_of) // 6)  # in units of 6, once


@pytest.mark.parametrize(
    "words, status, said",
    [
        (["compile", "--arch", "sm_91"], 1, "--arch: NVRTC 13.5 and CuPy 14.2.0 knows sm_80, sm_90, sm_100, not sm_91"),
        (["compile", "--stem", "apend"], 2, "no kernel file 'apend'. Did you mean 'append'?"),
        (["list", "--stem", "apend"], 2, "no kernel file 'apend'. Did you mean 'append'?"),
        (["warmup"], 1, "no GPU to compile for"),
    ],
)
def test_what_is_not_there_is_named(site, compiled, monkeypatch, capsys, words, status, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["kernels", *words]) == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["compil"], ["compile", "--jobs", "0"], ["compile", "--jobs", "two"]])
def test_a_wrong_command_line_shows_the_usage(site, capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(["kernels", *words])
    assert stop.value.code == 2
    assert "usage: twilight kernels" in capsys.readouterr().err


def test_architecture_variants_are_accepted(site, compiled):
    assert main(["kernels", "compile", "--stem", "dense_attention", "--arch", "sm_90a", "sm_100f"]) == 0
    assert {arch for _, arch in compiled["units"]} == {"sm_90a", "sm_100f"}


def test_warmup_and_clear_say_where(site, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "warmup", lambda stems, jobs, progress: 7 * len(stems) * jobs)
    assert main(["kernels", "warmup", "--stem", "append", "top_p", "--jobs", "3"]) == 0
    assert capsys.readouterr().out == f"42 kernels ready in {tmp_path}\n"
    assert main(["kernels", "clear"]) == 0
    assert capsys.readouterr().out == f"deleted 0 files from {tmp_path}\n"
