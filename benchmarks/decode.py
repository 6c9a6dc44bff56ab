"""Time one decode step of one layer, stage by stage, against the best dense kernel of the same run.

    python benchmarks/decode.py                                   a small grid, to benchmarks/results/
    python benchmarks/decode.py --cells 64:32768 1:131072 --heads 32/8 --out results.json

Every number is microseconds a layer from CUDA graph replays over several layers, so that each layer finds the L2 cache
full of the others; the median of `--repeats` replays, with the spread from the 10th to the 90th percentile. Stages are
captured alone, over what the stage before left; `total` is `TwilightAttention.attend` as it is. Budgets do not change
between the layers of a
step: they are resolved once a step, which is timed apart (`budget_us`).

Bytes are those that the method cannot avoid: metadata, 4-bit keys of the candidates, K and V of what is kept. `floor`
is the share of `--bandwidth` (4.2 TB/s, what a copy reaches on an H200) at which they moved.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent))
from workload import fill_layer, make_cache  # noqa: E402

from twilight import Geometry, NoPruning, Selector, TopP, TwilightAttention, kernels, ops  # noqa: E402
from twilight.graph import StaticCache  # noqa: E402
from twilight.ops.quantize import shadow_bytes  # noqa: E402

L2_BYTES = 200e6
"""What the layers of a replay touch together, at least: four times an H200's L2."""


def built_in(name: str) -> type[Selector]:
    """Return a built-in selector's class, installed or from the checkout."""
    try:
        module = importlib.import_module(f"twilight_selectors.{name}")
    except ModuleNotFoundError:
        path = Path(__file__).parent.parent / "selectors" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(module, "".join(part.capitalize() for part in name.split("_")))


def time_graph(calls: Sequence[Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return microseconds a call of a graph that makes all of `calls`: median, p10 and p90 over replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Several rounds in one graph: its own start is 9 us.
        rounds = max(1, 12 // len(calls))
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
        times = []
        for i in range(repeats + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 2:
                times.append(start.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    del graph
    times.sort()
    return {"us": statistics.median(times), "p10": times[len(times) // 10], "p90": times[-1 - len(times) // 10]}


def sdpa_rows(
    geometry: Geometry, batch: int, length: int, queries: list[torch.Tensor], repeats: int
) -> dict[str, dict[str, float]]:
    """Time torch's dense kernels on contiguous K and V, which no paged cache has."""
    g, count = geometry, len(queries)
    found = {}
    keys, values = (
        [torch.randn(batch, g.num_kv_heads, length, g.head_dim, device=g.device, dtype=g.dtype) for _ in range(count)]
        for _ in range(2)
    )
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        for folded in (False, True):
            # Folded: the group's heads as so many queries of one kv head, which needs no mask.
            shape = (batch, g.num_kv_heads, g.group_size, -1) if folded else (batch, g.num_q_heads, 1, -1)
            rows = [q.reshape(shape) for q in queries]

            def call(i: int, rows=rows, backend=backend, folded=folded) -> torch.Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(rows[i], keys[i], values[i], enable_gqa=not folded)

            label = f"{name}{' folded' if folded else ''}"
            try:
                found[label] = time_graph([lambda i=i, call=call: call(i) for i in range(count)], repeats)
            except RuntimeError as error:
                print(f"  {label}: not timed ({str(error).splitlines()[0][:90]})")
    return found


def dense_rows(
    geometry: Geometry, batch: int, length: int, static: StaticCache, queries: list[torch.Tensor], repeats: int
) -> dict[str, dict[str, float]]:
    """Time the dense kernels there are."""
    g = geometry
    one = batch * length * g.num_kv_heads * g.head_dim * 2
    count = max(1, min(len(queries), int(-(-L2_BYTES // (2 * one)))))
    found = sdpa_rows(geometry, batch, length, queries[:count], repeats)
    torch.cuda.empty_cache()

    def ours(i: int) -> torch.Tensor:
        layer = static.layers[i]
        return ops.dense_attention(
            queries[i].unsqueeze(1), layer.k_pages, layer.v_pages, layer.page_table, layer.seq_lens, max_seq_len=length
        )[0]

    found["twilight dense, paged"] = time_graph([lambda i=i: ours(i) for i in range(count)], repeats)
    try:
        import flashinfer
    except ImportError:
        return found
    table = static.page_table.flatten()
    pages = static.page_table.shape[1]
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=g.device) * pages
    last = torch.full((batch,), length - (pages - 1) * g.page_size, dtype=torch.int32, device=g.device)
    for tensor_cores in (False, True):
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=g.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores)
        wrapper.plan(indptr, table, last, g.num_q_heads, g.num_kv_heads, g.head_dim, g.page_size,
                     q_data_type=g.dtype, kv_data_type=g.dtype)  # fmt: skip
        calls = [
            lambda i=i, w=wrapper: w.run(queries[i], (static.layers[i].k_pages, static.layers[i].v_pages))
            for i in range(count)
        ]
        found[f"flashinfer{' tensor cores' if tensor_cores else ''}"] = time_graph(calls, repeats)
    return found


def method_row(
    attention: TwilightAttention, static: StaticCache, queries: list[torch.Tensor], repeats: int
) -> dict[str, Any]:
    """Time one method stage by stage and as a whole, and check it on the way."""
    g, layers = static.geometry, static.layers
    indices = range(len(layers))
    budget = layers[0].budget(attention.budget)
    candidates = [attention.selector.select(q, layer, budget) for q, layer in zip(queries, layers, strict=True)]

    def estimate(i: int) -> torch.Tensor:
        layer = layers[i]
        return ops.estimate_scores(
            queries[i], layer.shadow, layer.page_table, layer.seq_lens, candidates[i],
            page_size=g.page_size, sm_scale=g.sm_scale, out_dtype=torch.float16,
        )  # fmt: skip

    prunes = attention.pruner.needs_logits
    logits = [estimate(i) if prunes else None for i in indices]
    kept = [attention.pruner(logits[i], candidates[i], layers[i].seq_lens) for i in indices]

    def attend(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        layer = layers[i]
        return ops.sparse_attention(
            queries[i],
            layer.k_pages,
            layer.v_pages,
            layer.page_table,
            layer.seq_lens,
            kept[i].selection,
            sm_scale=g.sm_scale,
        )

    stages: dict[str, Callable[[int], Any] | None] = {
        "select": lambda i: attention.selector.select(queries[i], layers[i], budget),
        "estimate": estimate if prunes else None,
        "prune": (lambda i: attention.pruner(logits[i], candidates[i], layers[i].seq_lens)) if prunes else None,
        "attend": attend,
        "total": lambda i: attention.attend(queries[i], layers[i]),
    }
    row: dict[str, Any] = {
        name: time_graph([lambda i=i, f=function: f(i) for i in indices], repeats)
        for name, function in stages.items() if function is not None
    }  # fmt: skip

    length = static.lengths[0]
    b0 = statistics.mean(float(c.num_tokens(layers[i].seq_lens).float().mean()) for i, c in enumerate(candidates))
    read = torch.cat([k.selection.num_tokens(layers[i].seq_lens).flatten() for i, k in enumerate(kept)]).float()
    counts = read if kept[0].per_query_head is None else torch.cat([k.per_query_head.flatten() for k in kept]).float()
    heads = queries[0].shape[0] * g.num_kv_heads
    row["bytes"] = {
        "select": heads * length * attention.selector.bytes_per_token(g),
        "estimate": heads * b0 * shadow_bytes(g.page_size, g.head_dim) / g.page_size if prunes else 0.0,
        "attend": heads * float(read.mean()) * 4 * g.head_dim,
    }
    row["budgets"] = {
        "candidates": b0,
        "query_head": _spread(counts),
        "union": _spread(read),
        "target_union": length / 64,
    }
    row["check"] = check(attention, static, queries[0], candidates[0], kept[0])
    return row


def check(
    attention: TwilightAttention, static: StaticCache, q: torch.Tensor, candidates: Any, kept: Any
) -> dict[str, float]:
    """Compare the first layer's output for the first sequence with the reference, and with exact attention over
    everything.
    """
    layer, length = static.layers[0], static.lengths[0]
    first = slice(0, 1)
    selection = type(kept.selection)(
        kept.selection.indices[first, :, : int(kept.selection.lengths[0].max())].contiguous(),
        kept.selection.lengths[first].contiguous(), kept.selection.granularity,
    )  # fmt: skip
    selection = type(selection)(
        selection.indices.masked_fill(~selection.counted(), 0), selection.lengths, selection.granularity
    )
    lens, table = layer.seq_lens[first], layer.page_table[first]
    out = attention.attend(q, layer)[0][first].float()
    expected = ops.sparse_attention(q[first], layer.k_pages, layer.v_pages, table, lens, selection, backend="torch")[
        0
    ].float()
    error = float((out - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise AssertionError(f"the output is {error:.3g} away from the reference")
    logits = ops.exact_logits(q[first], layer.k_pages, table, lens, max_seq_len=length)
    weights = logits.softmax(-1).unflatten(1, (static.geometry.num_kv_heads, -1))
    positions, valid = selection.positions(lens)
    mass = (
        weights.gather(-1, positions[:, :, None].expand(-1, -1, weights.shape[2], -1))
        .masked_fill(~valid[:, :, None], 0)
        .sum(-1)
    )
    return {"error_to_reference": error, "true_mass_kept": float(mass.mean()), "true_mass_kept_min": float(mass.min())}


def _spread(values: torch.Tensor) -> dict[str, float]:
    low, high = torch.quantile(values[: 2**24], torch.tensor([0.05, 0.95], device=values.device)).tolist()
    return {
        "mean": float(values.mean()),
        "p5": low,
        "p95": high,
        "min": float(values.min()),
        "max": float(values.max()),
    }


def run_cell(batch: int, length: int, heads: tuple[int, int], args: argparse.Namespace) -> dict[str, Any]:
    """Measure all rows of one batch, length and pair of heads."""
    geometry = Geometry(1, *heads, args.head_dim, args.page_size, torch.bfloat16, torch.device("cuda"))
    quest, full = built_in("quest")(), built_in("full")()
    token = (
        4 * args.head_dim
        + shadow_bytes(args.page_size, args.head_dim) / args.page_size
        + quest.bytes_per_token(geometry)
    )
    layer_bytes = batch * length * heads[1] * token
    # Per layer a sparse step touches at least a twelfth of what dense does.
    layers = int(min(max(2, -(-L2_BYTES * 12 // layer_bytes)), 32, max(1, args.memory * 1e9 // layer_bytes)))
    geometry = Geometry(layers, *heads, args.head_dim, args.page_size, torch.bfloat16, torch.device("cuda"))
    cache = make_cache(geometry, batch, length, quest)
    queries = [fill_layer(cache, i, length, length / 64) for i in range(layers)]
    static = StaticCache(cache, length)
    print(
        f"b={batch} N={length} heads={heads[0]}/{heads[1]} d={args.head_dim} page={args.page_size}, {layers} layers",
        flush=True,
    )

    cell: dict[str, Any] = {
        "batch": batch,
        "length": length,
        "q_heads": heads[0],
        "kv_heads": heads[1],
        "layers": layers,
    }
    cell["dense"] = dense_rows(geometry, batch, length, static, queries, args.repeats)
    best = min(cell["dense"], key=lambda name: cell["dense"][name]["us"])
    cell["best_dense"] = best
    dense_us = cell["dense"][best]["us"]
    floor = batch * length * heads[1] * 4 * args.head_dim / args.bandwidth / 1e6
    for name, times in cell["dense"].items():
        print(
            f"  {name:22s} {times['us']:9.1f} us   {floor / times['us']:5.0%} of the floor"
            f"{'   <- best' if name == best else ''}"
        )

    def resolve() -> None:
        static._budgets = {}
        static._budget(TwilightAttention(quest).budget).pages(args.page_size)

    cell["budget_us"] = time_graph([resolve], args.repeats)["us"]
    methods = {
        "quest top-k, N/8": TwilightAttention(quest, NoPruning(), 0.125),
        "full + top-p": TwilightAttention(full, TopP(args.p), 1.0),
        "quest + top-p": TwilightAttention(quest, TopP(args.p), 0.25),
    }
    print(
        f"  {'':18s} {'select':>8s} {'estimate':>8s} {'prune':>8s} {'attend':>8s} {'total':>9s} {'GB/s':>6s} "
        f"{'floor':>6s} {'dense x':>7s}"
    )
    cell["methods"] = {}
    for name, attention in methods.items():
        row = cell["methods"][name] = method_row(attention, static, queries, args.repeats)
        total, moved = row["total"]["us"], sum(row["bytes"].values())
        row |= {
            "gbps": moved / total / 1e3,
            "floor_fraction": moved / total / 1e6 / args.bandwidth,
            "speedup": dense_us / total,
        }
        cells = " ".join(
            f"{row[s]['us']:8.1f}" if s in row else f"{'-':>8s}" for s in ("select", "estimate", "prune", "attend")
        )
        print(
            f"  {name:18s} {cells} {total:9.1f} {row['gbps']:6.0f} {row['floor_fraction']:6.0%} {row['speedup']:6.2f}x",
            flush=True,
        )
    row = cell["methods"]["quest + top-p"]
    parts = ", ".join(
        f"{s} {row['bytes'][s] / row[s]['us'] / 1e6 / args.bandwidth:.0%}" for s in ("select", "estimate", "attend")
    )
    union, heads = row["budgets"]["union"], row["budgets"]["query_head"]
    print(
        f"  of the floor: {parts}; budgets: union {union['mean']:.0f} (N/64 = {length / 64:.0f}; {union['min']:.0f} to "
        f"{union['max']:.0f}), query head {heads['mean']:.0f}; true mass kept {row['check']['true_mass_kept']:.3f}; "
        f"budgets resolved in {cell['budget_us']:.1f} us a step",
        flush=True,
    )
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cells", nargs="+", default=["1:8192", "1:32768", "1:131072", "8:32768", "64:32768"], help="batch:length"
    )
    parser.add_argument("--heads", nargs="+", default=["32/8"], help="query/kv heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--p", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--bandwidth", type=float, default=4.2, help="TB/s that the floor is counted at")
    parser.add_argument("--memory", type=float, default=60.0, help="GB that the layers of a cell may take")
    parser.add_argument("--out", type=Path, help="JSON file; in benchmarks/results by default")
    args = parser.parse_args()
    if not (torch.cuda.is_available() and kernels.available(torch.device("cuda"))):
        raise SystemExit("benchmarks/decode.py: needs an NVIDIA GPU of compute capability 8.0 or more, and CuPy")
    torch.manual_seed(0)
    cells = []
    for heads in args.heads:
        for cell in args.cells:
            batch, length = map(int, cell.split(":"))
            q_heads, kv_heads = map(int, heads.split("/"))
            cells.append(run_cell(batch, length, (q_heads, kv_heads), args))
            gc.collect()
            torch.cuda.empty_cache()
    import cupy

    result = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "cupy": cupy.__version__},
        "raw_kernels": kernels.source_hash(),
        "date": time.strftime("%Y-%m-%d"),
        "arguments": {name: value.name if isinstance(value, Path) else value for name, value in vars(args).items()},
        "cells": cells,
    }
    out = args.out or Path(__file__).parent / "results" / f"decode-{result['gpu'].replace(' ', '-').lower()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
