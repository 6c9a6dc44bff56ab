"""``twilight doctor``: what works on this machine, and what to run where something does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twilight import Geometry, PagedKVCache, TopP, TwilightAttention, ops, resources
from twilight.registry import NOT_INSTALLED, registry

Status = Literal["ok", "warn", "fail", "absent"]

_STYLE = {"ok": "green", "warn": "yellow", "fail": "red", "absent": "dim"}
_MIN_CAPABILITY = (8, 0)

_KERNEL = """#include <cuda_fp16.h>
extern "C" __global__ void twice(const __half* x, __half* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = __hadd(x[i], x[i]);
}
"""


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: ``"ok"``; ``"warn"``, works with a loss; ``"fail"``, is broken; ``"absent"``, not there and not needed.
        detail: what was found.
        run: what to do about it; empty if nothing.
    """

    name: str
    status: Status
    detail: str
    run: str = ""


def main(*, as_json: bool = False) -> int:
    """Print the findings. Return 1 if any is a failure, else 0."""
    found = list(diagnose())
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2))
    else:
        _print(found)
    return int(any(each.status == "fail" for each in found))


def diagnose() -> Iterator[Check]:
    """Look at one thing after the other."""
    for look in (_versions, _gpu, _cupy, _compiler, _resources, _plugins, _decode):
        try:
            yield from look()
        except Exception as error:  # a look that breaks is a finding, and the others go on
            if os.environ.get("TWILIGHT_DEBUG", "") not in ("", "0"):
                traceback.print_exc()
            name = look.__name__.strip("_")
            yield Check(
                name, "fail", f"{type(error).__name__}: {_first_line(error)}", "TWILIGHT_DEBUG=1 twilight doctor"
            )


def _versions() -> Iterator[Check]:
    yield Check("python", "ok", platform.python_version())
    for name in ("twilight-attn", "torch", "numpy", "hydra-core", "pluggy", "rich"):
        version = _version(name)
        if version is None:
            run = "pip install -e ." if name == "twilight-attn" else f"pip install {name}"
            yield Check(name, "fail", "not installed", run)
        else:
            yield Check(name, "ok", version)
    for name, extra in (("transformers", "hf"), ("safetensors", "hf"), ("matplotlib", "plots")):
        version = _version(name)
        yield Check(name, "ok", version) if version else Check(name, "absent", "not installed", _install(extra))
    version = _version("transformers")
    if version and tuple(map(int, version.split(".")[:2])) < (4, 57):
        yield Check("transformers", "fail", f"{version} is older than 4.57", _install("hf"))


def _gpu() -> Iterator[Check]:
    if not torch.cuda.is_available():
        driver = _nvidia_smi()
        if driver is None:
            yield Check("GPU", "absent", "none; the torch reference runs")
        else:
            built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
            run = "install a torch built for CUDA, no newer than the driver's"
            yield Check("GPU", "warn", f"{driver} is there, but this torch ({built}) cannot use it", run)
        return
    driver = _nvidia_smi()
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = torch.cuda.get_device_capability(index)
        detail = (
            f"{torch.cuda.get_device_name(index)}, compute capability {capability[0]}.{capability[1]}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, CUDA {torch.version.cuda}"
            + (f", driver {driver.rpartition(', ')[2]}" if driver else "")
        )
        if capability < _MIN_CAPABILITY:
            yield Check(f"GPU {index}", "warn", f"{detail}; kernels need 8.0, the torch reference runs")
        else:
            yield Check(f"GPU {index}", "ok", detail)


def _cupy() -> Iterator[Check]:
    try:
        cupy = importlib.import_module("cupy")
    except ModuleNotFoundError:
        if torch.cuda.is_available():
            yield Check("CuPy", "warn", "not installed: the torch reference runs", _install(_cuda_extra()))
        else:
            yield Check("CuPy", "absent", "not installed")
        return
    yield Check("CuPy", "ok", str(cupy.__version__))


def _compiler() -> Iterator[Check]:
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        yield Check("NVRTC", "absent", "not looked for without CuPy")
        return
    name = "NVRTC and CUDA headers"
    try:
        if torch.cuda.is_available():
            _compile_and_run(cupy)
            how = "compiled a kernel with cuda_fp16.h and ran it"
        else:
            how = f"compiled a kernel with cuda_fp16.h for sm_90, {_compile_only()} bytes"
    except Exception as error:
        status: Status = "fail" if torch.cuda.is_available() else "warn"
        yield Check(name, status, f"{type(error).__name__}: {_first_line(error)}", _install(_cuda_extra()))
        return
    version = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    yield Check(name, "ok", f"{version}: {how}")


def _compile_and_run(cupy: Any) -> None:
    kernel = cupy.RawModule(code=_KERNEL, options=("-std=c++17",)).get_function("twice")
    x = torch.arange(8, dtype=torch.float16, device="cuda")
    y = torch.zeros_like(x)
    stream = SimpleNamespace(ptr=torch.cuda.current_stream().cuda_stream)
    kernel((1,), (32,), (x.data_ptr(), y.data_ptr(), np.int32(x.numel())), stream=stream)
    if not torch.equal(y, x + x):
        raise RuntimeError(f"a test kernel gave {y.tolist()}")


def _compile_only() -> int:
    # CuPy's public ways ask the driver for the GPU's architecture, and there is none.
    core = importlib.import_module("cupy._core.core")
    compiler = importlib.import_module("cupy.cuda.compiler")
    options = core.assemble_cupy_compiler_options(("-std=c++17",))
    options += ("-arch=sm_90", "--device-as-default-execution-space")
    program = compiler._NVRTCProgram(_KERNEL, "twice.cu", method="cubin")
    return len(program.compile(options, io.StringIO())[0])


def _resources() -> Iterator[Check]:
    for name, pattern in (("conf", "*.yaml"), ("raw_kernels", "*.cu")):
        try:
            folder = resources.folder(name)
        except FileNotFoundError as error:
            lines = str(error).splitlines()
            yield Check(name, "fail", lines[0], lines[-1].partition(": ")[2])
        else:
            yield Check(name, "ok", f"{len(list(folder.rglob(pattern)))} {pattern} in {folder}")


def _plugins() -> Iterator[Check]:
    records = registry().plugins()
    if not registry().is_installed():
        what, _, run = NOT_INSTALLED.partition(": ")
        yield Check("plugins", "fail", what, run)
    names = registry().selectors()
    if names:
        yield Check("plugins", "ok", f"selectors: {', '.join(names)}")
    for record in records:
        if record.disabled:
            run = "unset TWILIGHT_PLUGINS TWILIGHT_DISABLE_PLUGINS"
            yield Check(f"plugin {record.name}", "absent", f"{record.label}: disabled by the environment", run)
        elif record.problems not in ([], [NOT_INSTALLED]):
            yield Check(f"plugin {record.name}", "fail", record.complaint(), f"twilight plugins info {record.name}")


def _decode() -> Iterator[Check]:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        name = f"decode on {device}"
        for selector, p, within in (("full", 1.0, 1e-5), ("quest", 0.95, 0.1)):
            if selector not in registry().selectors():
                yield Check(name, "warn", f"not tried: there is no selector '{selector}'", "twilight plugins list")
                continue
            error = decode_error(selector, p, device=device)
            detail = f"{selector}, p={p:g}: {error:.1e} from dense attention"
            ok = error <= within  # a NaN is not
            run = "" if ok else "report this, with the output of: twilight doctor --json"
            yield Check(name, "ok" if ok else "fail", detail, run)


def decode_error(selector: str, p: float, *, device: str = "cpu") -> float:
    """Decode one step of a small cache, and return how far its output is from dense attention's, relative to it."""
    generator = torch.Generator().manual_seed(0)
    geometry = Geometry(1, 4, 2, 32, page_size=16, dtype=torch.float32, device=torch.device(device))
    rows, tokens = 2, 200

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    chosen = registry().create_selector(selector)
    cache = PagedKVCache(geometry, num_rows=rows, num_pages=32, selector=chosen)
    layer = cache.layers[0]
    k, v = random(rows, tokens, 2, 32), random(rows, tokens, 2, 32)
    layer.append(k, v)
    # Queries that look for a token of their own: attention as peaked as a model's, so that pruning loses little.
    q = 3 * k[:, 70].repeat_interleave(2, dim=1) + random(rows, 4, 32)
    attention = TwilightAttention(chosen, TopP(p), budget=0.5)
    out, _ = attention.decode(q, random(rows, 2, 32), random(rows, 2, 32), layer)
    dense, _ = ops.dense_attention(
        q[:, None], layer.k_pages, layer.v_pages, layer.page_table, layer.seq_lens, max_seq_len=layer.max_seq_len
    )
    return float((out - dense[:, 0]).norm() / dense.norm())


def _print(found: list[Check]) -> None:
    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    for each in found:
        style = _STYLE[each.status]
        table.add_row(escape(each.name), f"[{style}]{each.status}[/]", escape(each.detail))
    console.print(table)
    for each in found:
        if each.run:
            # Outside the table, and not wrapped: a command is there to be copied.
            console.print(f"[{_STYLE[each.status]}]{escape(each.name)}[/]: {escape(each.run)}", soft_wrap=True)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> str | None:
    """Return the first GPU's name and driver as the driver tells them, without torch or CuPy."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.strip().splitlines()
    return lines[0] if answer.returncode == 0 and lines else None


def _cuda_extra() -> str:
    return "cuda12" if (torch.version.cuda or "").startswith("12") else "cuda13"


def _install(extra: str) -> str:
    return f"pip install 'twilight-attn[{extra}]'"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
