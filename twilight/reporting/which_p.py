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
    # Where no p holds, p = 1 alone was measured: one point would be a panel of nothing.
    kept = [each for each in measured if each["tokens"]] if found["p"] is not None else []
    with style.drawing():
        figure, axes = style.grid(2 if kept else 1, columns=1, width=6.4, height=2.9, sharex=True)
        _quality(axes[0], found, measured)
        if kept:
            _tokens(axes[1], kept, found["p"])
        for panel in axes:
            style.tidy(panel)
        axes[-1].set_xlabel("p")
        # Nothing keeps more than all.
        axes[-1].set_xlim(min(found["lowest_p"], *(each["p"] for each in measured)) - 0.02, 1.0)
        style.title(figure, _title(found))
        figure.savefig(path, dpi=150, metadata={"Software": None} if path.suffix.lower() == ".png" else None)


def limit(found: Mapping[str, Any]) -> float:
    """Return the worst quality that is allowed."""
    reference, allowed = found["reference"], found["allowed_drop"]
    return reference * (1 + allowed) if found["metric"] == "perplexity" else reference - allowed


def lost_text(metric: str, lost: float, sign: str = "") -> str:
    """Say a drop: of perplexity it is relative, of the share of facts absolute."""
    number = f"{100 * lost:{sign}.3g}"
    return f"{number} %" if metric == "perplexity" else f"{number} percentage point{'' if number == '1' else 's'}"


def quality_text(metric: str, quality: float) -> str:
    return f"{quality:.4f}" if metric == "perplexity" else f"{100 * quality:.1f} %"


def answer(found: Mapping[str, Any]) -> str:
    """Say in a sentence which p it is."""
    against = "dense" if found["against"] == "dense" else "the same without pruning"
    what = f"{found['metric']} within {lost_text(found['metric'], found['allowed_drop'])} of {against}"
    p = found["p"]
    if p is None:
        return f"no p keeps {what}"
    smallest = ", the smallest that is tried," if p == found["lowest_p"] else ""
    return f"p = {p:g}{smallest} keeps {what}"


def own_loss(found: Mapping[str, Any]) -> str:
    """Say what is lost without pruning, where no p holds."""
    lost = lost_text(found["metric"], found["measured"][-1]["drop"])
    return f"p = 1 itself loses {lost}: the selector's own loss"


def _quality(panel: Any, found: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> None:
    perplexity, worst, reference = found["metric"] == "perplexity", limit(found), found["reference"]
    blue, red = style.COLOURS[:2]
    panel.plot([each["p"] for each in measured], [each["quality"] for each in measured], color=blue, linewidth=1.5)
    good = {each["p"]: each["drop"] <= found["allowed_drop"] for each in measured}
    for each in measured:
        fill = blue if good[each["p"]] else "white"
        look = {"color": blue, "markerfacecolor": fill, "markersize": 7}
        panel.plot(each["p"], each["quality"], "o", **look, clip_on=each["p"] != 1)  # at the edge it is seen whole
    against = "dense" if found["against"] == "dense" else "not pruned"

    def said(value: float) -> str:
        return f"{value:.4g}" if perplexity else quality_text("facts", value)

    panel.axhline(reference, color="black", linewidth=1.2, linestyle=(0, (4, 3)), label=f"{against}: {said(reference)}")
    panel.axhline(worst, color=red, linewidth=1.2, linestyle=":", label=f"allowed: {said(worst)}")
    handles = list(panel.get_legend_handles_labels()[0])
    for holds, fill, label in ((True, blue, "holds"), (False, "white", "does not hold")):
        if holds in good.values():
            handles.append(style.line(color=blue, marker="o", markerfacecolor=fill, linestyle="", label=label))
    best = [each for each in measured if each["p"] == found["p"]]
    if best:
        handles.append(_mark(panel, best[0]["p"], best[0]["quality"]))
    better = "lower" if perplexity else "higher"
    panel.set_ylabel(f"{found['metric'] if perplexity else 'facts answered'}\n({better} is better)")
    if not perplexity:
        panel.set_ylim(-0.03, 1.05)
        panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    elif found["p"] is not None:
        _cut(panel, measured, reference, worst, blue)
    if found["p"] is None:  # then p = 1 alone was measured, at the right
        tries = "--against unpruned shows what pruning alone loses"
        tries += ";\na larger budget=… proposes more" if found["budget_used"] else ""
        panel.text(0.02, 0.5, f"{own_loss(found)}.\n{tries}", transform=panel.transAxes, va="center")
        panel.legend(handles=handles, frameon=False, loc="lower left" if perplexity else "upper left", ncols=3)
        return
    # The line of what is allowed may pass there.
    panel.legend(handles=handles, framealpha=1, edgecolor="none", loc="upper right" if perplexity else "lower right")


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
    panel.plot([each["p"] for each in kept], [each["tokens"] for each in kept], "s-", color=green, linewidth=1.5,
               clip_on=False)  # fmt: skip
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
    look["clip_on"] = False
    panel.axvline(p, color="0.5", linewidth=1, zorder=0)
    panel.plot(p, value, linestyle="", **look)
    return style.line(linestyle="", label=f"p = {p:g}", **{**look, "markersize": 11})


def _title(found: Mapping[str, Any]) -> str:
    model = found["model"].get("path") or found["model"]["name"]
    budget = f", budget {found['budget']['value']}" if found["budget_used"] else ""
    said = answer(found) if found["p"] is not None else answer(found).capitalize()
    return f"{said}\n{Path(str(model)).name}, {found['selector']['name']}{budget}"
