"""The loader of the CUDA kernels: source, compiled function, launch on torch's current stream.

`raw_kernels/<stem>.cu` belongs to `twilight/ops/<stem>.py`, which says two things about it beside its Python function:

    INSTANTIATIONS   name expressions to compile ahead, such as ``"spgemv<half, 128, 16>"``
    STRUCTS          the `ctypes.Structure` classes that mirror its parameter structs

NVRTC compiles one instantiation at its first use, through CuPy's RawModule, for the GPU at hand; the result is kept in
CuPy's disk cache (`CUPY_CACHE_DIR`). CuPy does not look into headers when it forms the cache key, so a hash of the file
and of every header that it includes goes into the options.

``twilight kernels`` lists them, compiles them ahead and clears the cache; `twilight.compiling` compiles without a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from twilight import clusters
from twilight.errors import KernelError, missing_extra, unknown_name
from twilight.resources import folder

MIN_CAPABILITY = (8, 0)
_PROGRESS_AFTER = 0.5
"""Seconds that a compile may take before it says so."""
_LOG_LINES = 40
"""Lines of the compiler's log that an error shows."""

_loaded: dict[tuple[str, str, Path | None, int], Kernel] = {}
_lock = threading.Lock()


class Kernel:
    """A compiled function on one device. Made by `load`."""

    __slots__ = (
        "_cooperative_launch",
        "_cupy",
        "_device",
        "_driver_launch",
        "_function",
        "_max_cluster",
        "_max_smem",
        "_stream",
        "expression",
    )

    def __init__(self, expression: str, cupy_function: Any, device: int) -> None:
        from cupy_backends.cuda.api import driver

        self.expression = expression
        self._cupy = cupy_function  # the module is unloaded with its last reference
        self._function: int = cupy_function.kernel.ptr
        self._device = device
        self._max_smem, self._max_cluster = 48 * 1024, 8  # what needs no permission
        self._driver_launch: Callable[..., None] = driver.launchKernel
        self._cooperative_launch: Callable[..., None] = driver.launchCooperativeKernel
        self._stream = _raw_stream()

    def allow(self, max_dynamic_smem: int, max_cluster: int) -> None:
        """Let launches ask for so many bytes of dynamic shared memory, and blocks of a cluster, from now on."""
        if max_dynamic_smem > self._max_smem:
            self._cupy.max_dynamic_shared_size_bytes = max_dynamic_smem
            self._max_smem = max_dynamic_smem
        if max_cluster > self._max_cluster and _capability(self._device) >= (9, 0):
            clusters.allow_large(self._function)
            self._max_cluster = max_cluster

    def resident(self, threads: int, smem: int) -> int:
        """Return how many blocks of these threads and bytes of dynamic shared memory a multiprocessor runs at once."""
        return _resident(self, threads, smem)

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        params: ctypes.Structure,
        smem: int = 0,
        *,
        cluster: int = 1,
        cooperative: bool = False,
    ) -> None:
        """Launch on torch's current stream of the kernel's device.

        Args:
            grid: blocks; an empty grid launches nothing.
            block: threads of a block.
            params: passed by value; copied before this returns.
            smem: bytes of dynamic shared memory.
            cluster: blocks of a cluster along x, divides the grid; compute capability 9.0.
            cooperative: blocks wait for each other; the driver sees to it that all run at once, or refuses.
        """
        if 0 in grid:
            return
        device = self._device
        if _current_device() != device:
            with torch.cuda.device(device):
                return self.launch(grid, block, params, smem, cluster=cluster, cooperative=cooperative)
        # A pointer of this call's own: two threads may launch the same kernel.
        pointer = ctypes.c_void_p(ctypes.addressof(params))
        if cooperative:
            self._cooperative_launch(
                self._function, *grid, *block, smem, self._stream(device), ctypes.addressof(pointer)
            )
        elif cluster > 1:
            clusters.launch(self._function, grid, block, smem, self._stream(device), pointer, cluster)
        else:
            self._driver_launch(self._function, *grid, *block, smem, self._stream(device), ctypes.addressof(pointer), 0)


@functools.cache
def _resident(kernel: Kernel, threads: int, smem: int) -> int:
    from cupy_backends.cuda.api import driver

    with torch.cuda.device(kernel._device):
        return int(driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel._function, threads, smem))


def available(device: torch.device) -> bool:
    """Return whether kernels can run on `device`: CUDA, capability 8.0 or more, and CuPy installed."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return cupy_installed() and _capability(_index(device)) >= MIN_CAPABILITY


def use_kernel(backend: str, device: torch.device, unsupported: str | None) -> bool:
    """Decide between the kernel and the torch reference.

    Args:
        backend: ``"auto"``, ``"cuda"`` or ``"torch"``.
        device: where the tensors are.
        unsupported: why the kernel cannot take these tensors, or None if it can.

    Raises:
        ValueError: `backend` is another word, or is ``"cuda"`` and the kernel cannot take them.
        MissingExtraError, KernelError: it is ``"cuda"``, and CuPy is not installed or the GPU is too old.
    """
    if backend == "auto":
        return unsupported is None and available(device)
    if backend == "torch":
        return False
    if backend != "cuda":
        raise ValueError(f"backend: expected 'auto', 'cuda' or 'torch', got {backend!r}")
    if device.type != "cuda":
        raise ValueError(f"backend: 'cuda' needs CUDA tensors, got {device}; use backend='auto' or 'torch'")
    check_device(device)
    if unsupported is not None:
        raise ValueError(f"backend: 'cuda' cannot run this: {unsupported}; use backend='auto' or 'torch'")
    return True


def check_device(device: torch.device) -> None:
    """Raise what is missing, if kernels cannot run on `device`."""
    if not cupy_installed():
        raise missing_extra("cupy", extra(), "running the CUDA kernels")
    capability = _capability(_index(device))
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise KernelError(
            f"the CUDA kernels need compute capability 8.0 or more, {name} has {capability[0]}.{capability[1]}\n"
            "  run with backend='torch' on this GPU"
        )


def load(
    stem: str,
    expression: str,
    *,
    max_dynamic_smem: int = 0,
    max_cluster: int = 8,
    structs: Sequence[type[ctypes.Structure]] | None = None,
    source_folder: Path | None = None,
    device: torch.device | int | None = None,
) -> Kernel:
    """Return a kernel, compiled if this process has not used it yet.

    Args:
        stem: the file `<stem>.cu`.
        expression: the instantiation, such as ``"spgemv<half, 128, 16>"``.
        max_dynamic_smem: bytes of dynamic shared memory that a launch may ask for; above 48 KiB a kernel must be told.
        max_cluster: blocks of a cluster that a launch may ask for; above 8 a kernel must be told.
        structs: mirrors of the file's parameter structs; by default `STRUCTS` of `twilight.ops.<stem>`.
        source_folder: where the file lies, `raw_kernels` by default. Headers of `raw_kernels` are found from anywhere.
        device: torch's current CUDA device by default.

    Raises:
        MissingExtraError: CuPy is not installed.
        KernelError: the GPU is too old, the source does not compile, or there is nothing to compile it with.
    """
    if device is None:
        device = torch.cuda.current_device()
    index = device if isinstance(device, int) else _index(device)
    key = (stem, expression, source_folder, index)
    kernel = _loaded.get(key)
    if kernel is None:
        check_device(torch.device("cuda", index))
        with _lock:
            if key not in _loaded:
                with torch.cuda.device(index):
                    _loaded[key] = _compile(stem, expression, structs, source_folder, index)
            kernel = _loaded[key]
    kernel.allow(max_dynamic_smem, max_cluster)
    return kernel


def _compile(
    stem: str,
    expression: str,
    structs: Sequence[type[ctypes.Structure]] | None,
    source_folder: Path | None,
    index: int,
) -> Kernel:
    arch = arch_of(index)
    source = source_path(stem, source_folder)
    options = compile_options(stem, structs, source_folder)
    torch.cuda.current_stream(index).synchronize()  # makes sure that torch has set the primary context up
    try:
        import cupy

        with cupy.cuda.Device(index), _Progress(f"compiling {expression} for {arch}"):
            before = _cache_files()
            module = cupy.RawModule(code=source.read_text(), options=options, name_expressions=(expression,))
            function = module.get_function(expression)
    except Exception as error:
        raise compile_error(source.name, expression, arch, error) from error
    _remember(_mark(arch, stem, expression, options), _cache_files() - before)
    return Kernel(expression, function, index)


def compile_error(file: str, expression: str, arch: str, error: Exception) -> KernelError:
    """Build the error for a kernel that cannot be compiled: the compiler's own words, and what to try."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if len(lines) > _LOG_LINES:
        lines[_LOG_LINES:] = [f"... and {len(lines) - _LOG_LINES} lines more"]
    log = "\n".join(f"    {line}" for line in lines)
    return KernelError(
        f"{file}: {expression} cannot be compiled for {arch} with {versions()}\n{log}\n  {_remedy(str(error))}"
    )


def _remedy(log: str) -> str:
    """Say what to try."""
    install = f"pip install --upgrade 'twilight-attn[{extra()}]'"
    if "libnvrtc" in log:
        return f"the compiler is not where CuPy looks for it: {install}"
    if re.search(r'open source file "cuda_\w+\.h"', log):
        return f"CUDA's headers are not where CuPy looks for them: {install}"
    if "gpu-architecture" in log:
        return f"this NVRTC is older than the GPU: {install}"
    if "the ctypes mirror has another size" in log:
        return "sources and Python files are of different versions: pip install --force-reinstall twilight-attn"
    return "twilight doctor checks the compiler; backend='torch' runs without it"


@functools.cache
def versions() -> str:
    """Return the versions of NVRTC and CuPy, as far as there are any."""
    words = []
    with contextlib.suppress(Exception):
        words.append("NVRTC {}.{}".format(*importlib.import_module("cupy_backends.cuda.libs.nvrtc").getVersion()))
    with contextlib.suppress(Exception):
        words.append(f"CuPy {importlib.import_module('cupy').__version__}")
    return " and ".join(words) or "no NVRTC"


# ---- sources ----

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.M)


def source_path(stem: str, source_folder: Path | None = None) -> Path:
    """Return the file `<stem>.cu`."""
    return (source_folder or folder("raw_kernels")) / f"{stem}.cu"


def source_files(stem: str, source_folder: Path | None = None) -> list[Path]:
    """Return a kernel's file and every header of ours, or of `source_folder`, that it includes, itself first."""
    folders = dict.fromkeys((source_folder or folder("raw_kernels"), folder("raw_kernels")))
    files = [source_path(stem, source_folder)]
    for file in files:
        for name in _INCLUDE.findall(file.read_text()):
            found = next((each / name for each in (file.parent, *folders) if (each / name).is_file()), None)
            if found is not None and found not in files:
                files.append(found)
    return files


def source_hash(stem: str | None = None, source_folder: Path | None = None) -> str:
    """Return 16 hex digits that change with a kernel's file and its headers, or with any file of `raw_kernels`."""
    files = sorted(folder("raw_kernels").glob("*.cu*")) if stem is None else source_files(stem, source_folder)
    digest = hashlib.sha1()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_options(
    stem: str, structs: Sequence[type[ctypes.Structure]] | None = None, source_folder: Path | None = None
) -> tuple[str, ...]:
    """Return NVRTC's options for a file, but the architecture. See `load` for the arguments."""
    if structs is None:
        structs = getattr(importlib.import_module(f"twilight.ops.{stem}"), "STRUCTS", ())
    sizes = (f"-DSIZEOF_{struct.__name__}={ctypes.sizeof(struct)}" for struct in structs)
    headers = (f"-I{path}" for path in dict.fromkeys((source_folder or folder("raw_kernels"), folder("raw_kernels"))))
    return ("-std=c++17", *headers, f"-DTWILIGHT_SRC=0x{source_hash(stem, source_folder)}", *sizes)


def instantiations(stems: Sequence[str] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each stem of `raw_kernels`, or those of `stems`, with the name expressions that its operator declares.

    Raises:
        UnknownNameError: there is no such file.
    """
    there = sorted(path.stem for path in folder("raw_kernels").glob("*.cu"))
    for stem in stems:
        if stem not in there:
            raise unknown_name("kernel file", stem, there, see="twilight kernels list")
    for stem in there:
        if not stems or stem in stems:
            yield stem, tuple(importlib.import_module(f"twilight.ops.{stem}").INSTANTIATIONS)


# ---- CuPy's disk cache ----


def cache_dir() -> Path:
    """Return CuPy's disk cache, which is shared with everything else that uses CuPy."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


def is_cached(stem: str, expression: str, index: int) -> bool:
    """Return whether an instantiation, as its sources are now, is in the disk cache for a device."""
    return (_marks() / _mark(arch_of(index), stem, expression, compile_options(stem))).is_file()


def clear() -> int:
    """Delete what `load` has put into CuPy's disk cache, and nothing else. Returns how many files that were."""
    count = 0
    for mark in _marks().glob("*"):
        for name in mark.read_text().split():
            with contextlib.suppress(FileNotFoundError):
                (cache_dir() / name).unlink()
                count += 1
        mark.unlink()
    return count


def _marks() -> Path:
    """Where it is noted what is in the cache: CuPy names its files by hashes that nobody else can form."""
    return cache_dir() / "twilight"


def _mark(arch: str, stem: str, expression: str, options: tuple[str, ...]) -> str:
    return hashlib.sha1("\0".join((arch, versions(), stem, expression, *options)).encode()).hexdigest()


def _cache_files() -> set[str]:
    return {path.name for path in cache_dir().glob("*.cubin*")}


def _remember(mark: str, files: set[str]) -> None:
    path = _marks() / mark
    with contextlib.suppress(OSError):  # a cache that cannot be written to is CuPy's to complain about
        if files or not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(sorted(files)))


class _Progress:
    """Says on stderr that something takes long. ``TWILIGHT_QUIET=1`` keeps it silent."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._timer = threading.Timer(_PROGRESS_AFTER, self._say)
        self._timer.daemon = True
        self._said = False

    def _say(self) -> None:
        self._said = True
        print(f"twilight: {self._what} (once; kept in CuPy's cache) ...", file=sys.stderr, flush=True)

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        if os.environ.get("TWILIGHT_QUIET", "0") in ("", "0"):
            self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._said:
            print(f"twilight: {self._what}: {time.perf_counter() - self._start:.1f} s", file=sys.stderr, flush=True)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def num_sms(index: int) -> int:
    """Return the multiprocessors of a device, which grids are sized by."""
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def smem_limit(index: int) -> int:
    """Return the bytes of shared memory that one block may have on a device, static and dynamic."""
    limit = getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", 0)
    return int(limit) or 99 * 1024  # what the least GPU from sm_80 on has


@functools.cache
def cupy_installed() -> bool:
    return importlib.util.find_spec("cupy") is not None


def extra() -> str:
    return "cuda12" if (torch.version.cuda or "13").startswith("12") else "cuda13"


def arch_of(index: int) -> str:
    """Return a device's architecture as the compiler calls it, such as ``"sm_90"``."""
    return "sm_{}{}".format(*_capability(index))


# What torch's own compiler calls: 0.1 us each, against 1 us for building a Stream object.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def _raw_stream() -> Callable[[int], int]:
    fast = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return fast if fast is not None else lambda index: torch.cuda.current_stream(index).cuda_stream
