"""Compiling the CUDA kernels ahead: with neither a GPU nor a driver, which is how CI looks for spills, or for the GPU.

NVRTC needs no GPU to compile for one. CuPy's public way asks the driver all the same, so the layer below it is used
here; checked with CuPy 14.2 on NVRTC 12.4, 12.9 and 13.5.

Units of a few instantiations of one file are handed to as many processes as there are cores: NVRTC does not compile in
two threads at once. What was found is kept, keyed by the sources of the file and the headers that it includes, the
options and the versions of the compiler and its headers, so that nothing is compiled twice.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from twilight import kernels
from twilight.errors import KernelError, missing_extra

_UNIT = 6
"""Instantiations that are compiled together: headers are parsed once for them, and a unit takes a few seconds."""
_SECONDS = 0.5
"""What one instantiation takes, until it has been measured."""


@dataclass(frozen=True)
class Resources:
    """What the compiler spent on one kernel.

    Attributes:
        stem: the file `<stem>.cu`.
        expression: the instantiation.
        arch: such as ``"sm_90"``.
        registers: of a thread.
        spills: bytes that are stored to or loaded from local memory for want of registers.
        stack: bytes of local memory of a thread.
        smem: bytes of static shared memory of a block.
        seconds: processor time of its compilation.
    """

    stem: str
    expression: str
    arch: str
    registers: int
    spills: int
    stack: int
    smem: int
    seconds: float

    @property
    def wasteful(self) -> bool:
        """Whether it uses local memory."""
        return bool(self.spills or self.stack)

    def __str__(self) -> str:
        waste = f", {self.spills} B SPILLED, {self.stack} B LOCAL" if self.wasteful else ""
        return f"{self.arch} {self.stem}: {self.expression}: {self.registers} registers, {self.smem} B smem{waste}"


_USED = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def supported_archs() -> tuple[str, ...]:
    """Return the architectures that the installed NVRTC knows, oldest first, as ``"sm_90"``."""
    return tuple(f"sm_{number}" for number in sorted(_nvrtc().getSupportedArchs()))


def default_archs() -> tuple[str, ...]:
    """Return sm_80, sm_90 and the newest architecture that the installed NVRTC knows."""
    return tuple(dict.fromkeys(("sm_80", "sm_90", supported_archs()[-1])))


def compile_source(
    stem: str,
    expressions: Sequence[str],
    arch: str,
    *,
    structs: Sequence[type[ctypes.Structure]] | None = None,
    source_folder: Path | None = None,
) -> list[Resources]:
    """Compile instantiations of one file for `arch` (``"sm_90"``), with neither a GPU nor a driver.

    The file, `structs` and `source_folder` are what `kernels.load` takes.

    Raises:
        MissingExtraError: CuPy is not installed.
        KernelError: the source does not compile.
    """
    start = time.process_time()
    path = kernels.source_path(stem, source_folder)
    options = (
        *_assembled(kernels.compile_options(stem, structs, source_folder)),
        f"-arch={arch}",
        "-ftz=true",  # what RawModule adds
        "--device-as-default-execution-space",
        "--ptxas-options=-v",
    )
    log = io.StringIO()
    _nvrtc()
    from cupy.cuda import compiler

    try:
        program = compiler._NVRTCProgram(
            path.read_text(), path.name, name_expressions=tuple(expressions), method="cubin"
        )
        _, names = program.compile(options, log)
    except Exception as error:
        raise kernels.compile_error(path.name, ", ".join(expressions), arch, error) from error
    used = {match["name"]: match for match in _USED.finditer(log.getvalue())}
    seconds = (time.process_time() - start) / len(expressions)
    found = []
    for expression in expressions:
        match = used[names[expression]]
        smem = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(
            Resources(stem, expression, arch, int(match["registers"]), int(match["stores"]) + int(match["loads"]),
                      int(match["stack"]), int(smem[1]) if smem else 0, round(seconds, 3))
        )  # fmt: skip
    return found


def _nvrtc() -> Any:
    if not kernels.cupy_installed():
        raise missing_extra("cupy", kernels.extra(), "compiling the CUDA kernels")
    from cupy_backends.cuda.libs import nvrtc

    try:
        nvrtc.getVersion()
    except Exception as error:
        raise KernelError(f"no NVRTC: {error}\n  pip install 'twilight-attn[{kernels.extra()}]'") from error
    return nvrtc


def _assembled(options: tuple[str, ...]) -> tuple[str, ...]:
    """Return the options with CuPy's include paths."""
    from cupy._core import core

    assemble = getattr(core, "assemble_cupy_compiler_options", None)
    return options if assemble is None else tuple(assemble(options))


class Results:
    """What is known about instantiations, kept in a folder, a file a stem.

    Args:
        where: the folder, made when something is kept; None keeps nothing.
    """

    def __init__(self, where: Path | None) -> None:
        self._where = where
        self._stems: dict[str, dict[str, Any]] = {}

    def find(self, stem: str, expression: str, arch: str) -> Resources | None:
        """Return what the compiler spent on exactly these sources, or None."""
        entry = self._entries(stem).get(f"{arch} {expression}")
        if entry is None or entry["key"] != _key(stem, expression, arch):
            return None
        return Resources(stem, expression, arch, **{name: value for name, value in entry.items() if name != "key"})

    def seconds(self, stem: str, expression: str, arch: str) -> float:
        """Guess what compiling will take."""
        entries = self._entries(stem)
        entry = entries.get(f"{arch} {expression}") or next(iter(entries.values()), None)
        return float(entry["seconds"]) if entry else _SECONDS

    def keep(self, found: Sequence[Resources]) -> None:
        """Add results; each takes the place of an older one of the same instantiation."""
        if self._where is None:
            return
        for each in found:
            values = asdict(each)
            arch, expression = values.pop("arch"), values.pop("expression")
            stem = values.pop("stem")
            self._entries(stem)[f"{arch} {expression}"] = {"key": _key(stem, expression, arch), **values}
        self._where.mkdir(parents=True, exist_ok=True)
        for stem in {each.stem for each in found}:
            path = self._path(stem)
            new = path.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(self._entries(stem), indent=1, sort_keys=True))
            new.replace(path)

    def _path(self, stem: str) -> Path:
        assert self._where is not None
        return self._where / f"{stem}-{kernels.versions().replace(' ', '-')}.json"

    def _entries(self, stem: str) -> dict[str, Any]:
        if stem not in self._stems:
            self._stems[stem] = {}
            if self._where is not None and self._path(stem).is_file():
                try:
                    self._stems[stem] = json.loads(self._path(stem).read_text())
                except ValueError:  # cut short: as if it were not there
                    self._stems[stem] = {}
        return self._stems[stem]


@functools.cache
def _key(stem: str, expression: str, arch: str) -> str:
    # Paths are left out: a checkout elsewhere compiles the same.
    options = tuple(word for word in kernels.compile_options(stem) if not word.startswith("-I"))
    return hashlib.sha1("\0".join((*_toolkit(), *options, arch, expression)).encode()).hexdigest()


@functools.cache
def _toolkit() -> tuple[str, ...]:
    """The versions that the compiler's output depends on: its own, and those of the headers that it reads."""
    found = [kernels.versions()]
    for name in ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime"):
        for distribution in (name, f"{name}-cu12"):
            try:
                found.append(f"{distribution} {importlib.metadata.version(distribution)}")
            except importlib.metadata.PackageNotFoundError:
                continue
    return tuple(found)


@dataclass(frozen=True)
class _Unit:
    stem: str
    expressions: tuple[str, ...]
    arch: str
    seconds: float


def compile_all(
    archs: Sequence[str],
    stems: Sequence[str] = (),
    *,
    jobs: int | None = None,
    results: Results | None = None,
    fresh: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Resources]:
    """Compile every declared instantiation, with neither a GPU nor a driver.

    Args:
        archs: such as ``["sm_80", "sm_90"]``.
        stems: only these files; all by default.
        jobs: processes; a core each by default.
        results: what is known already, and where to keep what is found.
        fresh: compile again what is known.
        progress: called with the instantiations that are done and all there are, first of all with those that were
            known.

    Returns:
        What the compiler spent on each, in the order of files and architectures.

    Raises:
        UnknownNameError: a stem that there is not.
        KernelError: something does not compile; what does has been kept.
    """
    results = results or Results(None)
    known: dict[tuple[str, str, str], Resources] = {}
    wanted = [(stem, arch, each) for stem, all_of in kernels.instantiations(stems) for arch in archs for each in all_of]
    for stem, arch, expression in wanted:
        found = results.find(stem, expression, arch)
        if found is not None and not fresh:
            known[stem, arch, expression] = found
    units = _units(((stem, arch, each) for stem, arch, each in wanted if (stem, arch, each) not in known), results)
    if progress:
        progress(len(known), len(wanted))
    failures = []
    for _, done in _run(compile_source, units, jobs):
        try:
            made = done()
        except KernelError as error:
            failures.append(error)
            continue
        results.keep(made)
        known |= {(each.stem, each.arch, each.expression): each for each in made}
        if progress:
            progress(len(known), len(wanted))
    if failures:
        more = f"\n  and {len(failures) - 1} more" if len(failures) > 1 else ""
        raise KernelError(f"{failures[0]}{more}") from failures[0]
    return [known[each] for each in wanted]


def warmup(
    stems: Sequence[str] = (), *, jobs: int | None = None, progress: Callable[[int, int], None] | None = None
) -> int:
    """Compile every declared instantiation for the current GPU, into CuPy's disk cache. Returns how many.

    Args:
        stems: only these files; all by default.
        jobs: processes; a core each by default, and each makes a CUDA context of its own.
        progress: called with the instantiations that are done and all there are.

    Raises:
        UnknownNameError: a stem that there is not.
        MissingExtraError, KernelError: no CuPy, no GPU or one that is too old, or something does not compile.
    """
    if not torch.cuda.is_available():
        raise KernelError(
            "no GPU to compile for\n  without one: twilight kernels compile; what is here: twilight doctor"
        )
    kernels.check_device(torch.device("cuda"))
    wanted = [(stem, "", each) for stem, expressions in kernels.instantiations(stems) for each in expressions]
    done = 0
    for unit, finish in _run(_load, _units(wanted, Results(None)), jobs):
        finish()
        done += len(unit.expressions)
        if progress:
            progress(done, len(wanted))
    return done


def _load(stem: str, expressions: Sequence[str], arch: str) -> None:
    for expression in expressions:
        kernels.load(stem, expression)


def _units(wanted: Iterable[tuple[str, str, str]], results: Results) -> list[_Unit]:
    """Put (stem, arch, expression) into units of one file and architecture, longest first: the end is then short."""
    groups: dict[tuple[str, str], list[str]] = {}
    for stem, arch, expression in wanted:
        groups.setdefault((stem, arch), []).append(expression)
    units = []
    for (stem, arch), expressions in groups.items():
        for i in range(0, len(expressions), _UNIT):
            part = tuple(expressions[i : i + _UNIT])
            units.append(_Unit(stem, part, arch, sum(results.seconds(stem, each, arch) for each in part)))
    return sorted(units, key=lambda unit: -unit.seconds)


def _run(
    function: Callable[[str, Sequence[str], str], Any], units: Sequence[_Unit], jobs: int | None
) -> Iterator[tuple[_Unit, Callable[[], Any]]]:
    """Call `function` for each unit, and yield units as they end, with a call that returns or raises what it did."""
    jobs = min(jobs or cores(), len(units))
    if jobs <= 1:
        for unit in units:
            yield unit, functools.partial(function, unit.stem, unit.expressions, unit.arch)
        return
    # Not forked: a process that has touched CUDA, or has threads, cannot be.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        futures: dict[Future[Any], _Unit] = {
            pool.submit(function, unit.stem, unit.expressions, unit.arch): unit for unit in units
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this process when its parent does, even if that was killed: it would wait for more work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
