"""The loader of the CUDA kernels: source, compiled function, launch on torch's current stream.

`raw_kernels/<stem>.cu` belongs to `twilight/ops/<stem>.py`, which says two things about it beside its Python function:

    INSTANTIATIONS   name expressions to compile ahead, such as ``"spgemv<half, 128, 16>"``
    STRUCTS          the `ctypes.Structure` classes that mirror its parameter structs

NVRTC compiles one instantiation at its first use, through CuPy's RawModule, for the GPU at hand; the result is kept in
CuPy's disk cache (`CUPY_CACHE_DIR`). CuPy does not look into headers when it forms the cache key, so a hash of the
whole folder goes into the options.

    python -m twilight.kernels list                          every instantiation
    python -m twilight.kernels compile --arch sm_80 sm_90    compile all without a GPU; fails on spills and local memory
    python -m twilight.kernels warmup                        compile all for this GPU, into the disk cache
    python -m twilight.kernels clear                         empty CuPy's disk cache
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import io
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twilight import clusters
from twilight.errors import missing_extra
from twilight.resources import folder

MIN_CAPABILITY = (8, 0)
_PROGRESS_AFTER = 0.5
"""Seconds that a compile may take before it says so."""

_loaded: dict[tuple[str, str, str, int], Kernel] = {}
_lock = threading.Lock()


class Kernel:
    """A compiled function on one device. Made by `load`."""

    __slots__ = ("_device", "_driver_launch", "_function", "_keep", "_stream", "expression")

    def __init__(self, expression: str, function: int, device: int, keep: Any) -> None:
        from cupy_backends.cuda.api import driver

        self.expression = expression
        self._function = function
        self._device = device
        self._keep = keep  # the module is unloaded with its last reference
        self._driver_launch: Callable[..., None] = driver.launchKernel
        self._stream = _raw_stream()

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
        # A pointer of this call's own: two threads may launch the same kernel.
        pointer = ctypes.c_void_p(ctypes.addressof(params))
        if cooperative:
            from cupy_backends.cuda.api import driver

            with torch.cuda.device(device):
                driver.launchCooperativeKernel(
                    self._function, *grid, *block, smem, self._stream(device), ctypes.addressof(pointer)
                )
            return
        if cluster > 1:
            with torch.cuda.device(device):
                clusters.launch(self._function, grid, block, smem, self._stream(device), pointer, cluster)
            return
        if torch.cuda.current_device() != device:
            with torch.cuda.device(device):
                self._driver_launch(
                    self._function, *grid, *block, smem, self._stream(device), ctypes.addressof(pointer), 0
                )
            return
        self._driver_launch(self._function, *grid, *block, smem, self._stream(device), ctypes.addressof(pointer), 0)


def available(device: torch.device) -> bool:
    """Return whether kernels can run on `device`: CUDA, capability 8.0 or more, and CuPy installed."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return _cupy_installed() and _capability(_index(device)) >= MIN_CAPABILITY


def use_kernel(backend: str, device: torch.device, unsupported: str | None) -> bool:
    """Decide between the kernel and the torch reference.

    Args:
        backend: ``"auto"``, ``"cuda"`` or ``"torch"``.
        device: where the tensors are.
        unsupported: why the kernel cannot take these tensors, or None if it can.

    Raises:
        ValueError: `backend` is another word, or is ``"cuda"`` and the kernel cannot take them.
        MissingExtraError, RuntimeError: it is ``"cuda"``, and CuPy or the GPU is not there.
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
    if not _cupy_installed():
        raise missing_extra("cupy", _extra(), "running the CUDA kernels")
    capability = _capability(_index(device))
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise RuntimeError(
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
        RuntimeError: the GPU is too old, or the source does not compile.
    """
    if device is None:
        device = torch.cuda.current_device()
    index = device if isinstance(device, int) else _index(device)
    key = (stem, expression, str(source_folder or ""), index)
    kernel = _loaded.get(key)
    if kernel is not None:
        return kernel
    check_device(torch.device("cuda", index))
    with _lock:
        if key not in _loaded:
            with torch.cuda.device(index):
                _loaded[key] = _compile(stem, expression, max_dynamic_smem, max_cluster, structs, source_folder, index)
        return _loaded[key]


def _compile(
    stem: str,
    expression: str,
    max_dynamic_smem: int,
    max_cluster: int,
    structs: Sequence[type[ctypes.Structure]] | None,
    source_folder: Path | None,
    index: int,
) -> Kernel:
    import cupy

    torch.cuda.current_stream(index).synchronize()  # makes sure that torch has set the primary context up
    where = source_folder or folder("raw_kernels")
    source = (where / f"{stem}.cu").read_text()
    with cupy.cuda.Device(index), _Progress(f"compiling {expression} for sm_{''.join(map(str, _capability(index)))}"):
        module = cupy.RawModule(
            code=source, options=_options(stem, structs, source_folder), name_expressions=(expression,)
        )
        function = module.get_function(expression)
        if max_dynamic_smem > 48 * 1024:
            function.max_dynamic_shared_size_bytes = max_dynamic_smem
        if max_cluster > 8 and _capability(index) >= (9, 0):
            clusters.allow_large(function.kernel.ptr)
        return Kernel(expression, function.kernel.ptr, index, (module, function, function.kernel))


def _options(
    stem: str, structs: Sequence[type[ctypes.Structure]] | None, source_folder: Path | None = None
) -> tuple[str, ...]:
    if structs is None:
        structs = getattr(importlib.import_module(f"twilight.ops.{stem}"), "STRUCTS", ())
    sizes = (f"-DSIZEOF_{struct.__name__}={ctypes.sizeof(struct)}" for struct in structs)
    headers = (f"-I{path}" for path in dict.fromkeys((source_folder or folder("raw_kernels"), folder("raw_kernels"))))
    return ("-std=c++17", *headers, f"-DTWILIGHT_SRC=0x{source_hash()}", *sizes)


def source_hash() -> str:
    """Return 16 hex digits that change with any file of `raw_kernels`."""
    digest = hashlib.sha1()
    for path in sorted(folder("raw_kernels").glob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


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
def _cupy_installed() -> bool:
    return importlib.util.find_spec("cupy") is not None


def _extra() -> str:
    return "cuda12" if (torch.version.cuda or "13").startswith("12") else "cuda13"


def _raw_stream() -> Callable[[int], int]:
    # What torch's own compiler calls: 0.1 us, against 1 us for building a Stream object.
    fast = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return fast if fast is not None else lambda index: torch.cuda.current_stream(index).cuda_stream


# ---- without a GPU ----


@dataclass(frozen=True)
class Resources:
    """What the compiler spent on one kernel."""

    stem: str
    expression: str
    arch: str
    registers: int
    spills: int
    stack: int
    smem: int

    def __str__(self) -> str:
        waste = f", {self.spills} B SPILLED, {self.stack} B LOCAL" if self.spills or self.stack else ""
        return f"{self.arch} {self.stem}: {self.expression}: {self.registers} registers, {self.smem} B smem{waste}"


_USED = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def instantiations(stems: Sequence[str] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each stem of `raw_kernels`, or those of `stems`, with the name expressions that its operator declares."""
    for path in sorted(folder("raw_kernels").glob("*.cu")):
        if not stems or path.stem in stems:
            yield path.stem, tuple(importlib.import_module(f"twilight.ops.{path.stem}").INSTANTIATIONS)


def compile_source(
    stem: str, expressions: Sequence[str], arch: str, *, extra_options: Sequence[str] = ()
) -> list[Resources]:
    """Compile instantiations of one file for `arch` (``"sm_90"``), with neither a GPU nor a driver."""
    if not _cupy_installed():
        raise missing_extra("cupy", _extra(), "compiling the CUDA kernels")
    # RawModule asks the driver for the device; this layer does not. Checked with CuPy 13 and 14.
    from cupy.cuda import compiler

    source = (folder("raw_kernels") / f"{stem}.cu").read_text()
    options = (
        *_base_options(_options(stem, None)),
        f"-arch={arch}",
        "-ftz=true",
        "--device-as-default-execution-space",
        "--ptxas-options=-v",
        *extra_options,
    )
    program = compiler._NVRTCProgram(source, f"{stem}.cu", name_expressions=tuple(expressions), method="cubin")
    log = io.StringIO()
    try:
        _, names = program.compile(options, log)
    except compiler.CompileException as error:
        raise RuntimeError(f"{stem}.cu does not compile for {arch}:\n{error}") from error
    used = {match["name"]: match for match in _USED.finditer(log.getvalue())}
    found = []
    for expression in expressions:
        match = used[names[expression]]
        smem = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(
            Resources(stem, expression, arch, int(match["registers"]), int(match["stores"]) + int(match["loads"]),
                      int(match["stack"]), int(smem[1]) if smem else 0)
        )  # fmt: skip
    return found


def _base_options(options: tuple[str, ...]) -> tuple[str, ...]:
    from cupy._core import core

    assemble = getattr(core, "assemble_cupy_compiler_options", None)
    return options if assemble is None else tuple(assemble(options))


def compile_all(arch: str, stems: Sequence[str] = ()) -> list[Resources]:
    """Compile every declared instantiation for `arch`, with neither a GPU nor a driver.

    Args:
        arch: such as ``"sm_90"``.
        stems: only these files; all by default.

    Raises:
        RuntimeError: something does not compile, spills, or uses local memory.
    """
    found: list[Resources] = []
    for stem, expressions in instantiations(stems):
        found += compile_source(stem, expressions, arch)
    wasteful = [resources for resources in found if resources.spills or resources.stack]
    if wasteful:
        raise RuntimeError("kernels use local memory:\n  " + "\n  ".join(map(str, wasteful)))
    return found


def warmup(stems: Sequence[str] = ()) -> int:
    """Compile every declared instantiation for the current GPU, into CuPy's disk cache. Returns how many."""
    count = 0
    for stem, expressions in instantiations(stems):
        for expression in expressions:
            load(stem, expression)
            count += 1
    return count


def cache_dir() -> Path:
    """Return CuPy's disk cache, which is shared with everything else that uses CuPy."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


def clear() -> Path:
    """Delete CuPy's disk cache, and return where it was."""
    shutil.rmtree(cache_dir(), ignore_errors=True)
    return cache_dir()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the verbs; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m twilight.kernels", description="The CUDA kernels of twilight.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (
        ("list", "print every instantiation"),
        ("compile", "compile all without a GPU; fail on spills and local memory"),
        ("warmup", "compile all for this GPU, into CuPy's disk cache"),
        ("clear", "delete CuPy's disk cache"),
    ):
        sub = verbs.add_parser(verb, help=text)
        if verb != "clear":
            sub.add_argument("stems", nargs="*", help="only these files of raw_kernels")
        if verb == "compile":
            sub.add_argument("--arch", nargs="+", default=["sm_80", "sm_90"])
    args = parser.parse_args(argv)
    if args.verb == "list":
        for stem, expressions in instantiations(args.stems):
            print(*(f"{stem}: {expression}" for expression in expressions), sep="\n")
    elif args.verb == "compile":
        try:
            for arch in args.arch:
                print(*compile_all(arch, args.stems), sep="\n", flush=True)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    elif args.verb == "warmup":
        print(f"{warmup(args.stems)} kernels ready in {cache_dir()}")
    else:
        print(f"deleted {clear()}")
    return 0


if __name__ == "__main__":
    # Run as a script this file is `__main__`; the operators load kernels through `twilight.kernels`.
    raise SystemExit(importlib.import_module("twilight.kernels").main())
