"""Compiling ahead: what is compiled, kept and compiled again; with a compiler that is not there, and with NVRTC."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.nvrtc import NVRTC
from twilight import compiling, kernels
from twilight.compiling import Resources, Results, compile_all, compile_source
from twilight.errors import KernelError, MissingExtraError, UnknownNameError
from twilight.resources import folder

# The package has functions of these names.
APPEND, TOP_P = (import_module(f"twilight.ops.{stem}") for stem in ("append", "top_p"))


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of raw_kernels that a test may change; only append and top_p."""
    copy = tmp_path / "raw_kernels"
    copy.mkdir()
    for path in folder("raw_kernels").glob("*.cu*"):
        if path.suffix == ".cuh" or path.stem in ("append", "top_p"):
            shutil.copy(path, copy)
    monkeypatch.setattr(kernels, "folder", lambda name: copy)
    monkeypatch.setattr(APPEND, "INSTANTIATIONS", tuple(f"append<half, 64, {i}>" for i in range(3)))
    monkeypatch.setattr(TOP_P, "INSTANTIATIONS", ("top_p<half, 512, 1, true>",))
    return copy


class Compiler:
    """Stands in for `compile_source`: remembers what it was handed."""

    def __init__(self, monkeypatch) -> None:
        self.units: list[tuple[str, tuple[str, ...], str]] = []
        self.fails: set[str] = set()
        monkeypatch.setattr(compiling, "compile_source", self)
        monkeypatch.setattr(kernels, "versions", lambda: "NVRTC 13.5 and CuPy 14.2.0")
        compiling._key.cache_clear()

    def __call__(self, stem, expressions, arch):
        self.units.append((stem, tuple(expressions), arch))
        if stem in self.fails:
            raise KernelError(f"{stem}.cu cannot be compiled")
        return [Resources(stem, each, arch, 40, 0, 0, 16, 1.5) for each in expressions]

    def seen(self):
        units, self.units = self.units, []
        compiling._key.cache_clear()  # a process of its own would read the files again
        return sorted((stem, each, arch) for stem, expressions, arch in units for each in expressions)


@pytest.fixture
def compiler(monkeypatch):
    yield Compiler(monkeypatch)
    compiling._key.cache_clear()


ALL = [("append", f"append<half, 64, {i}>") for i in range(3)] + [("top_p", "top_p<half, 512, 1, true>")]


def of(archs, stems=("append", "top_p")):
    return sorted((stem, each, arch) for stem, each in ALL for arch in archs if stem in stems)


def run(where, archs=("sm_80", "sm_90"), **options):
    return compile_all(archs, jobs=1, results=Results(where), **options)


def test_nothing_is_compiled_twice(sources, compiler, tmp_path):
    first = run(tmp_path / "kept")
    assert compiler.seen() == of(("sm_80", "sm_90"))
    assert [(each.stem, each.arch, each.expression) for each in first] == [
        (stem, arch, each)
        for stem in ("append", "top_p")
        for arch in ("sm_80", "sm_90")
        for owner, each in ALL
        if owner == stem
    ]
    assert run(tmp_path / "kept") == first
    assert compiler.seen() == []
    assert run(tmp_path / "kept", fresh=True) == first
    assert compiler.seen() == of(("sm_80", "sm_90"))
    run(tmp_path / "kept", ("sm_90", "sm_121"))
    assert compiler.seen() == of(("sm_121",))
    run(None)
    assert compiler.seen() == of(("sm_80", "sm_90"))


def test_a_change_compiles_what_it_can_have_changed(sources, compiler, tmp_path, monkeypatch):
    run(tmp_path / "kept", ("sm_90",))
    compiler.seen()
    for file, stems in (("append.cu", ("append",)), ("threshold.cuh", ("top_p",)), ("common.cuh", ("append", "top_p"))):
        (sources / file).write_text((sources / file).read_text() + "// changed\n")
        run(tmp_path / "kept", ("sm_90",))
        assert compiler.seen() == of(("sm_90",), stems), file
    (sources / "mma.cuh").write_text("// changed, and included by neither\n")
    run(tmp_path / "kept", ("sm_90",))
    assert compiler.seen() == []
    monkeypatch.setattr(APPEND, "INSTANTIATIONS", tuple(f"append<half, 64, {i}>" for i in range(4)))
    run(tmp_path / "kept", ("sm_90",))
    assert compiler.seen() == [("append", "append<half, 64, 3>", "sm_90")]
    monkeypatch.setattr(kernels, "versions", lambda: "NVRTC 12.9 and CuPy 14.2.0")
    run(tmp_path / "kept", ("sm_90",), stems=["top_p"])
    assert compiler.seen() == of(("sm_90",), ("top_p",))


def test_the_size_of_a_struct_is_part_of_what_is_compiled(sources, compiler, tmp_path, monkeypatch):
    run(tmp_path / "kept", ("sm_90",))
    compiler.seen()
    monkeypatch.setattr(TOP_P, "STRUCTS", ())
    run(tmp_path / "kept", ("sm_90",))
    assert compiler.seen() == of(("sm_90",), ("top_p",))


def test_results_cut_short_are_compiled_again(sources, compiler, tmp_path):
    run(tmp_path / "kept", ("sm_90",), stems=["top_p"])
    compiler.seen()
    (file,) = (tmp_path / "kept").iterdir()
    file.write_text(file.read_text()[:40])
    run(tmp_path / "kept", ("sm_90",), stems=["top_p"])
    assert compiler.seen() == of(("sm_90",), ("top_p",))


def test_what_takes_longest_goes_first(sources, compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "_UNIT", 2)
    slow = Resources("top_p", "top_p<half, 512, 1, true>", "sm_90", 40, 0, 0, 16, 9.0)
    Results(tmp_path / "kept").keep([slow])
    run(tmp_path / "kept", ("sm_90",), fresh=True)
    assert [(stem, len(expressions)) for stem, expressions, _ in compiler.units] == [
        ("top_p", 1), ("append", 2), ("append", 1)
    ]  # fmt: skip


def test_one_failure_is_reported_and_the_rest_is_kept(sources, compiler, tmp_path):
    compiler.fails = {"append"}
    with pytest.raises(KernelError, match=r"append\.cu cannot be compiled\n  and 1 more"):
        run(tmp_path / "kept")
    compiler.seen()
    compiler.fails = set()
    run(tmp_path / "kept")
    assert compiler.seen() == of(("sm_80", "sm_90"), ("append",))


def test_progress_begins_with_what_is_known(sources, compiler, tmp_path):
    run(tmp_path / "kept", ("sm_90",), stems=["append"])
    told = []
    run(tmp_path / "kept", ("sm_90",), progress=lambda done, total: told.append((done, total)))
    assert told == [(3, 4), (4, 4)]


def test_an_unknown_file_is_refused_before_anything_is_compiled(sources, compiler):
    with pytest.raises(UnknownNameError, match="Did you mean 'append'"):
        run(None, stems=["top_p", "apend"])
    assert compiler.seen() == []


def test_without_cupy_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(kernels, "cupy_installed", lambda: False)
    for call in (compiling.supported_archs, lambda: compile_source("append", ["append<half, 64, 0>"], "sm_90")):
        with pytest.raises(MissingExtraError, match=r"compiling the CUDA kernels needs 'cupy': pip install"):
            call()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_workers_end_with_a_parent_that_is_killed():
    script = (
        "import multiprocessing as m, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from twilight import compiling\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, mp_context=m.get_context('spawn'), initializer=compiling._end_with_parent)\n"
        "    print(pool.submit(__import__('os').getpid).result(), flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        assert Path(f"/proc/{worker}").exists()
        parent.kill()
    deadline = time.monotonic() + 60
    while running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(worker)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# Warming up.


def test_warmup_loads_every_instantiation(sources, monkeypatch):
    loaded, told = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "check_device", lambda device: None)
    monkeypatch.setattr(kernels, "load", lambda stem, expression: loaded.append((stem, expression)))
    assert compiling.warmup(jobs=1, progress=lambda done, total: told.append((done, total))) == 4
    assert sorted(loaded) == ALL
    assert told[-1] == (4, 4)


def test_warmup_without_a_gpu_says_what_works_instead(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelError, match="no GPU to compile for\n  without one: twilight kernels compile"):
        compiling.warmup()


# The compiler itself.


@NVRTC
def test_nvrtc_reports_registers_and_spills():
    (found,) = compile_source("append", ["append<half, 64, 0>"], "sm_80")
    assert 16 < found.registers <= 128 and not found.wasteful
    assert str(found) == f"sm_80 append: append<half, 64, 0>: {found.registers} registers, 0 B smem"


@NVRTC
def test_nvrtc_reports_local_memory(sources):
    source = (sources / "append.cu").read_text()
    (sources / "append.cu").write_text(
        source.replace("__launch_bounds__(kWarps * kWarp, 4)", "__launch_bounds__(512, 4)")
    )
    (tight,) = compile_source("append", ["append<half, 64, 0>"], "sm_80")
    assert tight.registers <= 32 and tight.spills > 0 and tight.stack > 0 and tight.wasteful
    assert str(tight).endswith(f"{tight.spills} B SPILLED, {tight.stack} B LOCAL")


@NVRTC
def test_static_shared_memory_is_reported():
    (found,) = compile_source("append", ["append<half, 64, 0>"], "sm_90")
    assert found.smem == 0
    (found,) = compile_source("top_p", ["top_p<half, 384, 1, true>"], "sm_90")
    assert found.smem >= 16 * 12 * 4  # twelve arrays of 16 words and a few


@NVRTC
def test_what_nvrtc_says_is_shown(sources):
    with pytest.raises(KernelError) as raised:
        compile_source("append", ["append<half, 64, Nothing>"], "sm_90")
    assert "append.cu: append<half, 64, Nothing> cannot be compiled for sm_90 with NVRTC" in str(raised.value)
    assert 'identifier "Nothing" is undefined' in str(raised.value)
    source = (sources / "append.cu").read_text()
    (sources / "append.cu").write_text(source.replace("  int pages_per_row;", "  int pages_per_row, more, and_more;"))
    with pytest.raises(KernelError, match="AppendParams: the ctypes mirror has another size(.|\n)*different versions"):
        compile_source("append", ["append<half, 64, 0>"], "sm_90")
    (sources / "append.cu").write_text(source.replace("codes.cuh", "cuda_nowhere.h"))
    with pytest.raises(KernelError, match="CUDA's headers are not where CuPy looks for them: pip install"):
        compile_source("append", ["append<half, 64, 0>"], "sm_90")
    with pytest.raises(KernelError, match="this NVRTC is older than the GPU: pip install"):
        compile_source("top_p", ["top_p<half, 384, 1, true>"], "sm_999")


@NVRTC
def test_the_newest_architecture_is_among_the_default_ones():
    archs = compiling.default_archs()
    assert archs[:2] == ("sm_80", "sm_90")
    assert archs[-1] == compiling.supported_archs()[-1]
    numbers = [int(arch.removeprefix("sm_")) for arch in compiling.supported_archs()]
    assert numbers == sorted(numbers) and {80, 90} <= set(numbers)


@NVRTC
@pytest.mark.slow
def test_processes_find_what_one_process_finds(monkeypatch, tmp_path):
    monkeypatch.setattr(APPEND, "INSTANTIATIONS", ("append<half, 64, 0>", "append<bf16, 64, 1>"))
    monkeypatch.setattr(compiling, "_UNIT", 1)
    alone = compile_all(["sm_90"], ["append"], jobs=1)
    results = Results(tmp_path)
    together = compile_all(["sm_90"], ["append"], jobs=2, results=results)

    def bare(found):
        return [(each.expression, each.registers, each.spills, each.stack, each.smem) for each in found]

    assert bare(together) == bare(alone)
    assert compile_all(["sm_90"], ["append"], jobs=2, results=Results(tmp_path)) == together
    # An error comes back from another process as it was.
    monkeypatch.setattr(APPEND, "INSTANTIATIONS", ("append<half, 64, A>", "append<half, 64, B>"))
    with pytest.raises(KernelError, match=r'identifier "[AB]" is undefined(.|\n)*and 1 more'):
        compile_all(["sm_90"], ["append"], jobs=2)
