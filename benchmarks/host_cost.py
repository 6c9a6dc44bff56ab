"""Time what the host does for a call: every operator as it is called eagerly, and the bare launch of a kernel.

    twilight bench launch                                   b = 1 and 8 at 4k, into benchmarks/results/
    twilight bench launch --cells 64:32k

Microseconds from a call to its return, while the GPU works behind it: the mean over 100 calls that follow one another,
the GPU idle at their start, and of such means the median, 10th and 90th percentile over `--repeats`. A step pays that
if it is not in a CUDA graph. `around` is what a call takes besides its launches: checks, allocations, looking the
kernel up, and filling its parameters in; launches count as `Kernel.launch` of a kernel that does next to nothing.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from twilight import Geometry, TopP, TwilightAttention, kernels, ops
from twilight.graph import StaticCache
from twilight.ops.budget import INSTANTIATIONS, BudgetParams

from .cell import free_bytes
from .cells import UNION, Cell, make_cells
from .methods import Method, Stages, make
from .results import Results, default_path, header
from .runs import add_common, check_common, run_all
from .tables import QUEST, number
from .timing import Deadline, Times, summary
from .workload import make_workload

_CELLS = ("1:4k", "8:4k")
_CPU_CELLS = ("1:256",)
CALLS = 100
"""Calls in a row: a stream takes 1000 launches before it makes the host wait."""
LAUNCH, CLUSTER = "Kernel.launch", "Kernel.launch, cluster of 8"


def time_host(call: Callable[[], Any], repeats: int, device: torch.device, calls: int = CALLS) -> Times:
    """Return microseconds that the host takes for a call.

    Args:
        call: what to call; it must not wait for the GPU.
        repeats: how often `calls` calls are timed; two rounds more come first.
        device: what is waited for between rounds.
        calls: in a row.
    """

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(repeats + 2):
        settle()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) * 1e6 / calls)
    settle()
    return summary(times[2:])


def count_launches(call: Callable[[], Any]) -> int:
    """Return how many kernels of ours a call launches."""
    launch, count = kernels.Kernel.launch, 0

    def counted(self: kernels.Kernel, *words: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        launch(self, *words, **options)

    kernels.Kernel.launch = counted  # type: ignore[method-assign]
    try:
        call()
    finally:
        kernels.Kernel.launch = launch  # type: ignore[method-assign]
    return count


def operators(cell: Cell, p: float, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return the calls to time: operators over a cache as a decode step of Quest with top-p leaves it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    geometry = Geometry(1, cell.q_heads, cell.kv_heads, cell.head_dim, cell.page_size, dtype, device)
    quest = make("quest")
    work = make_workload(geometry, cell.batch, cell.length, quest, cell.length / UNION)
    static = StaticCache(work.cache, cell.length)
    stages = Stages(Method(QUEST, TwilightAttention(quest, TopP(p), 0.25)), work, static)
    layer, q, size = stages.layers[0], stages.queries[0], cell.page_size
    bounds = tuple(layer.metadata(spec.name) for spec in quest.metadata(geometry))
    kept = ops.Summary("bounds", bounds)
    k = torch.randn(cell.batch, 1, cell.kv_heads, cell.head_dim, dtype=dtype, device=device)
    one = torch.ones(cell.batch, dtype=torch.int32, device=device)
    pages, where = (layer.k_pages, layer.v_pages), (layer.page_table, layer.seq_lens)
    pages_wanted, capacity = stages.budget.pages(size), stages.budget.page_capacity(size)
    scores = ops.page_scores(q, bounds, *where, page_size=size)
    wanted: dict[str, Any] = {"granularity": size, "capacity": capacity, "force_newest": True}
    fused = (q, *pages, layer.shadow, bounds, *where, stages.budget, p)
    return {
        "append": lambda: ops.append(k, k, *pages, layer.shadow, *where, one, summary=kept),
        "budget": lambda: ops.budget(layer.seq_lens, cell.kv_heads, 0.25, min_tokens=64, page_size=size),
        "page_scores": lambda: ops.page_scores(q, bounds, *where, page_size=size),
        "top_k": lambda: ops.top_k(scores, pages_wanted, layer.seq_lens, **wanted),
        "estimate_scores": lambda: stages.estimate(0),
        "top_p": lambda: stages.prune(0),
        "sparse_attention": lambda: stages.attend(0),
        "dense_attention": lambda: ops.dense_attention(q.unsqueeze(1), *pages, *where, max_seq_len=cell.length),
        "fused_decode": lambda: ops.fused_decode(*fused),
        "TwilightAttention.attend": lambda: stages.total(0),
    }


def bare_launches(device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return launches of a kernel that has one row to work on; none on a CPU."""
    if device.type != "cuda":
        return {}
    kernel = kernels.load("budget", INSTANTIATIONS[0], device=device)
    out = torch.ones(3, dtype=torch.int32, device=device)
    at = (out.data_ptr() + 4 * i for i in range(3))
    params = BudgetParams(*at, 0.5, 0, 1, 1, 1, 16)
    params.out = out  # kept as long as the launches are

    def launch(blocks: int) -> None:
        kernel.launch((blocks, 1, 1), (256, 1, 1), params, cluster=blocks)

    launches: dict[str, Callable[[], Any]] = {LAUNCH: functools.partial(launch, 1)}
    if torch.cuda.get_device_capability(device) >= (9, 0):
        launches[CLUSTER] = functools.partial(launch, 8)
    return launches


def run_cell(cell: Cell, p: float, repeats: int, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """Time every call of a cell."""
    torch.manual_seed(0)
    say(f"{cell}: microseconds of the host a call")
    calls = bare_launches(device) | operators(cell, p, device)
    rows: dict[str, dict[str, float]] = {}
    for name, call in calls.items():
        row = rows[name] = dict(time_host(call, repeats, device, CALLS if device.type == "cuda" else 2))
        spread = f"{number(row['p10'])} to {number(row['p90'])}"
        words = f"  {name:30s} {number(row['us']):>7s}   {spread:16s}"
        if LAUNCH in rows and name not in (LAUNCH, CLUSTER):
            row["launches"] = count_launches(call)
            row["around"] = row["us"] - row["launches"] * rows[LAUNCH]["us"]
            words += f" {row['launches']} launches, {number(row['around'])} around them"
        say(words.rstrip())
    return cell.as_dict() | {"p": p, "repeats": repeats, "calls": rows}


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read a command line."""
    lines = __doc__.splitlines() if __doc__ else [""]
    parser = argparse.ArgumentParser(
        prog="twilight bench launch", description=lines[0], epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--cells", nargs="+", metavar="B:N", help=f"batch:length (default {' '.join(_CELLS)})")
    parser.add_argument("--heads", nargs="+", metavar="Q/KV", default=["32/8"], help="query/kv heads (default 32/8)")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15, help="rounds of 100 calls (default 15)")
    add_common(parser)
    args = parser.parse_args(list(words))
    if not args.cells:
        args.cells = list(_CPU_CELLS if args.device == "cpu" else _CELLS)
    return args


def main(words: Sequence[str], say: Callable[[str], None] = lambda line: print(line, flush=True)) -> int:
    """Run ``twilight bench launch``; return the exit status."""
    args = parse(words)
    cells = make_cells(args.cells, args.heads, head_dim=args.head_dim, page_size=args.page_size)
    device = check_common(args)
    head = header("launch", device)
    results = Results(args.out or default_path(head), head)
    left = run_all(
        cells, lambda cell: run_cell(cell, args.p, args.repeats, device, say),
        lambda cell: cell.fits(free_bytes(device)), results, lambda cell: cell.as_dict() | {"p": args.p},
        Deadline(args.minutes), missing=args.missing, say=say,
    )  # fmt: skip
    say(f"{results.path}" + (f": {left} cells are missing, run again with --missing" if left else ""))
    return 0
