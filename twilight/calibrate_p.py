"""Which p for a model: the smallest that keeps the quality of dense attention, or of the selector without a pruner.

Quality is measured as the tasks of the same names do it, through the decode path. It is taken to fall as p falls, which
holds but for noise: every p that was measured is in the table, with what it kept.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from twilight.errors import MissingExtraError
from twilight.reporting import style, which_p
from twilight.reporting.which_p import lost_text, quality_text

METRICS = ("perplexity", "facts")
LOWEST, HIGHEST = 50, 100
"""Of p, in hundredths: below one half a head may keep a single token."""
MOST_RUNS = 2 + math.ceil(math.log2(HIGHEST - LOWEST))
LAYER_STEP = 5
"""Hundredths between what is tried of one layer's p: less shows in no quality."""


@dataclass(frozen=True)
class Measured:
    """What one p does.

    Attributes:
        p: the mass that was kept.
        quality: perplexity, or the share of facts answered.
        drop: how much worse than the reference: relative for perplexity, absolute for facts.
        tokens: mean tokens that a query head keeps.
        kv_fraction: bytes read, as a fraction of dense, in sparse layers.
    """

    p: float
    quality: float
    drop: float
    tokens: float | None
    kv_fraction: float | None


@dataclass
class Search:
    """The bisection, and what it has measured on its way."""

    metric: str
    reference: float
    allowed: float
    measure: Callable[[float], tuple[float, float | None, float | None]]
    tell: Callable[[Measured], None] = lambda each: None
    measured: dict[int, Measured] = field(default_factory=dict)

    def holds(self, hundredths: int) -> bool:
        """Say whether that p stays within what is allowed, measuring it if it has not been yet."""
        if hundredths not in self.measured:
            quality, tokens, fraction = self.measure(hundredths / 100)
            lost = drop(self.metric, quality, self.reference)
            self.measured[hundredths] = Measured(hundredths / 100, quality, lost, tokens, fraction)
            self.tell(self.measured[hundredths])
        return self.measured[hundredths].drop <= self.allowed

    def smallest(self) -> float | None:
        """Return the smallest p, in hundredths, that stays within what is allowed; None if none does."""
        if not self.holds(HIGHEST):
            return None
        if self.holds(LOWEST):
            return LOWEST / 100
        bad, good = LOWEST, HIGHEST
        while good - bad > 1:
            middle = (bad + good) // 2
            if self.holds(middle):
                good = middle
            else:
                bad = middle
        return good / 100


def lower_layers(best: int, layers: int, holds: Callable[[tuple[int, ...]], bool]) -> tuple[int, ...]:
    """Lower the p of one layer after the other, as far as quality holds with the others as they are.

    Args:
        best: hundredths that hold in all layers.
        layers: how many.
        holds: says whether such numbers of all layers do.

    Returns:
        For each layer, hundredths.
    """
    steps = [*range(LOWEST, best, LAYER_STEP), best]
    found = [best] * layers
    for layer in range(layers):
        bad, good = -1, len(steps) - 1
        while good - bad > 1:
            middle = (bad + good) // 2
            found[layer] = steps[middle]
            if holds(tuple(found)):
                good = middle
            else:
                bad = middle
        found[layer] = steps[good]
    return tuple(found)


def drop(metric: str, quality: float, reference: float) -> float:
    """Return by how much `quality` is worse than `reference`; negative if it is better."""
    return quality / reference - 1 if metric == "perplexity" else reference - quality


def quality_of(metric: str, rows: Sequence[dict[str, Any]], method: str) -> float:
    """Return the quality of a method over the rows of a task.

    Perplexity is that of all scored tokens together, and accuracy that of all questions.

    Raises:
        ValueError: no row is of that method.
    """
    mine = [row for row in rows if row.get("method") == method]
    if not mine:
        raise ValueError(f"the task made no row of '{method}'")
    if metric == "perplexity":
        tokens = sum(row["scored_tokens"] for row in mine)
        return math.exp(sum(row["nll"] * row["scored_tokens"] for row in mine) / tokens)
    return sum(row["correct"] for row in mine) / sum(row["asked"] for row in mine)


def main(argv: Sequence[str]) -> int:
    """Run ``twilight calibrate p ...``; return the exit status, 1 if no p keeps the quality."""
    parser = argparse.ArgumentParser(
        prog="twilight calibrate p",
        description=f"Find the smallest p, to a hundredth, from {LOWEST / 100:g} on, that keeps quality within a drop.",
        epilog="More options are those of the command line: budget=0.5 task.context=4096 …",
    )
    parser.add_argument("--model", default="tiny", help="local folder or hub name; 'tiny' by default")
    parser.add_argument("--selector", default="quest", help="the selector (default quest)")
    parser.add_argument(
        "--metric",
        choices=METRICS,
        default="perplexity",
        help="what quality is, of a text or as a share of planted facts answered (default perplexity)",
    )
    parser.add_argument("--text", help="UTF-8 text file to measure perplexity on; held-out Python source by default")
    parser.add_argument(
        "--drop",
        type=float,
        default=0.01,
        help="allowed loss, a fraction: 0.01, the default, is 1 %% of what perplexity is compared with "
        "(relative), or 1 percentage point of the facts answered (absolute)",
    )
    parser.add_argument(
        "--against",
        choices=["dense", "unpruned"],
        default="dense",
        help="what to compare with: dense attention, or the selector at p = 1, which leaves out what "
        "the selector itself loses (default dense)",
    )
    parser.add_argument(
        "--layers", action="store_true", help="then lower the p of one layer after the other; some five runs a layer"
    )
    parser.add_argument("--out", help="JSON file to write; p.json in the current folder by default")
    parser.add_argument("--plot", help="picture to write, .png, .svg or .pdf; by default that of --out with .png")
    parser.add_argument("overrides", nargs="*", help="options of `twilight run`")
    args = parser.parse_intermixed_args(argv)
    if not 0 <= args.drop < math.inf:
        raise ValueError(f"--drop: expected 0 or more, got {args.drop}")
    if args.text is not None and args.metric != "perplexity":
        raise ValueError(f"--text: --metric {args.metric} makes its own text")
    if args.text is not None and not Path(args.text).is_file():
        raise FileNotFoundError(f"--text: no file '{args.text}'")
    out = Path(args.out or "p.json")
    plot = Path(args.plot or out.with_suffix(".png"))
    if plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot: expected a name that ends in .png, .svg or .pdf, got '{plot}'")
    for path in (out, plot):
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"no folder '{path.parent}' for {path.name}")
    if args.plot:
        style.check_matplotlib("plots", "--plot")
    words = [f"task={args.metric}", f"selector={args.selector}", *args.overrides]
    if args.model != "tiny":
        words += ["model=hf", f"model.path='{args.model}'"]
    if args.text is not None:
        words.append(f"task.text='{args.text}'")
    found = calibrate(words, metric=args.metric, allowed=args.drop, against=args.against, layers=args.layers)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    try:
        style.check_matplotlib("plots", "a picture of it")
        which_p.draw(found, plot)
        print(f"{plot}: quality and tokens kept against p")
    except MissingExtraError as error:
        print(f"note: {error}")
    print(f"{out}: {which_p.answer(found)}")
    if found["layer_p"] is not None:
        print(f"  pruner.layer_p={json.dumps(found['layer_p'], separators=(',', ':'))}")
    if found["p"] is not None:
        return 0
    print(f"  {which_p.own_loss(found)}; next, to see what pruning alone loses:")
    print(f"    {_command(parser, args, against='unpruned')}")
    more = _more(found["budget"]) if found["budget_used"] else None
    if more is not None:
        print("  or, so that the selector proposes more:")
        kept = [word for word in args.overrides if not word.startswith(("budget=", "budget.value="))]
        print(f"    {_command(parser, args, overrides=[*kept, f'budget={more:g}'])}")
    return 1


def _command(parser: argparse.ArgumentParser, args: argparse.Namespace, **changed: Any) -> str:
    """Return the command line of `args`, but for what is changed."""
    words = ["twilight", "calibrate", "p"]
    for name in ("model", "selector", "metric", "text", "drop", "against", "out", "plot"):
        value = changed.get(name, getattr(args, name))
        if value != parser.get_default(name):
            words += [f"--{name}", f"{value:g}" if isinstance(value, float) else value]
    words += ["--layers"] if args.layers else []
    return shlex.join([*words, *changed.get("overrides", args.overrides)])


def _more(budget: dict[str, Any]) -> float | None:
    """Return the double of a budget that is one number for all, None if it is not or is everything."""
    value = budget.get("value")
    if budget["name"] not in ("fixed", "fraction") or value is None or (budget["name"] == "fraction" and value >= 1):
        return None
    return min(1.0, 2 * float(value)) if budget["name"] == "fraction" else 2 * float(value)


def calibrate(
    words: Sequence[str], *, metric: str, allowed: float, against: str, layers: bool = False
) -> dict[str, Any]:
    """Search for p under a configuration, printing what is measured.

    Args:
        words: overrides of `twilight run`, without p.
        metric: ``"perplexity"`` or ``"facts"``.
        allowed: the drop that is allowed.
        against: ``"dense"``, or ``"unpruned"``: the selector with p = 1.
        layers: go on from there with a p for each layer.

    Returns:
        The search as plain data; its ``p`` is None if no p holds, and ``layer_p`` if it was not asked for.
    """
    from twilight import running, runs
    from twilight.config import CONFIG_NAMES, build_selector
    from twilight.evaluation.session import hearing
    from twilight.overrides import check, expand_budget
    from twilight.progress import Doing

    results: dict[tuple[float, ...], list[dict[str, Any]]] = {}
    config: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    budget_used = True

    def rows(*ps: float) -> list[dict[str, Any]]:
        nonlocal budget_used
        if ps not in results:
            p = max(ps)
            each = [f"pruner.layer_p={list(ps)}"] if len(ps) > 1 else []
            job = expand_budget([*words, f"p={p}", *each])
            (cfg,) = check(job, multirun=False, config_name=CONFIG_NAMES["run"], verb="run")
            config.update(runs.run_config(cfg))
            if config["p"] != p:
                raise ValueError(f"pruner={config['pruner']['name']}: it has no p to calibrate")
            what = f"p = {p:.2f}, run {len(results) + 1} of at most {MOST_RUNS}" if not each else f"p = {list(ps)}"
            with Doing(what) as doing, hearing(doing.say):
                results[ps] = running.task_module(config["task"]["name"]).run(cfg).rows
            budget_used = build_selector(cfg).contract().budget
            provenance.update(running.provenance(cfg))
        return results[ps]

    def measure(*ps: float) -> tuple[float, float | None, float | None]:
        mine = [row for row in rows(*ps) if row.get("method") == "twilight"]
        return quality_of(metric, mine, "twilight"), _mean(mine, "b1_query"), _mean(mine, "kv_fraction")

    reference = quality_of(metric, rows(1.0), "dense" if against == "dense" else "twilight")
    print(f"{against}: {metric} {quality_text(metric, reference)}; allowed drop {lost_text(metric, allowed)}")
    search = Search(metric, reference, allowed, measure, tell=functools.partial(_tell, metric))
    best = search.smallest()
    first = rows(1.0)[0]
    layer_p, lowered = None, []
    if layers and best is not None:

        def holds(hundredths: tuple[int, ...]) -> bool:
            ps = tuple(each / 100 for each in hundredths)
            quality, tokens, fraction = measure(*(ps if len(set(ps)) > 1 else ps[:1]))
            lost = drop(metric, quality, reference)
            lowered.append(asdict(Measured(max(ps), quality, lost, tokens, fraction)) | {"layer_p": list(ps)})
            _tell(metric, Measured(max(ps), quality, lost, tokens, fraction), list(ps))
            return lost <= allowed

        count = int(next(row for row in rows(1.0) if row.get("method") == "twilight")["sparse_layers"])
        layer_p = [each / 100 for each in lower_layers(round(100 * best), count, holds)]
    return {
        "method": "p",
        "metric": metric,
        "against": against,
        "reference": reference,
        "allowed_drop": allowed,
        "p": best,
        "layer_p": layer_p,
        "lowest_p": LOWEST / 100,
        "budget_used": budget_used,
        **{name: config[name] for name in ("selector", "pruner", "budget", "model", "task")},
        "text": first.get("text"),
        "seed": config["task"].get("seed"),
        "provenance": provenance,
        "measured": [asdict(search.measured[key]) for key in sorted(search.measured)],
        "lowered": lowered,
    }


def _tell(metric: str, each: Measured, ps: Sequence[float] = ()) -> None:
    tokens = "" if each.tokens is None else f"  {each.tokens:8.1f} tokens a query head"
    fraction = "" if each.kv_fraction is None else f"  {100 * each.kv_fraction:5.1f} % of the KV bytes"
    quality, lost = quality_text(metric, each.quality), lost_text(metric, each.drop, sign="+")
    which = f"p = {each.p:.2f}" if not ps else "p = " + " ".join(f"{p:.2f}" for p in ps)
    print(f"{which}  {metric} {quality:>8}  drop {lost:>8}{tokens}{fraction}", flush=True)


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [float(row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    return sum(values) / len(values) if values else None
