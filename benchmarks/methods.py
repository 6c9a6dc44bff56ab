"""The rows of a report: selectors with and without top-p, stage by stage and as a whole."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from twilight import BoundedTopP, Budget, NoPruning, Selection, Selector, TopP, TwilightAttention, ops, resources
from twilight.graph import StaticCache
from twilight.ops.top_p import Pruned
from twilight.registry import create_selector

from .cells import UNION, Cell
from .check import check_step
from .tables import QUEST, TOP_K
from .timing import Times, time_calls
from .workload import Workload, channel_orders, layers_of, use_selector


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        name: what reports call it.
        attention: what runs.
    """

    name: str
    attention: TwilightAttention


def built_in(name: str) -> type[Selector] | None:
    """Return a built-in selector's class, installed or from the checkout, or None if there is none of that name."""
    try:
        module = importlib.import_module(f"twilight_selectors.{name}")
    except ModuleNotFoundError:
        checkout = resources.checkout()
        path = checkout / "selectors" / f"{name}.py" if checkout else Path(name)
        if not path.is_file():
            return None
        spec = importlib.util.spec_from_file_location(f"twilight_bench_{name}", path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    found: type[Selector] = getattr(module, "".join(part.capitalize() for part in name.split("_")))
    return found


def make(name: str, **parameters: Any) -> Selector:
    """Return a built-in selector.

    Raises:
        ModuleNotFoundError: there is none of that name.
    """
    found = built_in(name)
    if found is None:
        raise ModuleNotFoundError(f"no built-in selector '{name}'")
    return found(**parameters)


def by_name(words: Sequence[str]) -> dict[str, Selector]:
    """Return the installed selectors that a user asked for, each as ``name`` or ``name:option=value,option=value``.

    Raises:
        UnknownNameError, TypeError: there is none, or it has no such option.
        ValueError: it learns from prompts, and a workload has none.
    """
    found = {}
    for word in words:
        name, _, options = word.partition(":")
        values = OmegaConf.to_container(OmegaConf.from_dotlist([each for each in options.split(",") if each]))
        assert isinstance(values, dict)
        selector = create_selector(name, **{str(key): value for key, value in values.items()})
        if type(selector).observe is not Selector.observe or type(selector).state is not Selector.state:
            raise ValueError(
                f"--selector: '{name}' keeps state that prompts fill, and a workload is keys without a prompt\n"
                f"  time a model instead: twilight decode selector={name}"
            )
        found[word] = selector
    return found


def methods(
    work: Workload, quest: Selector, p: float, selectors: Mapping[str, Selector] | None = None
) -> Iterator[Method]:
    """Yield the rows.

    Args:
        work: what they run on.
        quest: the selector that the cache keeps metadata of at first.
        p: mass to keep.
        selectors: further ones, by what reports call them.
    """
    yield Method(TOP_K, TwilightAttention(quest, NoPruning(), 0.125))
    yield Method(QUEST, TwilightAttention(quest, TopP(p), 0.25))
    yield Method("quest + bounded top-p", TwilightAttention(quest, BoundedTopP(p, tail="none"), 0.25))
    yield Method("quest + bounded top-p + tail", TwilightAttention(quest, BoundedTopP(p), 0.25))
    yield Method("full + top-p", TwilightAttention(make("full"), TopP(p), 1.0))
    if built_in("block_mean") is not None:
        yield Method("block_mean + top-p", TwilightAttention(make("block_mean"), TopP(p), 0.25))
    for name, selector in (selectors or {}).items():
        yield Method(f"{name} + top-p", TwilightAttention(selector, TopP(p), 0.25))
    with tempfile.TemporaryDirectory() as folder:
        path = own_calibration(work, Path(folder))
        channels = min(16, work.cache.geometry.head_dim)
        selector = make("double_sparsity", calibration=str(path), channels=channels, label_bits=4)
        yield Method("double_sparsity + top-p", TwilightAttention(selector, TopP(p), 0.25))


def own_calibration(work: Workload, folder: Path) -> Path:
    """Write a calibration file of the workload's own directions into `folder`, and return it."""
    path = folder / "double_sparsity.json"
    # The form in one file, which needs no safetensors.
    path.write_text(json.dumps({"layers": {layer: order.tolist() for layer, order in channel_orders(work).items()}}))
    return path


class Stages:
    """A method's stages over every layer of a workload, each over what the one before left.

    Args:
        method: what runs.
        work: keys and queries; its cache is given the method's metadata.
        static: over that cache.
    """

    def __init__(self, method: Method, work: Workload, static: StaticCache) -> None:
        use_selector(work.cache, method.attention.selector, method.attention.pruner)
        self.attention = method.attention
        self.layers = layers_of(static)
        self.queries = work.queries
        self.budget: Budget = self.layers[0].budget(self.attention.budget)
        self.prunes = self.attention.pruner.needs_logits
        indices = range(len(self.layers))
        self.candidates: list[Selection] = [self.select(i) for i in indices]
        self.logits = [self.estimate(i) if self.prunes else None for i in indices]
        self.kept: list[Pruned] = [self.prune(i) for i in indices]

    def calls(self) -> dict[str, Callable[[int], Any]]:
        """Return what to time, by column: functions of a layer's number."""
        stages: dict[str, Callable[[int], Any]] = {"select": self.select}
        if self.prunes:
            stages |= {"estimate": self.estimate, "prune": self.prune}
        return stages | {"attend": self.attend, "total": self.total}

    def select(self, i: int) -> Selection:
        return self.attention.selector.select(self.queries[i], self.layers[i], self.budget)

    def estimate(self, i: int) -> torch.Tensor:
        q, layer, g = self.queries[i], self.layers[i], self.layers[i].geometry
        return ops.estimate_scores(
            q, layer.shadow, layer.page_table, layer.seq_lens, self.candidates[i],
            page_size=g.page_size, sm_scale=g.sm_scale, out_dtype=torch.float16 if q.is_cuda else torch.float32,
        )  # fmt: skip

    def prune(self, i: int) -> Pruned:
        return self.attention.pruner(self.logits[i], self.candidates[i], self.layers[i])

    def attend(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers[i]
        pages = (layer.k_pages, layer.v_pages, layer.page_table, layer.seq_lens)
        kept, scale = self.kept[i], layer.geometry.sm_scale
        return ops.sparse_attention(self.queries[i], *pages, kept.selection, tail=kept.tail, sm_scale=scale)

    def total(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attention.attend(self.queries[i], self.layers[i])

    def budgets(self, length: int) -> dict[str, Any]:
        """Return tokens a head: candidates, kept by a query head, and read by its group, with their spread."""
        lens = self.layers[0].seq_lens
        read = torch.cat([num_tokens(kept.selection, lens).flatten() for kept in self.kept]).float()
        counts = [kept.per_query_head.flatten() for kept in self.kept if kept.per_query_head is not None]
        heads = torch.cat(counts).float() if counts else read
        candidates = statistics.mean(float(num_tokens(c, lens).float().mean()) for c in self.candidates)
        tails = [kept.tail for kept in self.kept if kept.tail is not None]
        pages = statistics.mean(float(tail.pages.lengths.float().mean()) for tail in tails) if tails else 0.0
        return {
            "candidates": candidates, "query_head": spread(heads), "union": spread(read),
            "target_union": length / UNION, "tail_pages": pages,
            "tail_bytes": pages * tails[0].means.bytes_per_page if tails else 0.0,
        }  # fmt: skip


def measure_method(method: Method, work: Workload, static: StaticCache, cell: Cell, repeats: int) -> dict[str, Any]:
    """Time a method and check it on the way.

    Returns:
        Times of each stage, of ``total``, which is `TwilightAttention.attend`, and of ``append`` and ``decode``, see
        `whole_steps`; bytes, budgets and what the check found.
    """
    device = static.geometry.device
    stages = Stages(method, work, static)
    row: dict[str, Any] = {
        name: time_calls([functools.partial(call, i) for i in range(len(static.layers))], repeats, device)
        for name, call in stages.calls().items()
    }
    row["ran_dense"] = method.attention.is_dense(stages.layers[0])
    row["budgets"] = budgets = stages.budgets(work.length)
    row["bytes"] = cell.stage_bytes(
        method.attention.selector.bytes_per_token(static.geometry), budgets["candidates"], budgets["union"]["mean"],
        estimates=stages.prunes, tail=budgets["tail_bytes"],
    )  # fmt: skip
    row["check"] = check_step(method.attention, static, work.queries[0], stages.kept[0], method.name)
    row |= whole_steps(method.attention, static, work.queries, repeats)
    return row


def whole_steps(
    attention: TwilightAttention, static: StaticCache, queries: list[torch.Tensor], repeats: int
) -> dict[str, Times]:
    """Time steps that append: microseconds a layer of ``append`` alone and of ``decode``, microseconds a step of
    ``budget``.

    A captured step goes through all layers. What it does once, growing the lengths and resolving budgets, is timed
    apart and taken off, because a workload has more layers than a model, or fewer. Each step takes its token back
    first, so that lengths stay as they are.
    """
    g, layers = static.geometry, layers_of(static)
    count = len(layers)
    shape = (len(static.lengths), g.num_kv_heads, g.head_dim)
    k, v = (torch.randn(shape, device=g.device).to(g.dtype) for _ in range(2))

    def step(body: Callable[[int], Any]) -> None:
        rewind(static, 1)
        for i in range(count):
            body(i)

    def lengths() -> None:
        static.seq_lens.sub_(1)
        static.seq_lens.add_(1)

    def budget() -> None:
        resolved = attention.budget.resolve(static.seq_lens, g.num_kv_heads, max_seq_len=static.max_seq_len)
        resolved.pages(g.page_size)

    timed = {
        "append": lambda: step(lambda i: layers[i].append(k, v)),
        "decode": lambda: step(lambda i: attention.decode(queries[i], k, v, layers[i])),
    }
    fixed = time_calls([lengths], repeats, g.device)
    row = {name: time_calls([call], repeats, g.device, layers=count) for name, call in timed.items()}
    row["budget"] = time_calls([budget], repeats, g.device)
    once = {"append": fixed["us"], "decode": fixed["us"] + row["budget"]["us"]}
    for name, us in once.items():
        row[name] = {key: max(0.0, value - us) / count for key, value in row[name].items()}
    timed["append"]()  # the budgets of the captured step go with its graph
    return row


def rewind(static: StaticCache, tokens: int) -> None:
    """Take the newest tokens of every row back. What is kept about their page is computed again when it fills."""
    static.seq_lens.sub_(tokens)
    if not (static.seq_lens.is_cuda and torch.cuda.is_current_stream_capturing()):
        static.lengths = [length - tokens for length in static.lengths]


def num_tokens(selection: Selection, seq_lens: torch.Tensor) -> torch.Tensor:
    """Return `[b, Hkv]`: `Selection.num_tokens`, a row at a time, because that spells all of them out."""
    if selection.granularity == 1:
        return selection.lengths
    rows = [slice(i, i + 1) for i in range(len(seq_lens))]
    parts = (Selection(selection.indices[r], selection.lengths[r], selection.granularity) for r in rows)
    return torch.cat([part.num_tokens(seq_lens[r]) for part, r in zip(parts, rows, strict=True)])


def spread(values: torch.Tensor) -> dict[str, float]:
    """Return mean, 5th and 95th percentile and extremes."""
    low, high = torch.quantile(values[: 2**24], torch.tensor([0.05, 0.95], device=values.device)).tolist()
    return {
        "mean": float(values.mean()), "p5": low, "p95": high, "min": float(values.min()), "max": float(values.max()),
    }  # fmt: skip
