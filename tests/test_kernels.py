"""The loader, with a CuPy and a GPU that are not there: what is compiled, launched, cached, and said when it fails."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from twilight import clusters, kernels, ops
from twilight.errors import KernelError, MissingExtraError, UnknownNameError

APPEND = "append<half, 64, 0>"


class Params(ctypes.Structure):
    _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_float)]


class Machine:
    """What the fakes were asked for, and how they are to answer."""

    def __init__(self) -> None:
        self.capability = (9, 0)
        self.device = 0
        self.failure: Exception | None = None
        self.seconds = 0.0
        self.cached = False
        self.compiled: list[SimpleNamespace] = []
        self.launches: list[tuple] = []
        self.functions: list[SimpleNamespace] = []

    def raw_module(self, *, code, options, name_expressions):
        def get_function(expression):
            time.sleep(self.seconds)
            if self.failure:
                raise self.failure
            self.compiled.append(SimpleNamespace(code=code, options=options, expressions=name_expressions))
            if not self.cached:
                where = Path(os.environ["CUPY_CACHE_DIR"]) / f"{len(self.compiled):040}.cubin"
                where.write_text("what NVRTC made")
            function = SimpleNamespace(kernel=SimpleNamespace(ptr=1000 + len(self.compiled)))
            self.functions.append(function)
            return function

        return SimpleNamespace(get_function=get_function)

    def launch(self, function, gx, gy, gz, bx, by, bz, smem, stream, params, extra):
        # What the driver does: the one parameter is where the first pointer points.
        given = Params.from_address(ctypes.c_void_p.from_address(params).value)
        self.launches.append(
            (function, (gx, gy, gz), (bx, by, bz), smem, stream, self.device, (given.x, given.y))
        )  # fmt: skip

    def launch_together(self, *words):
        self.launch(*words, None)
        self.launches[-1] += ("together",)


class OnDevice:
    def __init__(self, machine, index):
        self.machine, self.index = machine, index

    def __enter__(self):
        self.before, self.machine.device = self.machine.device, self.index

    def __exit__(self, *_):
        self.machine.device = self.before


@pytest.fixture
def machine(monkeypatch, tmp_path):
    made = Machine()
    cupy = ModuleType("cupy")
    cupy.__version__ = "14.2.0"
    cupy.RawModule = made.raw_module
    cupy.cuda = SimpleNamespace(Device=lambda index: OnDevice(made, index))
    driver = ModuleType("cupy_backends.cuda.api.driver")
    driver.launchKernel = made.launch
    driver.launchCooperativeKernel = made.launch_together
    api = ModuleType("cupy_backends.cuda.api")
    api.driver = driver
    nvrtc = ModuleType("cupy_backends.cuda.libs.nvrtc")
    nvrtc.getVersion = lambda: (13, 5)
    for name, module in {
        "cupy": cupy, "cupy_backends": ModuleType("cupy_backends"), "cupy_backends.cuda": ModuleType("cuda"),
        "cupy_backends.cuda.api": api, "cupy_backends.cuda.api.driver": driver,
        "cupy_backends.cuda.libs": ModuleType("libs"), "cupy_backends.cuda.libs.nvrtc": nvrtc,
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TWILIGHT_QUIET", "0")
    monkeypatch.setattr(kernels, "_loaded", {})
    monkeypatch.setattr(kernels, "cupy_installed", lambda: True)
    monkeypatch.setattr(kernels, "_capability", lambda index: made.capability)
    monkeypatch.setattr(kernels, "_current_device", lambda: made.device)
    monkeypatch.setattr(kernels, "_raw_stream", lambda: lambda index: 7000 + index)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: made.device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "device", lambda index: OnDevice(made, index))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Fake")
    kernels.versions.cache_clear()
    yield made
    kernels.versions.cache_clear()


# Loading.


def test_an_instantiation_is_compiled_once_for_each_device(machine):
    kernel = kernels.load("append", APPEND)
    assert kernels.load("append", APPEND) is kernel
    (made,) = machine.compiled
    assert made.code == kernels.source_path("append").read_text()
    assert made.expressions == (APPEND,)
    assert f"-DSIZEOF_AppendParams={ctypes.sizeof(ops.append.__globals__['AppendParams'])}" in made.options
    assert f"-DTWILIGHT_SRC=0x{kernels.source_hash('append')}" in made.options
    assert f"-I{kernels.source_path('append').parent}" in made.options
    assert kernels.load("append", APPEND, device=torch.device("cuda", 1)) is not kernel
    assert kernels.load("append", "append<half, 64, 1>") is not kernel
    assert len(machine.compiled) == 3


def test_a_file_from_elsewhere_finds_the_headers_here(machine, tmp_path):
    (tmp_path / "mine.cu").write_text('#include "common.cuh"\n')
    kernels.load("mine", "mine<1>", structs=(Params,), source_folder=tmp_path)
    (made,) = machine.compiled
    assert made.code == '#include "common.cuh"\n'
    assert f"-DSIZEOF_Params={ctypes.sizeof(Params)}" in made.options
    assert [word for word in made.options if word.startswith("-I")] == [
        f"-I{tmp_path}", f"-I{kernels.source_path('append').parent}"
    ]  # fmt: skip


def test_a_later_load_may_ask_for_more_shared_memory(machine):
    kernels.load("append", APPEND, max_dynamic_smem=48 * 1024)
    (function,) = machine.functions
    assert not hasattr(function, "max_dynamic_shared_size_bytes")
    for asked, granted in ((100_000, 100_000), (60_000, 100_000), (200_000, 200_000)):
        kernels.load("append", APPEND, max_dynamic_smem=asked)
        assert function.max_dynamic_shared_size_bytes == granted


def test_large_clusters_are_asked_for_once_and_where_there_are_clusters(machine, monkeypatch):
    allowed = []
    monkeypatch.setattr(clusters, "allow_large", allowed.append)
    for most in (8, 16, 16):
        kernels.load("append", APPEND, max_cluster=most)
    assert allowed == [1001]
    machine.capability = (8, 0)
    kernels.load("append", APPEND, max_cluster=16, device=1)
    assert allowed == [1001]


# Launching.


def test_a_launch_passes_the_struct_by_value_on_torchs_stream(machine):
    kernels.load("append", APPEND).launch((3, 2, 1), (64, 1, 1), Params(5, 0.5), 1024)
    assert machine.launches == [(1001, (3, 2, 1), (64, 1, 1), 1024, 7000, 0, (5, 0.5))]


def test_an_empty_grid_launches_nothing(machine):
    kernels.load("append", APPEND).launch((0, 1, 1), (64, 1, 1), Params(5, 0.5))
    assert not machine.launches


def test_a_kernel_of_another_device_is_launched_there(machine):
    kernels.load("append", APPEND, device=1).launch((1, 1, 1), (64, 1, 1), Params(5, 0.5))
    assert machine.launches[0][4:6] == (7001, 1)
    assert machine.device == 0


def test_clusters_go_to_the_driver_with_their_size(machine, monkeypatch):
    seen = []
    monkeypatch.setattr(clusters, "launch", lambda *words: seen.append((*words, machine.device)))
    kernels.load("append", APPEND, device=1).launch((8, 2, 1), (64, 1, 1), Params(5, 0.5), 512, cluster=4)
    ((function, grid, block, smem, stream, pointer, cluster, device),) = seen
    assert (function, grid, block, smem, stream, cluster) == (1001, (8, 2, 1), (64, 1, 1), 512, 7001, 4)
    assert device == 1
    assert pointer.value
    assert not machine.launches


def test_a_cooperative_launch_is_made_as_one(machine):
    kernels.load("append", APPEND, device=1).launch((3, 2, 1), (64, 1, 1), Params(5, 0.5), 16, cooperative=True)
    assert machine.launches == [(1001, (3, 2, 1), (64, 1, 1), 16, 7001, 1, (5, 0.5), "together")]


class Driver:
    """Stands in for libcuda: keeps what `cuLaunchKernelEx` was handed."""

    status = 0

    def cuLaunchKernelEx(self, config, function, arguments, extra):
        self.config, self.function = config._obj, function.value
        first = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))[0]
        self.params = Params.from_address(first).x, Params.from_address(first).y
        assert extra is None
        return self.status

    def cuGetErrorString(self, status, text):
        text._obj.value = b"invalid cluster size"


def test_a_cluster_launch_is_laid_out_as_in_cuda_h(machine, monkeypatch):
    driver = Driver()
    monkeypatch.setattr(clusters, "_driver", lambda: driver)
    for cluster in (4, 8, 4):
        kernels.load("append", APPEND).launch((8, 2, 3), (64, 5, 6), Params(cluster, 0.5), 512, cluster=cluster)
        raw = (ctypes.c_uint * 7).from_buffer(driver.config)
        assert list(raw) == [8, 2, 3, 64, 5, 6, 512]
        pointers = (ctypes.c_void_p * 2).from_buffer(driver.config, 32)
        assert pointers[0] == 7000
        attribute = (ctypes.c_uint * 18).from_address(pointers[1])  # id, padding, and 64 bytes of value
        assert list(attribute)[:5] == [4, 0, cluster, 1, 1]
        assert (ctypes.c_uint * 1).from_buffer(driver.config, 48)[0] == 1
        assert driver.function == 1001 and driver.params == (cluster, 0.5)
    driver.status = 912
    with pytest.raises(RuntimeError, match=r"of \(8, 2, 3\) blocks in clusters of 4: invalid cluster size .* 912"):
        kernels.load("append", APPEND).launch((8, 2, 3), (64, 5, 6), Params(5, 0.5), 512, cluster=4)


# Sources.


def test_the_hash_follows_the_headers_that_a_file_includes(tmp_path):
    (tmp_path / "mine.cu").write_text('#include "one.cuh"\n  #  include "common.cuh"\n#include <cuda_fp16.h>\n')
    (tmp_path / "one.cuh").write_text('#include "two.cuh"\n')
    (tmp_path / "two.cuh").write_text('#include "one.cuh"\nint x;\n')
    (tmp_path / "three.cuh").write_text("int y;\n")
    names = [path.name for path in kernels.source_files("mine", tmp_path)]
    assert names == ["mine.cu", "one.cuh", "common.cuh", "two.cuh"]
    before = kernels.source_hash("mine", tmp_path)
    (tmp_path / "three.cuh").write_text("int z;\n")
    assert kernels.source_hash("mine", tmp_path) == before
    (tmp_path / "two.cuh").write_text('#include "one.cuh"\nint z;\n')
    assert kernels.source_hash("mine", tmp_path) != before


def test_every_file_of_raw_kernels_has_an_operator_with_instantiations():
    for stem, expressions in kernels.instantiations():
        assert expressions, stem
        assert len(set(expressions)) == len(expressions), stem
        source = kernels.source_path(stem).read_text()
        for expression in expressions:
            name = expression.partition("<")[0]
            assert f"{name}(const __grid_constant__" in source, f"{stem}.cu has no kernel {name}"


def test_an_unknown_file_gets_a_hint():
    with pytest.raises(UnknownNameError, match=r"no kernel file 'spgmv'. Did you mean 'spgemv'\?"):
        list(kernels.instantiations(["append", "spgmv"]))


# The disk cache.


def test_what_is_cached_is_known_and_cleared_without_touching_the_rest(machine, tmp_path):
    other = tmp_path / f"{99:040}.cubin"
    other.write_text("somebody else's")
    assert not kernels.is_cached("append", APPEND, 0)
    kernels.load("append", APPEND)
    assert kernels.is_cached("append", APPEND, 0)
    assert not kernels.is_cached("append", "append<half, 64, 1>", 0)
    machine.capability = (8, 0)
    assert not kernels.is_cached("append", APPEND, 0)
    machine.capability = (9, 0)
    # A second process finds CuPy's file: nothing new appears, and what is known stays.
    kernels._loaded.clear()
    machine.cached = True
    kernels.load("append", APPEND)
    assert kernels.clear() == 1
    assert [path.name for path in tmp_path.glob("*.cubin")] == [other.name]
    assert not kernels.is_cached("append", APPEND, 0)
    assert kernels.clear() == 0


def test_a_change_of_the_sources_is_not_cached(machine, monkeypatch):
    kernels.load("append", APPEND)
    monkeypatch.setattr(kernels, "source_hash", lambda *_: "0" * 16)
    assert not kernels.is_cached("append", APPEND, 0)


# What goes wrong.


def test_without_cupy_auto_uses_the_reference_and_cuda_says_what_to_install(machine, monkeypatch):
    monkeypatch.setattr(kernels, "cupy_installed", lambda: False)
    device = torch.device("cuda", 0)
    assert kernels.use_kernel("auto", device, None) is False
    for call in (lambda: kernels.load("append", APPEND), lambda: kernels.use_kernel("cuda", device, None)):
        with pytest.raises(
            MissingExtraError, match=r"CUDA kernels needs 'cupy': pip install 'twilight-attn\[cuda13\]'"
        ):
            call()
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.raises(MissingExtraError, match=r"twilight-attn\[cuda12\]"):
        kernels.load("append", APPEND)
    assert not machine.compiled


def test_an_old_gpu_is_named_with_what_runs_on_it(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    machine.capability = (7, 5)
    device = torch.device("cuda", 0)
    assert kernels.use_kernel("auto", device, None) is False
    for call in (lambda: kernels.load("append", APPEND), lambda: kernels.use_kernel("cuda", device, None)):
        with pytest.raises(KernelError, match=r"8\.0 or more, NVIDIA Fake has 7\.5\n  run with backend='torch'"):
            call()
    machine.capability = (8, 0)
    assert kernels.use_kernel("auto", device, None) is True
    assert kernels.use_kernel("cuda", device, None) is True


@pytest.mark.parametrize(
    "log, remedy",
    [
        ('append.cu(7): error: identifier "foo" is undefined\n1 error detected', "backend='torch' runs without it"),
        ('common.cuh(4): catastrophic error: cannot open source file "cuda_fp16.h"', "CUDA's headers are not where"),
        ('Failure finding "libnvrtc.so.13": No such file', "the compiler is not where CuPy looks for it: pip install"),
        ("nvrtc: error: invalid value for --gpu-architecture (-arch)", "this NVRTC is older than the GPU: pip install"),
        ('static assertion failed with "AppendParams: the ctypes mirror has another size"', "of different versions"),
        ("", "twilight doctor"),
    ],
)
def test_a_compile_that_fails_shows_the_log_the_kernel_and_what_to_try(machine, log, remedy):
    machine.failure = RuntimeError(log)
    with pytest.raises(KernelError) as raised:
        kernels.load("append", APPEND)
    text = str(raised.value)
    assert text.startswith(f"append.cu: {APPEND} cannot be compiled for sm_90 with NVRTC 13.5 and CuPy 14.2.0\n")
    assert all(f"    {line}\n" in text for line in (log or "RuntimeError").splitlines())
    assert remedy in text.splitlines()[-1]
    assert raised.value.__cause__ is machine.failure
    assert not kernels.is_cached("append", APPEND, 0)
    # It is not remembered either: once mended, it compiles.
    machine.failure = None
    assert kernels.load("append", APPEND).expression == APPEND


def test_a_long_log_is_cut(machine):
    machine.failure = RuntimeError("\n".join(f"line {i}" for i in range(100)))
    with pytest.raises(KernelError, match=r"line 39\n    \.\.\. and 60 lines more\n  twilight doctor"):
        kernels.load("append", APPEND)


def test_a_missing_cupy_module_inside_is_a_compile_error_too(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # installed, and broken
    with pytest.raises(KernelError, match="cannot be compiled for sm_90"):
        kernels.load("append", APPEND)


def test_a_slow_compile_says_so_and_a_quick_one_does_not(machine, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_PROGRESS_AFTER", 0.05)
    kernels.load("append", APPEND)
    assert capsys.readouterr().err == ""
    machine.seconds = 0.3
    kernels.load("append", "append<half, 64, 1>")
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("twilight: compiling append<half, 64, 1> for sm_90 (once;")
    assert said[1].endswith(" s")
    monkeypatch.setenv("TWILIGHT_QUIET", "1")
    kernels.load("append", "append<half, 64, 2>")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("backend", ["triton", ""])
def test_an_unknown_backend_names_the_ones_there_are(backend):
    with pytest.raises(ValueError, match=r"backend: expected 'auto', 'cuda' or 'torch', got"):
        kernels.use_kernel(backend, torch.device("cpu"), None)


def test_cuda_tensors_are_asked_for():
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        kernels.use_kernel("cuda", torch.device("cpu"), None)
