"""Runs as `twilight run` leaves them, with numbers that behave like real ones: more tokens, less error, some noise."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

SKILL = {"quest": 1.0, "double_sparsity": 0.9, "full": 0.6, "streaming_llm": 4.0, "oracle_topp": 0.5}
"""How much of the error each selector makes."""
TOKENS = {"quest": 1.15, "double_sparsity": 1.0, "full": 1.4, "streaming_llm": 0.8, "oracle_topp": 1.25}
LAYERS, DENSE_LAYERS, HEADS = 7, 2, 6
VERSIONS = {"python": "3.11.7", "twilight-attn": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}


def config(
    task: str, selector: str, p: float | None, *, budget: float = 0.25, model: str = "tiny", **options: Any
) -> dict:
    pruner = {"name": "none"} if p is None else {"name": "top_p", "p": p}
    return {
        "p": p,
        "selector": {"name": selector},
        "pruner": pruner,
        "budget": {"name": "fraction", "value": budget},
        "model": {"name": model, "path": None, "dense_layers": DENSE_LAYERS},
        "task": {"name": task, **options},
    }


def digest(of: dict) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


def write(
    folder: Path,
    of: dict,
    rows: list[dict],
    tables: dict | None = None,
    *,
    started: str = "2026-03-01T10:00:00+00:00",
    common: bool = True,
    **provenance: Any,
) -> Path:
    """Write ``result.json`` as the contract says it, in a folder of its own under `folder`."""
    first = {
        "task": of["task"]["name"], "method": "twilight", "model": of["model"]["name"], "model_revision": None,
        "selector": of["selector"]["name"], "selector_options": "", "budget": of["budget"]["name"],
        "budget_value": of["budget"]["value"], "pruner": of["pruner"]["name"], "pruner_options": "", "p": of["p"],
        "seed": of["task"].get("seed"), "config_hash": digest(of),
    } if common else {}  # fmt: skip
    about = {"versions": VERSIONS, "device": "cpu", "dtype": "float32", "kernels": None, "model_revision": None}
    about |= {"model_hash": "5e1ec7ed0123", "started": started, "seconds": 12.5, **provenance}
    path = folder / of["task"]["name"] / f"{of['selector']['name']}-{digest(of)}" / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "schema": 1, "config": of, "config_hash": digest(of), "overrides": overrides(of), "provenance": about,
        "rows": [{**first, **row} for row in rows],
        "tables": {name: [{**first, **row} for row in table] for name, table in (tables or {}).items()},
    }  # fmt: skip
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def write_error(
    folder: Path, of: dict, error: str = "ValueError: no such thing", *, not_applicable: bool = False
) -> Path:
    path = folder / of["task"]["name"] / f"{of['selector']['name']}-{digest(of)}" / "error.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    trace = f'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n{error}\n'
    data = {"schema": 1, "config": of, "config_hash": digest(of), "overrides": overrides(of), "error": error}
    path.write_text(json.dumps(data | {"not_applicable": not_applicable, "traceback": trace}), encoding="utf-8")
    return path


def overrides(of: dict) -> list[str]:
    words = [f"task={of['task']['name']}", f"selector={of['selector']['name']}"]
    return words + ([] if of["p"] is None else [f"p={of['p']}"]) + [f"budget={of['budget']['value']}"]


def budgets(context: int, selector: str, p: float | None, budget: float) -> dict[str, Any]:
    """Return the columns on tokens read, in the size that the small model's have."""
    b0 = budget * context if selector != "full" else context
    kept = b0 if p is None else min(b0, 14 * (1 / (1.004 - p)) * (context / 4096) ** 0.6 * TOKENS[selector])
    group = min(b0, 2.3 * kept)
    return {
        "seq_len": context, "b0": b0, "b1_query": kept, "b1_group": group, "b1_query_fraction": kept / context,
        "b1_group_fraction": group / context, "kv_bytes": 512 * group, "dense_kv_bytes": 512 * context,
        "kv_fraction": group / context, "sparse_layers": LAYERS - DENSE_LAYERS, "dense_layers": DENSE_LAYERS,
        "kv_fraction_all_layers": 0.3 + 0.7 * group / context,
    }  # fmt: skip


def fidelity(
    folder: Path,
    selector: str,
    p: float | None,
    contexts: tuple[int, ...] = (4096, 8192),
    budget: float = 0.25,
    **more: Any,
) -> Path:
    of = config("fidelity", selector, p, budget=budget, contexts=list(contexts))
    rng = random.Random(f"{selector}{p}")
    rows, heads, where = [], [], []
    for context in contexts:
        read = budgets(context, selector, p, budget)
        error = SKILL[selector] * 0.9 / math.sqrt(read["b1_group"]) * rng.uniform(0.9, 1.1) + 0.02 * (1 - (p or 1))
        rows.append(
            {"context": context, "mass": max(0.3, 1 - 2 * error), "mass_p5": 0.5, "output_error": error,
             "oracle_b1": 0.7 * read["b1_query"], "excess": 1 / 0.7, **read}
        )  # fmt: skip
        for layer in range(DENSE_LAYERS, LAYERS):
            for head in range(HEADS):
                kept = read["b1_query"] * math.exp(rng.gauss(0.6 - 0.3 * (layer - 2), 0.9))
                heads.append({"context": context, "layer": layer, "head": head, "b1_query": min(kept, context)})
            for kind in ("top_p", "top_k"):
                shares = [(0.5 if kind == "top_p" else 0.3) * 0.6**i + 0.02 + 0.3 * (i == 19) for i in range(20)]
                shares = [each * rng.uniform(0.8, 1.2) for each in shares]
                where += [
                    {"context": context, "kind": kind, "layer": layer, "bin_low": i / 20, "bin_high": (i + 1) / 20,
                     "share": share / sum(shares)}
                    for i, share in enumerate(shares)
                ]  # fmt: skip
    return write(folder, of, rows, {"budgets": heads, "positions": where}, **more)


def perplexity(folder: Path, selector: str, p: float | None, budget: float = 0.25, **more: Any) -> Path:
    of = config("perplexity", selector, p, budget=budget, context=8192)
    read = budgets(8192, selector, p, budget)
    delta = 0.4 * SKILL[selector] / math.sqrt(read["b1_group"]) - 0.004
    same = {"text": "stdlib 1f2e3d4c5b6a", "context": 8192, "scored_tokens": 2048}
    rows = [
        {"method": "dense", **same, "nll": 0.72, "perplexity": 2.05, "bits_per_byte": 1.04},
        {**same, "nll": 0.72 + delta, "perplexity": 2.05 + 2 * delta, "bits_per_byte": 1.04 + delta,
         "delta_bits": delta, "delta_stderr": 0.004, **read},
    ]  # fmt: skip
    return write(folder, of, rows, **more)


def facts(folder: Path, selector: str, p: float | None, contexts: tuple[int, ...] = (4096, 8192, 16384), asked: int = 8,
          budget: float = 0.25, seed: int = 0, **more: Any) -> Path:  # fmt: skip
    of = config("facts", selector, p, budget=budget, seed=seed, contexts=list(contexts))
    rng = random.Random(f"{selector}{p}{budget}{seed}")
    rows: list[dict[str, Any]] = []
    for context in contexts:
        read = budgets(context, selector, p, budget)
        for kind, depth in [*(("needle", d / 4) for d in range(5)), ("multi_key", None)]:
            dense = min(asked, round(asked * (1 - 0.06 * math.log2(context / 4096))))
            lost = SKILL[selector] * 3 / math.sqrt(read["b1_group"])
            if selector == "streaming_llm" and depth is not None and 0.1 < depth < 0.9:
                lost = 1.0
            right = sum(rng.random() > lost for _ in range(dense))
            for method, correct in (("dense", dense), ("twilight", right)):
                share = correct / asked
                row = {"method": method, "kind": kind, "context": context, "depth": depth, "asked": asked}
                row |= {"correct": correct, "accuracy": share, "stderr": math.sqrt(share * (1 - share) / asked)}
                rows.append(row | (read if method != "dense" else {}))
    return write(folder, of, rows, **more)


def speed(folder: Path, selector: str, p: float | None, budget: float = 0.25, fused: bool = False, **more: Any) -> Path:
    of = config("speed", selector, p, budget=budget, model="llama-3.1-8b")
    rows = []
    for batch in (1, 16):
        for context in (8192, 32768, 131072):
            work = batch * context / 8192
            read = budgets(context, selector, p, budget)["b1_group"]
            parts = {"select": 9 + 2 * work, "estimate": 7 + 2.2 * work, "prune": 6 + 0.8 * work}
            parts["attend"] = 8 + 14 * work * read / context
            dense, total = 15 + 14 * work, sum(parts.values())
            stages = {f"{name}_us": None if fused else us for name, us in parts.items()}
            rows.append(
                {"batch": batch, "context": context, "gpu": "NVIDIA H200", **stages, "total_us": total,
                 "dense_us": dense, "ratio": dense / total, "floor_fraction": 0.6}
            )  # fmt: skip
    return write(folder, of, rows, dtype="bfloat16", device="NVIDIA H200", kernels="00db56680b4233df", **more)


def lm_eval(folder: Path, selector: str, p: float | None, value: float, stderr: float = 0.013, dense: float = 0.5,
            **more: Any) -> Path:  # fmt: skip
    of = config("lm_eval", selector, p, tasks=["gsm8k"])
    row = {"lm_task": "gsm8k", "metric": "exact_match,strict-match", "stderr": stderr, "samples": 1319}
    rows = [{"method": "dense", **row, "value": dense}, {**row, "value": value, **budgets(1024, selector, p, 0.25)}]
    return write(folder, of, rows, **more)


def everything(folder: Path, ps: tuple[float | None, ...] = (None, 0.7, 0.8, 0.85, 0.9, 0.95)) -> None:
    """Write runs of all tasks, of several selectors and p, some that failed, and some that were run twice."""
    for order, selector in enumerate(SKILL):
        for p in ps:
            fidelity(folder, selector, p)
            perplexity(folder, selector, p)
            facts(folder, selector, p)
            lm_eval(folder, selector, p, 0.5 - 0.02 * SKILL[selector] * (1 - (p or 0.99)) * 10 + 0.003 * order)
            if selector in ("quest", "double_sparsity"):
                speed(folder, selector, p)
    write_error(
        folder,
        config("facts", "nsa", 0.9),
        "UnsupportedModelError: nsa needs a model\nwith compression",
        not_applicable=True,
    )
    write_error(folder, config("facts", "pqcache", 0.9), "RuntimeError: out of memory <b>")
    facts(folder / "again", "quest", 0.9, started="2026-03-02T10:00:00+00:00")
