"""``twilight report``: one table, pictures and one page of many runs.

twilight report runs                                      into the folder report
twilight report runs/facts runs/speed --out docs/report
twilight report runs benchmarks/results                   results of twilight bench as well
twilight report runs --baseline runs-of-last-week         what has changed, for the same configurations
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from twilight.report import versions

from . import maps, quality, speed, style
from .collect import Collected, Run, collect
from .metrics import metrics
from .page import page
from .points import choice, points
from .settings import differences, labels
from .style import Picture
from .table import Merged, compare, merge, save

_MAKE = (
    "  make some: twilight sweep 'selector=glob(*)' p=0.7,0.8,0.9,0.95 task=facts\n  then:      twilight report runs"
)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read a command line."""
    lines = __doc__.splitlines() if __doc__ else [""]
    parser = argparse.ArgumentParser(
        prog="twilight report",
        description=lines[0].replace("``", "'"),
        epilog="\n".join(lines[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = "folders, searched to the bottom for result.json, or files of runs or of twilight bench"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help=where)
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="where to (default: report)")
    parser.add_argument(
        "--baseline",
        nargs="+",
        default=[],
        type=Path,
        metavar="RUNS",
        help="runs of the same configurations, at another time",
    )
    return parser.parse_args(list(words))


def main(words: Sequence[str]) -> int:
    """Run ``twilight report``; return the exit status.

    Raises:
        FileNotFoundError: runs that are not there.
        MissingExtraError: no matplotlib. Tables are written first.
        ValueError: nothing to show.
    """
    args = parse(words)
    found = collect(args.runs)
    if not found.runs and not found.benchmarks:
        raise ValueError(_nothing(args.runs, found))
    merged = merge(found)
    changed = None
    notes = _notes(found, merged)
    if args.baseline:
        before = collect(args.baseline)
        if not before.runs:
            raise ValueError("--baseline: " + _nothing(args.baseline, before))
        baseline = merge(before)
        changed = compare(merged.rows, baseline.rows, merged.metrics)
        same = {run.config_hash for run in found.runs} & {run.config_hash for run in before.runs}
        rows = len({id(row) for row in changed})
        notes.append(
            f"the baseline has {len(before.runs)} runs, {len(same)} of them of a configuration that is here; "
            f"quality has changed in {rows} rows"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    files, missing = save(merged, args.out)
    style.check_matplotlib("report", "twilight report, for its pictures (the tables are written),")
    pictures, flags = draw(found, merged)
    for picture in pictures:
        files += style.save(picture, args.out)
    command = shlex.join(["twilight", "report", *words])
    text = page(
        found,
        merged,
        pictures,
        args.out,
        notes=notes,
        flags=flags,
        changed=changed,
        command=command,
        versions=versions(),
    )
    files.append(args.out / "index.html")
    part = files[-1].with_suffix(".html.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, files[-1])
    for note in [*notes, *([missing] if missing else [])]:
        print(f"note: {note}", file=sys.stderr)
    for flag in flags[:10]:
        print(f"check: {flag}", file=sys.stderr)
    if len(flags) > 10:
        print(f"check: {len(flags) - 10} more like these, in the column 'flag'", file=sys.stderr)
    print(f"{files[-1]}: {len(found.runs)} runs, {len(merged.rows)} rows, {len(pictures)} pictures")
    return 0


def draw(found: Collected, merged: Merged) -> tuple[list[Picture], list[str]]:
    """Draw all pictures that the runs have something for.

    Returns:
        The pictures, and what is flagged: pooled points first, then rows.
    """
    looks = style.series(choice(row).name for row in merged.rows if not row.is_dense)
    pictures: list[Picture] = []
    flags: list[str] = []
    by_p: list[Picture] = []
    for metric in merged.metrics:
        pooled = points(merged.rows, metric)
        if not pooled:
            continue
        names = labels(point.setting for point in pooled)
        pictures += quality.against_tokens(pooled, metric, names, looks)
        by_p += quality.against_p(pooled, metric, names, looks)
        for point in pooled:
            if point.flag and point.num_rows > 1:
                where = " ".join(f"{name}={value}" for name, value in point.panel)
                flags.append(f"{point.choice}, {where}, {point.num_rows} rows together: {point.flag}")
    for row in merged.flagged:
        asked = ("task", "kind", "lm_task", "context", "depth")
        where = " ".join(f"{name}={row.values[name]}" for name in asked if row.values.get(name) is not None)
        flags.append(f"{choice(row)}, {where}: {row.values['flag']}")
    heads = merged.tables.get("budgets") or merged.tables.get("fidelity_heads") or []
    timed = speed.timings(merged.rows, found.benchmarks)
    pictures += by_p
    parts: list[Callable[[], list[Picture]]] = [
        lambda: maps.budgets(heads),
        lambda: maps.needles(merged.rows),
        lambda: maps.positions(merged.tables.get("positions", [])),
        lambda: speed.stages(timed),
        lambda: speed.against_context(timed),
    ]
    for part in parts:
        pictures += part()
    return pictures, flags


def _notes(found: Collected, merged: Merged) -> list[str]:
    notes = []
    if found.failures:
        failed = [each for each in found.failures if not each.not_applicable]
        since = sum(each.finished_since for each in found.failures)
        notes.append(
            f"{len(failed)} runs failed and {len(found.failures) - len(failed)} do not apply to their model"
            + (f"; of {since} a run of the same configuration has finished" if since else "")
        )
    if found.replaced:
        other = [old for old, new in found.replaced if _world(old) != _world(new)]
        said = f", {len(other)} of them of other versions, devices or weights" if other else ""
        notes.append(f"{len(found.replaced)} runs have a newer one of the same configuration, which was taken{said}")
    for path, why in found.skipped:
        notes.append(f"skipped {path}: {why}")
    by_task: dict[str, set[str]] = {}
    for task in dict.fromkeys(row.setting.task for row in merged.rows):
        settings = {row.setting for row in merged.rows if row.setting.task == task}
        for name, values in differences(settings).items():
            shown = "; ".join(value or "none" for value in values)
            by_task.setdefault(f"{len(values)} values of {name} ({shown})", set()).add(task)
    for said, tasks in by_task.items():
        notes.append(f"{', '.join(sorted(tasks))}: {said}; they are drawn apart")
    notes += merged.dense_spread
    if merged.rows and not metrics(row.values for row in merged.rows) and not found.benchmarks:
        notes.append("no row has a metric that is drawn: see rows.csv")
    return notes


def _world(run: Run) -> tuple[str, ...]:
    return tuple(str(run.provenance.get(name)) for name in ("versions", "device", "dtype", "kernels", "model_hash"))


def _nothing(places: Sequence[Path], found: Collected) -> str:
    where = ", ".join(f"'{place}'" for place in places)
    lines = [f"nothing to show: no finished run in {where}"]
    if found.failures:
        lines.append(f"  {len(found.failures)} failed; the first: {found.failures[0].error.splitlines()[0]}")
        lines.append(f"  again: {found.failures[0].command}")
    for path, why in found.skipped[:3]:
        lines.append(f"  skipped {path}: {why}")
    return "\n".join([*lines, _MAKE])
