"""One HTML page that needs nothing beside it: pictures inside, a table that sorts, commands, versions, failures."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .collect import Collected, Failure
from .metrics import Metric, number
from .settings import Setting, describe
from .style import Picture
from .table import Merged, Row

MOST_ROWS = 2000
"""Rows of a table on the page; a browser sorts so many at once. All of them are in the CSV."""

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:78rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.7rem}h2{font-size:1.3rem;margin-top:2.4rem;border-bottom:1px solid #ccc}
figure{margin:1.5rem 0}figure img{max-width:100%;height:auto}figcaption{color:#444;max-width:60rem}
.scroll{overflow:auto;max-height:36rem;border:1px solid #ccc}table{border-collapse:collapse;font-size:.85rem}
th,td{padding:.25rem .6rem;text-align:left;white-space:nowrap;border-bottom:1px solid #eee}
td.n{text-align:right;font-variant-numeric:tabular-nums}
th{position:sticky;top:0;background:#f2f2f2}th button{all:unset;cursor:pointer;font-weight:600}
th button:focus-visible{outline:2px solid #0072b2}th[aria-sort=ascending] button:after{content:" \\2191"}
th[aria-sort=descending] button:after{content:" \\2193"}
tr.flag td{background:#fff3d6}.note{border-left:4px solid #e69f00;padding:.2rem 1rem;background:#fff8e8}
pre,code{font:.85rem ui-monospace,monospace}pre{background:#f6f6f6;padding:.6rem;overflow:auto}
input{font:inherit;padding:.2rem .5rem;margin:.4rem 0;width:24rem;max-width:100%}
"""

_SCRIPT = """
document.querySelectorAll('table.sort').forEach(function (table) {
  var body = table.tBodies[0], heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach(function (head, column) {
    head.firstChild.onclick = function () {
      var up = head.getAttribute('aria-sort') !== 'ascending', sign = up ? 1 : -1;
      heads.forEach(function (other) { other.removeAttribute('aria-sort'); });
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      var key = function (row) { var c = row.cells[column]; return 'v' in c.dataset ? +c.dataset.v : c.textContent; };
      Array.from(body.rows).map(function (row) { return [key(row), row]; }).sort(function (a, b) {
        if (a[0] === '' || b[0] === '') return (a[0] === '') - (b[0] === '');  // nothing comes last, both ways
        if (typeof a[0] === typeof b[0]) return sign * (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0);
        return typeof a[0] === 'number' ? -1 : 1;
      }).forEach(function (pair) { body.appendChild(pair[1]); });
    };
  });
  var box = table.parentNode.previousElementSibling;
  if (box && box.tagName === 'INPUT') box.oninput = function () {
    var words = box.value.toLowerCase().split(/\\s+/);
    Array.from(body.rows).forEach(function (row) {
      var text = row.textContent.toLowerCase();
      row.hidden = !words.every(function (word) { return text.includes(word); });
    });
  };
});
"""


def page(
    found: Collected,
    merged: Merged,
    pictures: Sequence[Picture],
    folder: Path,
    *,
    notes: Sequence[str],
    flags: Sequence[str],
    changed: Sequence[Row] | None,
    command: str,
    versions: Mapping[str, str],
) -> str:
    """Return the page.

    Args:
        folder: where `style.save` has put the pictures.
        notes: what a reader has to know before looking: what was left out, replaced, or kept apart.
        flags: points and rows that are better than dense by more than their error bars.
        changed: rows whose quality differs from the baseline's; None without a baseline.
        command: what made the report.
        versions: of what made it.
    """
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Twilight: {len(found.runs)} runs</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_plural(len(found.runs), 'run')}, {_plural(len(merged.rows), 'row')}</h1>",
        _list(notes),
        _flags(flags),
        _changed(changed, merged.metrics) if changed is not None else "",
        *(_figure(picture, folder) for picture in pictures),
        *_tables(merged),
        _failures(found.failures),
        _runs(found),
        _settings({row.setting for row in merged.rows}),
        f"<h2>This report</h2><pre>{_escape(command)}</pre>",
        f"<p>{_escape(', '.join(f'{name} {version}' for name, version in versions.items()))}</p>",
        f"<script>{_SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _figure(picture: Picture, folder: Path) -> str:
    data = base64.b64encode((folder / f"{picture.stem}.svg").read_bytes()).decode()
    name, width = _escape(picture.title), round(96 * picture.figure.get_size_inches()[0])
    return (
        f"<h2 id='{_escape(picture.stem)}'>{name}</h2><figure>"
        f"<img alt='{name}' width={width} src='data:image/svg+xml;base64,{data}'>"
        f"<figcaption>{_escape(picture.caption)}</figcaption></figure>"
    )


def _flags(flags: Sequence[str]) -> str:
    if not flags:
        return ""
    return (
        "<h2>Better than dense: to be checked</h2><div class=note><p>Sparse attention approximates dense attention. "
        "Where it comes out ahead by more than both error bars, chance, a baseline that is handicapped (a wrong chat "
        "template, a lost token), or a question that rewards forgetting is likelier than a gain. Of values that are as "
        f"good as dense, one in forty is flagged by chance.</p>{_list(flags)}</div>"
    )


def _changed(changed: Sequence[Row], every: Sequence[Metric]) -> str:
    if not changed:
        return "<h2>Against the baseline</h2><p>No quality has changed.</p>"
    columns = ["task", "selector", "pruner", "budget", "budget_value", "p", "kind", "context", "depth", "config_hash"]
    columns += [f"{prefix}{each.column}" for each in every for prefix in ("baseline_", "", "change_")]
    unique = list({id(row): row for row in changed}.values())
    return f"<h2>Against the baseline</h2>{_table(unique, list(dict.fromkeys(columns)))}"


def _tables(merged: Merged) -> list[str]:
    parts = []
    for task in dict.fromkeys(row.values.get("task") for row in merged.rows):
        rows = [row for row in merged.rows if row.values.get("task") == task]
        parts.append(f"<h2>Rows: {_escape(str(task))}</h2>{_table(rows, merged.columns())}")
    return parts


def _table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return a table of what differs; what all rows share is said once above it."""
    used = [name for name in columns if any(row.values.get(name) not in (None, "") for row in rows)]
    same = [name for name in used if len(rows) > 1 and len({str(row.values.get(name)) for row in rows}) == 1]
    shown = [name for name in used if name not in same]
    above = ", ".join(f"{name} {_shown(rows[0].values[name])}" for name in same)
    more = f"<p>The first {MOST_ROWS} of {len(rows)}: the others are in rows.csv.</p>" if len(rows) > MOST_ROWS else ""
    head = "".join(f"<th><button>{_escape(name)}</button></th>" for name in shown)
    body = "".join(
        f"<tr{' class=flag' if row.values.get('flag') else ''}>"
        f"{''.join(_cell(row.values.get(name)) for name in shown)}</tr>"
        for row in rows[:MOST_ROWS]
    )
    return (
        (f"<p>In all rows: {_escape(above)}.</p>" if above else "")
        + more
        + "<input placeholder='show rows with these words' aria-label='show rows with these words'>"
        + f"<div class=scroll><table class=sort><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    found = number(value)
    if found is None:
        return f"<td>{_escape(_shown(value))}</td>"
    return f"<td class=n data-v={found!r}>{_escape(_shown(value))}</td>"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _failures(failures: Sequence[Failure]) -> str:
    if not failures:
        return ""
    parts = [f"<h2>Failed: {len(failures)}</h2>"]
    for each in failures:
        since = ", and a run of the same configuration has finished" if each.finished_since else ""
        kind = "not applicable" if each.not_applicable else "failed"
        parts.append(
            f"<details><summary>{kind}{since}: <code>{_escape(each.command)}</code><br>{_escape(each.error)}</summary>"
            f"<pre>{_escape(each.traceback)}</pre><p>{_escape(str(each.path))}</p></details>"
        )
    return "".join(parts)


def _runs(found: Collected) -> str:
    lines = "".join(
        f"<tr><td><code>{_escape(run.config_hash)}</code></td><td><code>{_escape(run.command)}</code></td>"
        f"<td>{_escape(str(run.provenance.get('started') or ''))}</td>{_cell(number(run.provenance.get('seconds')))}"
        f"<td>{_escape(str(run.path))}</td></tr>"
        for run in found.runs
    )
    head = "".join(f"<th><button>{name}</button></th>" for name in ("hash", "command", "started", "seconds", "file"))
    inner = f"<table class=sort><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>" if found.runs else ""
    files = [
        f"{path}: {len(data['cells'])} cells of twilight bench, {data.get('gpu')}" for path, data in found.benchmarks
    ]
    return f"<h2>Runs and their commands</h2>{f'<div class=scroll>{inner}</div>' if inner else ''}{_list(files)}"


def _settings(settings: Iterable[Setting]) -> str:
    lines = sorted(f"{each.task}: {describe(each)}" for each in settings)
    about = "Models, texts, versions and hashes; only runs of one line share a curve."
    return f"<h2>Settings</h2><p>{about}</p>{_list(lines)}"


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _escape(text: str) -> str:
    # Control characters, such as a terminal's colours in a traceback, are not HTML.
    return html.escape(re.sub(r"\x1b\[[0-9;]*m|[\x00-\x08\x0b-\x1f]", "", text))
