"""The picture of `twilight calibrate p`: quality against p with what is allowed, and what each p keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import style

FAR = 8
"""An axis of perplexity shows so many times the allowed drop; what lies beyond has an arrow and its value."""


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw what `calibrate_p.calibrate` found, into a file whose suffix says its type."""
    measured = found["measured"]
    kept = [each for each in measured if each["tokens"]]
    with style.drawing():
        figure, axes = style.grid(2 if kept else 1, columns=1, width=6.4, height=2.9, sharex=True)
        _quality(axes[0], found, measured)
        if kept:
            _tokens(axes[1], kept, found["p"])
        for panel in axes:
            style.tidy(panel)
        axes[-1].set_xlabel("p")
        style.title(figure, _title(found))
        figure.savefig(path, dpi=150, metadata={"Software": None} if path.suffix.lower() == ".png" else None)


def limit(found: Mapping[str, Any]) -> float:
    """Return the worst quality that is allowed."""
    reference, allowed = found["reference"], found["allowed_drop"]
    return reference * (1 + allowed) if found["metric"] == "perplexity" else reference - allowed


def _quality(panel: Any, found: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> None:
    perplexity, worst, reference = found["metric"] == "perplexity", limit(found), found["reference"]
    blue, red = style.COLOURS[:2]
    panel.plot([each["p"] for each in measured], [each["quality"] for each in measured], color=blue, linewidth=1.5)
    for each in measured:
        good = each["drop"] <= found["allowed_drop"]
        panel.plot(each["p"], each["quality"], "o", color=blue, markerfacecolor=blue if good else "white", markersize=7)
    against = "dense" if found["against"] == "dense" else "not pruned"
    panel.axhline(reference, color="black", linewidth=1.2, linestyle=(0, (4, 3)), label=f"{against}: {reference:.4g}")
    panel.axhline(worst, color=red, linewidth=1.2, linestyle=":", label=f"allowed: {worst:.4g}")
    handles = [*panel.get_legend_handles_labels()[0], style.line(color=blue, marker="o", linestyle="", label="holds"),
               style.line(color=blue, marker="o", markerfacecolor="white", linestyle="", label="does not")]  # fmt: skip
    best = [each for each in measured if each["p"] == found["p"]]
    if best:
        handles.append(_mark(panel, best[0]["p"], best[0]["quality"]))
    better = "lower" if perplexity else "higher"
    panel.set_ylabel(f"{found['metric'] if perplexity else 'facts answered, share'}\n({better} is better)")
    if not perplexity:
        panel.set_ylim(-0.03, 1.05)
    else:
        _cut(panel, measured, reference, worst, blue)
    panel.legend(handles=handles, frameon=False, loc="upper right" if perplexity else "lower right")


def _cut(panel: Any, measured: Sequence[Mapping[str, Any]], reference: float, worst: float, colour: str) -> None:
    edge = reference + FAR * (worst - reference)
    beyond = [each for each in measured if each["quality"] > edge]
    if worst <= reference or not beyond:
        return
    lowest = min(reference, *(each["quality"] for each in measured))
    panel.set_ylim(lowest - 0.1 * (edge - lowest), edge)
    last = 0.0
    for each in beyond:
        panel.plot(each["p"], edge, marker=6, color=colour, markersize=8, clip_on=False)
        if each["p"] - last < 0.08:  # no room for another number
            continue
        last = each["p"]
        panel.annotate(f"{each['quality']:.4g}", (each["p"], edge), (9, -13), textcoords="offset points")


def _tokens(panel: Any, kept: Sequence[Mapping[str, Any]], best: float | None) -> None:
    green = style.COLOURS[2]
    panel.plot([each["p"] for each in kept], [each["tokens"] for each in kept], "s-", color=green, linewidth=1.5)
    style.token_axis(panel.yaxis, [each["tokens"] for each in kept])
    panel.set_ylabel("tokens a query head\nkeeps a step")
    for each in kept:
        if best is not None and each["p"] == best:
            _mark(panel, best, each["tokens"])
            fraction = each["kv_fraction"]
            said = f"p = {best:g}: {each['tokens']:.0f} tokens"
            said += "" if fraction is None else f", {100 * fraction:.1f} % of the KV bytes"
            # Tokens rise with p: this corner is empty.
            panel.text(0.02, 0.95, said, transform=panel.transAxes, va="top")


def _mark(panel: Any, p: float, value: float) -> Any:
    """Ring the p that was chosen, with a line down to it, and return the ring for a legend."""
    look = {"marker": "o", "markersize": 14, "markerfacecolor": "none", "markeredgewidth": 1.5, "color": "black"}
    panel.axvline(p, color="0.5", linewidth=1, zorder=0)
    panel.plot(p, value, linestyle="", **look)
    return style.line(linestyle="", label=f"p = {p:g}", **{**look, "markersize": 11})


def _title(found: Mapping[str, Any]) -> str:
    model = found["model"].get("path") or found["model"]["name"]
    drop = found["allowed_drop"]
    allowed = f"{100 * drop:.3g} %" if found["metric"] == "perplexity" else f"{drop:.3g}"
    against = "dense" if found["against"] == "dense" else "the same without pruning"
    what = f"{found['metric']} within {allowed} of {against}"
    answer = f"No p keeps {what}" if found["p"] is None else f"p = {found['p']:g} keeps {what}"
    return f"{answer}\n{Path(str(model)).name}, {found['selector']['name']}, budget {found['budget']['value']}"
