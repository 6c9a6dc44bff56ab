"""What a run is on disk: a folder named after its configuration, with ``result.json`` once it is finished.

The configuration that counts is what determines the result: the groups, not where files go, how much is shown, on which
device, or in which order the overrides came. Its hash ends the folder's name, so that a run is found again by what it
is. Files appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from twilight import parameters
from twilight.pruner import PRUNERS
from twilight.registry import registry

SCHEMA = 1
RESULT, ERROR, RUNNING = "result.json", "error.json", "running.json"
GROUPS = ("selector", "pruner", "budget", "model", "task")
NO_PART = {"model": ("device",), "task": ("json", "plot")}
"""Options that say where or how a run is done or shown, not what comes out."""
_ROOM = 60
"""Characters of a folder's name that a selector or a pruner has: file systems want no more than 255 for all of it."""


def run_config(cfg: DictConfig) -> dict[str, Any]:
    """Return what determines a run's result, resolved, as plain data.

    ``p`` is the pruner's, and None where the pruner has none: two values of it are then the same run.
    """
    config: dict[str, Any] = {}
    for group in GROUPS:
        # One by one: an option that is left out may name what only a running job has.
        values = {str(key): cfg[group][key] for key in cfg[group] if key not in NO_PART.get(group, ())}
        config[group] = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    config["task"].setdefault("name", "decode")
    return {"p": config["pruner"].get("p"), **config}


def config_hash(config: Mapping[str, Any]) -> str:
    """Return 12 hexadecimal digits of sha256 over `config` as canonical JSON."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_path(config: Mapping[str, Any]) -> str:
    """Return where a run lies under the folder of runs, such as ``facts/quest-top_p-p0.9-b0.25-1a2b3c4d5e6f``.

    Options of selector and pruner that are not the default stand behind their names, as far as there is room.
    """
    selector, pruner, budget = choices(config)
    path = config["model"].get("path")
    parts = [Path(path).name] if path else []
    parts += [selector[:_ROOM], pruner[:_ROOM]]
    parts += [] if config["p"] is None else [f"p{config['p']:g}"]
    parts.append(f"b{budget}")
    name = "-".join(re.sub(r"[^\w.+]+", "_", part).rstrip("_") for part in parts)
    return f"{config['task']['name']}/{name}-{config_hash(config)}"


def choices(config: Mapping[str, Any]) -> tuple[str, str, str]:
    """Name selector, pruner and budget so that two which differ do not look alike: ``oracle_topp (bits=2)``."""
    selector, pruner, budget = config["selector"], config["pruner"], config["budget"]
    options = selector_options(selector), pruner_options(pruner)
    first, second = (f"{each['name']} ({said})" if said else str(each["name"])
                     for each, said in zip((selector, pruner), options, strict=True))  # fmt: skip
    # A policy other than the one for all is named; fixed and fraction are told apart by their value.
    value = str(budget["value"])
    return first, second, value if budget["name"] in ("fixed", "fraction") else f"{budget['name']} {value}"


def selector_options(selector: Mapping[str, Any]) -> str:
    """Return the options of a selector that are not its defaults."""
    return _options(registry().selectors().get(selector["name"]), selector)


def pruner_options(pruner: Mapping[str, Any]) -> str:
    """Return the options of a pruner that are not its defaults, but for p."""
    return _options(PRUNERS.get(pruner["name"]), {name: value for name, value in pruner.items() if name != "p"})


def common_columns(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that every row of a run begins with."""
    selector, pruner, budget, model, task = (config[group] for group in GROUPS)
    return {
        "task": task["name"],
        "method": "twilight",
        "model": model.get("path") or model["name"],
        "model_revision": model.get("revision"),
        "selector": selector["name"],
        "selector_options": selector_options(selector),
        "budget": budget["name"],
        "budget_value": budget["value"],
        "pruner": pruner["name"],
        "pruner_options": pruner_options(pruner),
        "p": config["p"],
        "seed": task.get("seed"),
        "config_hash": config_hash(config),
    }


def read_result(folder: str | Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a run of `config` left in `folder`, None if it is not finished or is another's."""
    result = _read(Path(folder) / RESULT)
    known = result is not None and result.get("schema") == SCHEMA and result.get("config_hash") == config_hash(config)
    return result if known else None


def read_error(folder: str | Path) -> dict[str, Any] | None:
    """Return what a failed run left in `folder`, None if there is nothing."""
    return _read(Path(folder) / ERROR)


def clear(folder: str | Path, *names: str) -> None:
    """Remove files of a run that are there."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            (Path(folder) / name).unlink()


def write_json(path: Path, data: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write `data` to `path`, which afterwards is whole, or as it was before if the process dies here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's file is its owner's alone, and results are for others to read.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def sweep_order(configs: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the order to run `configs` in: what is dear to change stays longest, model first and p last.

    Values keep the order in which they first come.
    """
    seen: dict[str, int] = {}

    def rank(part: Any) -> int:
        return seen.setdefault(json.dumps(part, sort_keys=True), len(seen))

    def key(index: int) -> tuple[int, ...]:
        config = configs[index]
        pruner = {name: value for name, value in config["pruner"].items() if name != "p"}
        parts = (*(config[group] for group in ("model", "task", "selector", "budget")), pruner, config["p"])
        return tuple(rank((place, part)) for place, part in enumerate(parts))

    ranks = [key(index) for index in range(len(configs))]
    return sorted(range(len(configs)), key=ranks.__getitem__)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a network's file system may show a name before its content
        return None
    return data if isinstance(data, dict) else None


def _options(cls: type | None, values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in _changed(cls, values))


def _changed(cls: type | None, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    defaults = {} if cls is None else {each.name: each.default for each in parameters.parameters(cls)}
    for name, value in values.items():
        default = defaults.get(name, ...)
        if name != "name" and value != (list(default) if isinstance(default, tuple) else default):
            yield name, value
