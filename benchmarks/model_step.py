"""Time one token of a Llama-shaped model with random weights, the whole step in one CUDA graph.

    twilight bench model                                    b = 1 and 16 at 32k, into benchmarks/results/
    twilight bench model --batches 1 --length 128k

The step is embedding, 32 times (norm, q/k/v, rotary, append, attention, output, norm, MLP), norm, logits and argmax,
whose token the next step begins with. All ways to attend share the weights and the memory of the cache. On a GPU
torch.compile makes one kernel each of residual and norm, rotary, and the MLP's gate, as serving engines have them;
`--plain` leaves them to torch's own, 11 launches a layer more.

The cache is filled by the workload of `twilight bench`, so that budgets differ by head as in it. Queries of a random
model do not match such keys: attention would be flat, and every budget large. So the projections run, and then
attention is given the workload's query of that layer in place of the projected one. The work is that of a model; the
budgets are the workload's, and are printed. Keys and values that a step appends are the model's own.

`dense` is torch's SDPA on contiguous K and V (the cache's memory, viewed as if it had no pages), FlashInfer's paged
decode, or this package's dense kernel; ratios are against the best. Torch and FlashInfer are given exactly the tokens
there are, at a length that does not grow. The share of attention, append included, is what a step takes longer than
one that leaves both out.
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from twilight import Geometry, NoPruning, Selector, TopP, TwilightAttention
from twilight.graph import DecodeGraph, StaticCache

from .cell import free_bytes
from .cells import UNION, Cell, parse_length
from .check import WrongOutput, check_step
from .dense import FLASHINFER, FlashInfer, first_line, sdpa, sdpa_backends
from .llama import SHAPES, Attend, Llama, LlamaShape
from .methods import Method, Stages, make
from .results import Results, default_path, header
from .runs import add_common, check_common, run_all
from .tables import QUEST, TOP_K
from .timing import Deadline, Times, time_replays
from .workload import Workload, contiguous, layers_of, make_workload

SPARE = 64
"""Tokens below the length at which every way starts."""
REST = "no attention"
PAGED = "dense: twilight, paged"
_DENSE_LAYERS = 2
_AGREEMENT = 0.99
"""Cosine that the logits of dense ways over the same pages have at least, in bfloat16 through 32 layers."""


@dataclass(frozen=True)
class Way:
    """A way to attend.

    Attributes:
        name: what reports call it.
        attend: of every layer.
        grows: whether a step appends through the `StaticCache`, whose lengths then grow.
        paged: whether it reads the tokens where the workload put them, so that its logits can be compared.
    """

    name: str
    attend: Attend
    grows: bool = False
    paged: bool = True

    @property
    def dense(self) -> bool:
        """Whether it is a baseline."""
        return self.name.startswith("dense")


@dataclass(frozen=True)
class ModelCell:
    """A batch size of a model."""

    shape: LlamaShape
    batch: int
    length: int
    page_size: int = 16

    def __str__(self) -> str:
        return f"{self.shape.name} b={self.batch} N={self.length}"

    @property
    def layer(self) -> Cell:
        """One of its layers."""
        s = self.shape
        return Cell(self.batch, self.length, s.q_heads, s.kv_heads, s.head_dim, self.page_size)

    def memory(self) -> float:
        """Return the bytes that it takes: weights, the cache of all layers, and what one layer's step makes."""
        weights = 2 * self.shape.parameters
        one = self.layer
        return weights + self.shape.layers * one.layer_bytes() + one.memory(1) - one.layer_bytes()

    def identity(self, options: argparse.Namespace) -> dict[str, Any]:
        """Return the fields that its result is found by."""
        return self.layer.as_dict() | {"p": options.p, "model": self.shape.name, "compiled": options.compiled}


@dataclass
class Bench:
    """A model, a filled cache and the state of a step."""

    model: Llama
    work: Workload
    static: StaticCache
    ids: torch.Tensor

    def __post_init__(self) -> None:
        self.first = self.ids.clone()
        self.start = self.work.length

    @property
    def geometry(self) -> Geometry:
        """Sizes of the cache."""
        return self.static.geometry

    def reset(self) -> None:
        """Go back to the first token."""
        self.ids.copy_(self.first)
        self.static.lengths = [self.start] * len(self.static.lengths)
        self.static.seq_lens.fill_(self.start)

    def step(self, way: Way) -> torch.Tensor:
        """Do a step; return its logits."""
        # Read before the first layer appends: the place of the new token.
        logits = self.model(self.ids, self.static.seq_lens.long(), way.attend)
        self.ids.copy_(logits.argmax(-1))
        return logits

    def replay(self, way: Way) -> tuple[Callable[[], Any], Callable[[], torch.Tensor]]:
        """Return a function that does a step as fast as it can be done, and one that returns the latest logits."""
        step = functools.partial(self.step, way)
        if self.geometry.device.type != "cuda":
            latest: list[torch.Tensor] = []

            def eager() -> None:
                latest[:] = [step()]

            return eager, lambda: latest[0]
        if way.grows:
            captured = DecodeGraph(self.static, step)
            return captured.replay, lambda: captured.output
        torch.cuda.synchronize(self.geometry.device)
        stream = torch.cuda.Stream(self.geometry.device)
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.synchronize(self.geometry.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        return graph.replay, lambda: logits


def ways(bench: Bench, quest: Selector, p: float, skipped: dict[str, str]) -> Iterator[Way]:
    """Yield the ways to attend, and note in `skipped` why FlashInfer is not one.

    Those of SDPA come last: their writes land where other sequences' tokens are.
    """
    work, static, g = bench.work, bench.static, bench.geometry
    queries, layers = work.queries, layers_of(static)

    def twilight(attention: TwilightAttention, dense_layers: int = 0) -> Attend:
        dense = TwilightAttention(quest, NoPruning(), min_context=static.max_seq_len)

        def attend(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return (dense if i < dense_layers else attention).decode(queries[i], k, v, layers[i])[0]

        return attend

    sparse = TwilightAttention(quest, TopP(p), 0.25)
    yield Way(REST, lambda i, q, k, v: queries[i])
    yield Way(QUEST, twilight(sparse), grows=True)
    yield Way(f"{QUEST}, first {_DENSE_LAYERS} layers dense", twilight(sparse, _DENSE_LAYERS), grows=True)
    yield Way(TOP_K, twilight(TwilightAttention(quest, NoPruning(), 0.125)), grows=True)
    yield Way(PAGED, twilight(sparse, len(layers)), grows=True)

    def paged(flash: FlashInfer, i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        pages = (layers[i].k_pages, layers[i].v_pages)
        flash.append(k, v, pages)
        return flash.attend(queries[i], pages)

    for name, tensor_cores in FLASHINFER.items():
        try:
            flash = FlashInfer(g, static.page_table, bench.start + 1, tensor_cores=tensor_cores)
        except Exception as problem:  # not installed, or it compiles at first use, which fails in ways of its own
            skipped[f"dense: {name}"] = first_line(problem)
            continue
        yield Way(f"dense: {name}", functools.partial(paged, flash))

    place = torch.tensor([bench.start], device=g.device)

    def in_one_piece(backend: Any, i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = (contiguous(pages, len(q)) for pages in (layers[i].k_pages, layers[i].v_pages))
        keys.index_copy_(2, place, k.unsqueeze(2))
        values.index_copy_(2, place, v.unsqueeze(2))
        there = bench.start + 1
        return sdpa(queries[i], keys[:, :, :there], values[:, :, :there], backend, folded=False)

    for name, backend in sdpa_backends(g.device).items():
        yield Way(f"dense: {name}", functools.partial(in_one_piece, backend), paged=False)


def measure_ways(
    bench: Bench, quest: Selector, p: float, repeats: int, deadline: Deadline
) -> tuple[dict[str, Any], dict[str, str]]:
    """Time every way.

    Returns:
        By name, ``ms`` a token with percentiles, and ``logits_cosine`` to the dense way over the same pages; and the
        reason for what was not timed.

    Raises:
        WrongOutput: logits that are not finite, or dense ways that do not agree.
    """
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    logits: dict[str, torch.Tensor] = {}
    for way in ways(bench, quest, p, skipped):
        deadline.check()
        bench.reset()
        try:
            replay, latest = bench.replay(way)
            bench.reset()
            replay()
            first = latest().float().clone()
            times: Times = time_replays(replay, repeats, bench.geometry.device)
        except Exception as problem:
            if not way.dense or way.name == PAGED:
                raise
            skipped[way.name] = first_line(problem)
            continue
        if not first.isfinite().all():
            raise WrongOutput(f"{way.name}: logits are not finite")
        found[way.name] = {"ms": times["us"] / 1e3, "p10": times["p10"] / 1e3, "p90": times["p90"] / 1e3}
        if way.paged and way.name != REST:
            logits[way.name] = first
        del replay, latest
        gc.collect()
    for name, each in logits.items():
        cosine = float(torch.cosine_similarity(each, logits[PAGED], dim=-1).min())
        found[name]["logits_cosine"] = cosine
        if name.startswith("dense") and not cosine > _AGREEMENT:
            raise WrongOutput(f"{name}: its logits have a cosine of {cosine:.3f} to those of '{PAGED}'")
    return found, skipped


def run_model(cell: ModelCell, model: Llama, options: argparse.Namespace, device: torch.device, deadline: Deadline,
              say: Callable[[str], None]) -> dict[str, Any]:  # fmt: skip
    """Measure a batch size; see the top of this file."""
    shape = cell.shape
    torch.manual_seed(1)
    dtype = model.head.weight.dtype
    geometry = Geometry(shape.layers, shape.q_heads, shape.kv_heads, shape.head_dim, cell.page_size, dtype, device)
    quest = make("quest")
    start = cell.length - SPARE
    work = make_workload(geometry, cell.batch, start, quest, start / UNION, spare=SPARE)
    static = StaticCache(work.cache, cell.length)
    say(f"{cell}, {start} tokens at first, filled in {work.seconds:.1f} s")
    bench = Bench(model, work, static, torch.randint(shape.vocab, (cell.batch,), device=device))
    result: dict[str, Any] = cell.identity(options) | {
        "layers": shape.layers, "start": start, "dtype": str(dtype).removeprefix("torch."),
        "repeats": options.repeats, "fill_s": work.seconds,
    }  # fmt: skip
    result["budgets"], result["check"] = check_budgets(bench, quest, options.p)
    with torch.inference_mode():
        result["ways"], result["skipped"] = measure_ways(bench, quest, options.p, options.repeats, deadline)
    summarise(result)
    for name, way in result["ways"].items():
        best = "   <- best dense" if name == result["best_dense"] else ""
        say(f"  {name:36s} {way['ms']:8.2f} ms {way['ratio']:6.2f}x  attention {way['attention_share']:4.0%}{best}")
    for name, reason in result["skipped"].items():
        say(f"  {name:36s} not timed: {reason}")
    union = result["budgets"]["union"]
    say(f"  union {union['mean']:.0f} (N/64 = {start / UNION:.0f}; {union['min']:.0f} to {union['max']:.0f})")
    return result


def check_budgets(bench: Bench, quest: Selector, p: float) -> tuple[dict[str, Any], dict[str, float]]:
    """Return what Quest with top-p keeps in all layers, and the check of the first layer's output."""
    attention = TwilightAttention(quest, TopP(p), 0.25)
    stages = Stages(Method(QUEST, attention), bench.work, bench.static)
    check = check_step(attention, bench.static, bench.work.queries[0], stages.kept[0], QUEST)
    return stages.budgets(bench.start), check


def summarise(result: dict[str, Any]) -> None:
    """Add the best dense way, each way's ratio to it, and attention's share of each step."""
    timed = result["ways"]
    best = result["best_dense"] = min(
        (name for name in timed if name.startswith("dense")), key=lambda n: timed[n]["ms"]
    )
    for way in timed.values():
        way["ratio"] = timed[best]["ms"] / way["ms"]
        way["attention_share"] = max(0.0, 1 - timed[REST]["ms"] / way["ms"])


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read a command line."""
    lines = __doc__.splitlines() if __doc__ else [""]
    parser = argparse.ArgumentParser(
        prog="twilight bench model", description=lines[0], epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--shape", choices=list(SHAPES), help="of the model (default llama-3.1-8b; tiny on a CPU)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="batch sizes (default 1 16)")
    parser.add_argument("--length", help="tokens in the cache (default 32k; 512 on a CPU)")
    parser.add_argument("--repeats", type=int, default=20, help="steps that are timed, at most 50 (default 20)")
    parser.add_argument("--plain", action="store_true", help="no torch.compile of what lies between the products")
    add_common(parser)
    args = parser.parse_args(list(words))
    cpu = args.device == "cpu"
    args.compiled = not (cpu or args.plain)
    args.shape = args.shape or ("tiny" if cpu else "llama-3.1-8b")
    args.length = parse_length(args.length or ("512" if cpu else "32k"))
    if args.repeats > SPARE - 4:
        raise ValueError(f"--repeats: expected at most {SPARE - 4}, for which the cache has room, got {args.repeats}")
    if min(args.batches) < 1:
        raise ValueError(f"--batches: expected at least 1, got {min(args.batches)}")
    return args


def main(words: Sequence[str], say: Callable[[str], None] = lambda line: print(line, flush=True)) -> int:
    """Run ``twilight bench model``; return the exit status."""
    args = parse(words)
    device = check_common(args)
    shape = SHAPES[args.shape]
    cells = [ModelCell(shape, batch, args.length) for batch in args.batches]
    deadline = Deadline(args.minutes)
    head = header("model", device)
    results = Results(args.out or default_path(head), head)
    weights = 2 * shape.parameters
    model: list[Llama] = []

    def run(cell: ModelCell) -> dict[str, Any]:
        if not model:  # nothing to load if all cells are there already
            torch.manual_seed(0)
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            model.append(Llama(shape, args.length + 1, device, dtype, compiled=args.compiled).requires_grad_(False))
        torch.compiler.reset()  # a function is compiled for 8 batch sizes at most, and not said to be left plain after
        return run_model(cell, model[0], args, device, deadline, say)

    def fits(cell: ModelCell) -> bool:
        return cell.memory() - (weights if model else 0) <= free_bytes(device)

    left = run_all(
        cells, run, fits, results, lambda cell: cell.identity(args), deadline, missing=args.missing, say=say
    )  # fmt: skip
    say(f"{results.path}" + (f": {left} cells are missing, run again with --missing" if left else ""))
    return 0
