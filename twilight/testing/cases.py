"""The cases: what is expected of every selector. Each raises `Failure`, or `Skip` where there is nothing to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from twilight import kernels, ops
from twilight.attention import TwilightAttention, attend_densely
from twilight.budget import Budget
from twilight.graph import StaticCache
from twilight.pruner import TopP
from twilight.selection import Selection
from twilight.testing.gpu import captured, same_on_both
from twilight.testing.host import no_waiting
from twilight.testing.world import LENGTHS, Failure, Skip, Step, Subject, Tokens, World, check_form

_LONG = 1200
"""More tokens than a method that has a size of its own (NSA: 16 blocks of 64) proposes."""
_READ_ONLY = ("k_pages", "v_pages", "shadow", "page_table", "seq_lens", "new_tokens")


@dataclass(frozen=True)
class Case:
    """One thing that is expected.

    Attributes:
        name: what it is called in reports.
        about: what is expected, in one line.
        run: tries it.
    """

    name: str
    about: str
    run: Callable[[Subject], None]


def form(subject: Subject) -> None:
    for group in (1, 4, 8):
        world = World(subject.make(), subject.geometry(group))
        world.around = _only_reads
        contract = world.selector.contract()

        def watch(step: Step, weighted: bool = contract.weighted) -> None:
            check_form(step)
            if step.selection.log_weight is not None:
                subject.seen.add("weighted")
                if not weighted:
                    raise Failure(
                        "the selection carries log_weight, which the selector does not declare: "
                        "contract() should return Contract(weighted=True)"
                    )

        for budget in (20, 0.5, 1):
            world.step(budget, watch)


def budget(subject: Subject) -> None:
    for group in (1, 4):
        world = World(subject.make(), subject.geometry(group), steps=8)
        declared = world.selector.contract().budget

        def watch(step: Step, strict: bool = declared) -> None:
            check_form(step)
            s, g = step.selection, step.world.geometry
            pages = s.granularity != 1
            most = step.budget.pages(g.page_size) if pages else step.budget.tokens
            over = (s.lengths > most).nonzero().tolist()
            if not over:
                return
            subject.seen.add("budget")
            if strict:
                row, head = over[0]
                raise Failure(
                    f"over budget: expected at most {int(most[row, head])} {'pages' if pages else 'tokens'} "
                    f"(budget.tokens is {int(step.budget.tokens[row, head])}), got {int(s.lengths[row, head])}; "
                    f"{step.where(row, head)}\n  a method with a size of its own says so: Contract(budget=False)"
                )

        for value in (1, 20, 64, 0.25, 1.0, _uneven):
            world.step(value, watch)


def _uneven(layer: object) -> Budget:
    """A budget that is another for each row and head, as policies give them."""
    lens, heads = layer.seq_lens, layer.geometry.num_kv_heads  # type: ignore[attr-defined]
    rows = torch.arange(len(lens), device=lens.device)[:, None]
    wanted = 5 + 11 * torch.arange(heads, device=lens.device) + 3 * rows
    tokens = torch.minimum(wanted.int(), lens[:, None])
    return Budget(tokens, min(5 + 11 * heads + 3 * len(lens), layer.max_seq_len))  # type: ignore[attr-defined]


def dense(subject: Subject) -> None:
    for group in (1, 4):
        world = World(subject.make(), subject.geometry(group), (*LENGTHS, _LONG))
        strict = world.selector.contract().dense

        def watch(step: Step, strict: bool = strict) -> None:
            check_form(step)
            for row, heads in enumerate(step.lists()):
                for head, tokens in enumerate(heads):
                    missing = sorted(set(range(int(step.layer.seq_lens[row]))) - set(tokens))
                    if missing:
                        subject.seen.add("dense")
                    if missing and strict:
                        raise Failure(_missing(missing, step, row, head))

        world.step(1.0, watch)
        # p=1 keeps everything, so that the step is dense attention.
        attention = TwilightAttention(world.selector, TopP(1.0), 1.0)
        ones = [1] * len(world.rows)
        for i, layer in enumerate(world.layers):
            q, k, v = (world._next(which, ones, i)[:, 0] for which in "qkv")
            out, _ = attention.decode(q, k, v, layer)
            exact, _ = attend_densely(q, layer)
            error = (out - exact).abs().amax(-1)
            if not bool((error <= 1e-3).all()):
                subject.seen.add("dense")
                if strict:
                    row = int(error.amax(-1).nan_to_num(torch.inf).argmax())
                    raise Failure(
                        f"with a budget of everything and p=1, the output should be dense attention's; it is "
                        f"{float(error[row].max()):.3g} away in row {row} ({int(layer.seq_lens[row])} tokens), "
                        f"layer {layer.index}, G={group}\n  a method that draws or corrects says so: "
                        "Contract(dense=False)"
                    )


def _missing(missing: list[int], step: Step, row: int, head: int) -> str:
    length, size = int(step.layer.seq_lens[row]), step.world.geometry.page_size
    tail = ""
    if missing[0] >= length // size * size:
        tail = f"\n  these are the tail of a page: the newest page holds {length % size} of {size} tokens, and counts"
    return (
        f"with a budget of everything, every token should be proposed; {len(missing)} are missing, the first is "
        f"{missing[0]}; {step.where(row, head)}{tail}\n  a method that leaves tokens out says so: Contract(dense=False)"
    )


def chunks(subject: Subject) -> None:
    lengths = (0, 14, 33, 130)
    make, geometry = subject.make, subject.geometry()
    strict = make().contract().chunks
    once = World(make(), geometry, lengths)
    for size in (1, 7):
        pieces = World(make(), geometry, lengths, chunk=size)
        for layer, other in zip(once.layers, pieces.layers, strict=True):
            _check_metadata(layer, other, f"appended {size} at a time and all at once")
        for value in (20, 0.5):
            expected, found = once.step(value), pieces.step(value)
            said = _difference(expected, found)
            if said is not None:
                subject.seen.add("chunks")
                if strict:
                    raise Failure(
                        f"a prompt appended {size} tokens at a time should be the prompt appended at once; {said}\n"
                        "  what is kept must follow from the tokens: metadata from a page's keys, state from observe; "
                        "if a few tokens cannot teach it anything, Contract(chunks=False)"
                    )
        once = World(make(), geometry, lengths)


def _check_metadata(one: object, other: object, how: str) -> None:
    for spec in one.specs:  # type: ignore[attr-defined]
        for row, length in enumerate(one.seq_lens.tolist()):  # type: ignore[attr-defined]
            used = -(-length // one.geometry.page_size)  # type: ignore[attr-defined]
            a, b = (each.metadata(spec.name)[each.page_table[row, :used].long()] for each in (one, other))  # type: ignore[attr-defined]
            full = length // one.geometry.page_size  # type: ignore[attr-defined]
            # A page's tail holds what was there before, where an entry is a token's.
            a, b = (a[:full], b[:full]) if spec.per == "token" else (a, b)
            if not torch.equal(a.nan_to_num(), b.nan_to_num()):
                raise Failure(
                    f"metadata '{spec.name}' differs between pages {how}: row {row} ({length} tokens)\n"
                    "  summarize must be a function of the page's valid keys alone, in a fixed order of summation"
                )


def batch(subject: Subject) -> None:
    # Among them a prompt that a method may find too short to learn from, though not too short to choose from.
    geometry, lengths = subject.geometry(), (*LENGTHS, 60)
    together = World(subject.make(), geometry, lengths)
    alone = [World(subject.make(), geometry, (length,), seeds=(row,)) for row, length in enumerate(lengths)]
    _check_alone(together, alone)


def mixed(subject: Subject) -> None:
    # After prompts long and short, a short step to one row, a prompt to another, nothing to another.
    geometry, lengths, more = subject.geometry(), (150, 150, 20, 150), (1, 200, 200, 0)
    room = max(more) + 4
    together = World(subject.make(), geometry, lengths, steps=room)
    together.prompt(more)
    alone = []
    for row, (length, count) in enumerate(zip(lengths, more, strict=True)):
        alone.append(World(subject.make(), geometry, (length,), steps=room, seeds=(row,)))
        if count:
            alone[-1].prompt([count])
    _check_alone(together, alone)


def _check_alone(together: World, alone: list[World]) -> None:
    """Compare each row of a batch with the row by itself, over some steps."""
    for value in (20, 0.5, 50):
        whole, single = together.step(value), [world.step(value) for world in alone]
        for row, steps in enumerate(single):
            for one, other in zip(whole, steps, strict=True):
                if one.lists()[row] != other.lists()[0]:
                    raise Failure(
                        f"a row should select the same whoever else is in the batch; {one.where(row, 0)} "
                        f"{_compare(one.lists()[row], other.lists()[0], 'in the batch', 'alone')}\n"
                        "  n of observe's q is the longest row's: how many tokens a row has gained is layer.new_tokens"
                    )


def rows(subject: Subject) -> None:
    geometry, selector = subject.geometry(), subject.make()
    world = World(selector, geometry, (90, 40), steps=12)
    for _ in range(2):
        world.step(20)
    world.cache.free(0)
    world.rows[0], world.done[0] = Tokens(geometry, 80, 9), 0
    world.prompt([70, 0])
    fresh = World(subject.make(), geometry, (70,), steps=10, seeds=(9,))
    for _ in range(3):
        again, first = world.step(20), fresh.step(20)
        for one, other in zip(again, first, strict=True):
            if one.lists()[0] != other.lists()[0]:
                raise Failure(
                    f"a row that was freed and used again should select as a new one does; {one.where(0, 0)} "
                    f"{_compare(one.lists()[0], other.lists()[0], 'used again', 'new')}\n"
                    "  what belongs to a sequence lies in metadata or state, which the cache frees with the row, not "
                    "in the selector"
                )
    world.cache.fork(0, 1)
    world.rows[1], world.done[1] = world.rows[0], world.done[0]
    for step in world.step(20):
        if step.lists()[0] != step.lists()[1]:
            raise Failure(
                f"a forked row should select as the one that it continues; {step.where(1, 0)} "
                f"{_compare(step.lists()[1], step.lists()[0], 'forked', 'its source')}"
            )


def repeat(subject: Subject) -> None:
    geometry, shared = subject.geometry(), subject.make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        one, between = World(shared, geometry), World(shared, geometry, seeds=range(50, 50 + len(LENGTHS)))
        first = []
        for _ in range(2):
            first.append(one.step(20))
            between.step(20)
        torch.manual_seed(2)
        again = World(subject.make(), geometry)
        for steps in first:
            said = _difference(steps, again.step(20))
            if said is not None:
                raise Failure(
                    f"the same tokens should give the same selection, whatever has run in between; {said}\n"
                    "  random numbers come from twilight.draws, not from torch's generator; one instance serves any "
                    "number of caches, so nothing of a sequence lies in it"
                )


def metadata(subject: Subject) -> None:
    selector = subject.make()
    if not selector.metadata(subject.geometry()):
        raise Skip("the selector keeps no metadata")
    world = World(selector, subject.geometry())
    world.step(20)
    size = world.geometry.page_size
    for layer in world.layers:
        for row, length in enumerate(layer.seq_lens.tolist()):
            pages = layer.page_table[row, : -(-length // size)].long()
            valid = torch.arange(len(pages) * size).view(-1, size) < length
            keys = layer.k_pages[pages].masked_fill(~valid[:, None, :, None], 0)
            summary = selector.summarize(keys, valid, layer.index)
            for spec in layer.specs:
                if spec.name not in summary:
                    raise Failure(f"summarize: expected '{spec.name}', which metadata declares, got {sorted(summary)}")
                have, want = layer.metadata(spec.name)[pages], summary[spec.name]
                if spec.per == "token":
                    have, want = (each.transpose(1, 2)[valid] for each in (have, want))
                if have.shape != want.shape:
                    raise Failure(f"summarize: '{spec.name}' should be {list(have.shape)}, got {list(want.shape)}")
                if not torch.equal(have, want.to(have.dtype)):
                    raise Failure(
                        f"metadata '{spec.name}' (rule '{spec.rule}') should be what summarize returns, to the last "
                        f"bit; it is not, in row {row} ({length} tokens), layer {layer.index}"
                    )


def ranking(subject: Subject) -> None:
    def watch(step: Step) -> None:
        check_form(step)
        found, layer, size = step.world.selector.ranking(step.layer), step.layer, step.world.geometry.page_size
        if found is None:
            raise Skip("the selector's ranking is None: select is a launch of its own, or more")
        if found.vectors:
            scores = ops.page_scores(step.q, found.vectors, layer.page_table, layer.seq_lens, page_size=size)
            best = ops.top_k(
                scores, step.budget.pages(size), layer.seq_lens, granularity=size,
                capacity=step.budget.page_capacity(size), reduce=found.reduce, scale=layer.geometry.sm_scale,
                force_newest=True,
            )  # fmt: skip
        else:
            best = Selection.everything(
                layer.seq_lens, layer.geometry.num_kv_heads, max_seq_len=layer.max_seq_len, granularity=size
            )
        other = Step(step.world, layer, step.q, step.budget, best)
        said = _difference([step], [other], ("select", "ranking"))
        if said is not None:
            raise Failure(f"select should choose the pages that ranking names; {said}")

    world = World(subject.make(), subject.geometry())
    for value in (20, 0.5):
        world.step(value, watch)


def host(subject: Subject) -> None:
    world = World(subject.make(), subject.geometry())
    world.around = lambda step: no_waiting()
    world.step(20)
    world.step(0.5)


def static(subject: Subject) -> None:
    geometry = subject.geometry()
    plain, other = (World(subject.make(), geometry) for _ in range(2))
    fixed = StaticCache(other.cache, max(LENGTHS) + 40)
    fixed.set_active(range(len(LENGTHS)))
    other.layers = fixed.layers
    for value in (20, 0.5):
        said = _difference(plain.step(value), other.step(value), ("the cache", "StaticCache"))
        if said is not None:
            raise Failure(
                f"over a StaticCache, whose shapes are those of its end, the selection should be the same; {said}\n"
                "  layer.max_seq_len and budget.capacity are bounds: lengths are layer.seq_lens and budget.tokens"
            )


def capture(subject: Subject) -> None:
    _needs_gpu()
    captured(subject)


def devices(subject: Subject) -> None:
    _needs_gpu()
    same_on_both(subject)


def _needs_gpu() -> None:
    if not (torch.cuda.is_available() and kernels.available(torch.device("cuda"))):
        raise Skip("no GPU here that the kernels run on")


def contract(subject: Subject) -> None:
    """Is every exception that is declared one that is met?"""
    declared = subject.make().contract()
    words = {"budget": declared.budget, "dense": declared.dense, "chunks": declared.chunks}
    tries = {"budget": budget, "dense": dense, "chunks": chunks, "weighted": form}
    exceptions = [name for name, holds in words.items() if not holds] + (["weighted"] if declared.weighted else [])
    for name in exceptions:
        if name not in subject.seen:
            tries[name](subject)
        if name not in subject.seen:
            value = "True" if name == "weighted" else "False"
            raise Failure(
                f"contract() declares {name}={value}, which was never met here: leave it out, so that it is checked"
            )


@contextmanager
def _only_reads(step: Step) -> Iterator[None]:
    layer = step.layer
    parts = {name: getattr(layer, name) for name in _READ_ONLY}
    parts |= {f"metadata '{spec.name}'": layer.metadata(spec.name) for spec in layer.specs}
    parts |= {"q": step.q, "budget.tokens": step.budget.tokens}
    before = {name: part.clone() for name, part in parts.items()}
    yield
    for name, part in parts.items():
        if not torch.equal(part.nan_to_num() if part.is_floating_point() else part,
                           before[name].nan_to_num() if part.is_floating_point() else before[name]):  # fmt: skip
            raise Failure(
                f"{name} has changed: select and finish only read the cache; what a step learns goes through "
                "layer.update_state"
            )


def _difference(one: list[Step], other: list[Step], names: tuple[str, str] = ("once", "the other time")) -> str | None:
    for a, b in zip(one, other, strict=True):
        for row, (first, second) in enumerate(zip(a.lists(), b.lists(), strict=True)):
            if first != second:
                return f"{a.where(row, 0)} {_compare(first, second, *names)}"
    return None


def _compare(one: list[list[int]], other: list[list[int]], first: str, second: str) -> str:
    head = next(head for head, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    a, b = set(one[head]), set(other[head])
    return f"differs at kv head {head}: only {first} {sorted(a - b)[:5]}, only {second} {sorted(b - a)[:5]}"


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("form", "shapes, types, range, order, uniqueness at G = 1, 4, 8; the cache is only read", form),
        Case("budget", "at most budget.tokens a row, rounded up to pages, whatever each row and head gets", budget),
        Case("dense", "a budget of everything proposes everything; with p=1 that is dense attention", dense),
        Case("chunks", "a prompt token by token is the prompt at once", chunks),
        Case("batch", "rows of different lengths do not see each other", batch),
        Case("mixed", "rows that gain few tokens and many at once do not see each other", mixed),
        Case("rows", "a row that is freed and used again, or forked, brings nothing of its own", rows),
        Case("repeat", "the same tokens give the same selection, also from an instance that serves others", repeat),
        Case("metadata", "metadata is what summarize makes of a page's keys", metadata),
        Case("ranking", "ranking names the pages that select chooses", ranking),
        Case("host", "select and finish do not wait for the GPU, as far as a CPU can tell", host),
        Case("static", "the same over a StaticCache, whose shapes do not change", static),
        Case("capture", "a step in a CUDA graph is the step outside", capture),
        Case("devices", "CPU and GPU select the same", devices),
        Case("contract", "exceptions that contract() declares are met", contract),
    )
}
"""The cases by name, in the order in which they run."""
