"""Which runs may share a curve: those of one setting.

A setting is all that quality and speed depend on beside what is compared (selector, budget, pruner, p, seed) and what
has an axis or a panel of its own (context, depth, batch): model and weights, text, versions, device, type, kernels,
options of the task.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from .collect import Run

_LISTS = {"options": "; ", "versions": ", "}
_ITSELF = ("text", "options", "versions", "device", "dtype")
"""Parts that are understood without their names."""
_NOT_OPTIONS = {"name", "seed", "json", "plot"}


@dataclass(frozen=True)
class Setting:
    """What has to be the same for two points to be compared; see the module. All are text, as they are shown."""

    task: str
    model: str
    revision: str
    weights: str
    text: str
    options: str
    dtype: str
    device: str
    kernels: str
    versions: str


def setting(run: Run, row: Mapping[str, Any], columns: Collection[str]) -> Setting:
    """Return the setting of a row of `run`, whose rows have `columns`."""
    about = run.provenance
    config = run.config.get("task") if isinstance(run.config.get("task"), dict) else {}
    assert isinstance(config, dict)
    # An option that rows have a column of has its own axis: `contexts: [4096, 8192]` beside `context`.
    options = {
        name: value
        for name, value in config.items()
        if name not in _NOT_OPTIONS and name not in columns and name.removesuffix("s") not in columns
    }
    model = run.config.get("model")
    if isinstance(model, dict):
        known = ("name", "path", "revision", "device", "dtype")
        options |= {f"model.{name}": value for name, value in model.items() if name not in known}
    return Setting(
        task=_text(row.get("task") or config.get("name")),
        model=_text(row.get("model")),
        revision=_text(about.get("model_revision") or row.get("model_revision")),
        weights=_text(about.get("model_hash"))[:12],
        text=_text(row.get("text")),
        options="; ".join(f"{name}={_text(value)}" for name, value in sorted(options.items())),
        dtype=_text(about.get("dtype")),
        device=_text(row.get("gpu") or about.get("device")),
        kernels=_text(about.get("kernels"))[:12],
        versions=", ".join(f"{name} {version}" for name, version in sorted(run.versions.items())),
    )


def texts_by_name(rows: Sequence[tuple[Setting, Mapping[str, Any]]]) -> dict[Setting, Setting]:
    """Return settings without the hash of their text, where it says no more than the other columns do.

    A longer context or another seed takes other parts of a text, whose hash is then another. They are no other setting
    as long as there is one hash for each context and seed.
    """
    hashes: dict[tuple[Any, ...], set[str]] = {}
    for one, values in rows:
        known = (replace(one, text=_name(one.text)), values.get("context"), values.get("seed"))
        hashes.setdefault(known, set()).add(one.text)
    several = {known[0] for known, found in hashes.items() if len(found) > 1}
    named = {one: replace(one, text=_name(one.text)) for one, _ in rows}
    return {one: one if name in several else name for one, name in named.items()}


def labels(settings: Iterable[Setting]) -> dict[Setting, str]:
    """Name each of `settings` by its model, text, type and device, and the parts in which they differ."""
    every = list(dict.fromkeys(settings))
    names = [each.name for each in fields(Setting) if each.name not in ("task", "model")]
    always = ("text", "dtype", "device")
    tasks = dict.fromkeys(each.task for each in every)
    # Options of two tasks always differ: their names say it in fewer words.
    sets = [[each for each in every if each.task == task] for task in tasks]
    differ = [
        name for name in names
        if name in always or any(len({getattr(each, name) for each in same}) > 1 for same in sets)
    ]  # fmt: skip
    found = {}
    for each in every:
        parts = [each.model or "no model"] + ([each.task] if len(tasks) > 1 else [])
        for name in differ:
            value = getattr(each, name)
            if name in _LISTS:
                value = _own(name, value, every)
            parts.append(value if name in _ITSELF else f"{name} {value or '?'}")
        found[each] = ", ".join(part for part in parts if part)
    return found


def differences(settings: Iterable[Setting]) -> dict[str, list[str]]:
    """Return what differs between `settings`, by its name, with the values; of lists the entries that not all have."""
    every = list(settings)
    values = {each.name: sorted({getattr(one, each.name) for one in every}) for each in fields(Setting)}
    return {
        name: [_own(name, value, every) for value in found] if name in _LISTS else found
        for name, found in values.items()
        if len(found) > 1 and name != "task"
    }


def describe(one: Setting) -> str:
    """Say a setting in full, on a line."""
    parts = [(each.name, getattr(one, each.name)) for each in fields(Setting) if each.name not in ("task", "model")]
    said = [value if name in _ITSELF else f"{name} {value}" for name, value in parts if value]
    return ", ".join([one.model or "no model", *said])


def _own(name: str, value: str, every: Iterable[Setting]) -> str:
    """Return the entries of a list that not all settings have."""
    others = [set(_parts(name, getattr(other, name))) for other in every]
    return ", ".join(part for part in _parts(name, value) if not all(part in other for other in others))


def _parts(name: str, value: str) -> list[str]:
    return value.split(_LISTS[name])


def _name(text: str) -> str:
    return re.sub(r" [0-9a-f]{12}$", "", text)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
