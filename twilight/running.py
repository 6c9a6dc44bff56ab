"""One run: a task, its result or its error on disk. What Hydra calls, in this process or in a launcher's workers."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from twilight import runs
from twilight.arms import SWEEPER
from twilight.errors import CalibrationError, TwilightError, UnsupportedModelError, unknown_name

EXPECTED = (TwilightError, ValueError, TypeError, OSError)
"""Errors of bad input: their message is the answer."""
NOT_APPLICABLE = (UnsupportedModelError, CalibrationError)
"""Errors that say that this does not go with that model."""

OmegaConf.register_new_resolver(
    "run_folder", lambda *, _root_: runs.run_path(runs.run_config(_root_)), replace=True, use_cache=False
)  # fmt: skip


def job(cfg: DictConfig) -> None:
    """Run what Hydra composed, and what the sweeper has put behind it to be run by the same process.

    Raises:
        SystemExit: a single run that failed, after it has been told.
    """
    hydra = HydraConfig.get()
    overrides = [str(word) for word in hydra.overrides.task]
    _run(cfg, Path(hydra.runtime.output_dir), overrides)
    if not hydra.sweeper.get("batch"):
        return
    for words in json.loads(Path(hydra.sweeper.batch).read_text(encoding="utf-8")):
        cfg = compose(hydra.job.config_name, words)
        folder = Path(hydra.sweep.dir) / runs.run_path(runs.run_config(cfg))
        _run(cfg, folder, words)


def _run(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    hydra = HydraConfig.get()
    config = runs.run_config(cfg)
    alone = hydra.mode != RunMode.MULTIRUN
    # The sweeper looks at the folder and says itself what became of the run.
    tell = alone or hydra.sweeper._target_ != SWEEPER
    result = None if hydra.sweeper.get("rerun") and alone else runs.read_result(folder, config)
    if result is not None:
        if tell:
            print(f"finished before: {folder / runs.RESULT}\n  --rerun runs it again", file=sys.stderr)
        return
    if hydra.runtime.choices.get("hydra/launcher") == "joblib":
        _take_gpu()
    error = execute(cfg, config, folder, overrides)
    if error is None:
        if tell:
            print(folder / runs.RESULT, file=sys.stderr)
        return
    if tell:
        if isinstance(error, EXPECTED) and os.environ.get("TWILIGHT_DEBUG", "") in ("", "0"):
            print(f"error: {error}\n  where it was raised: {folder / runs.ERROR}", file=sys.stderr)
        else:
            traceback.print_exception(error)
    if alone:
        raise SystemExit(1)


def execute(cfg: DictConfig, config: Mapping[str, Any], folder: Path, overrides: Sequence[str]) -> Exception | None:
    """Run a task and write ``result.json`` or ``error.json`` into `folder`; return the error."""
    folder.mkdir(parents=True, exist_ok=True)
    runs.clear(folder, runs.RESULT, runs.ERROR)
    digest = runs.config_hash(config)
    head = {"schema": runs.SCHEMA, "config": config, "config_hash": digest, "overrides": list(overrides)}
    started, clock = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
    marker = {"config_hash": digest, "host": socket.gethostname(), "pid": os.getpid(), "started": started}
    runs.write_json(folder / runs.RUNNING, marker)
    try:
        done = task_module(config["task"]["name"]).run(cfg)
        about = {**provenance(cfg), "started": started, "seconds": time.perf_counter() - clock}
        columns = {**runs.common_columns(config), "model_revision": about["model_revision"]}
        rows = [{**columns, **row} for row in done.rows]
        tables = {name: [{**columns, **row} for row in table] for name, table in done.tables.items()}
        runs.write_json(folder / runs.RESULT, {**head, "provenance": about, "rows": rows, "tables": tables})
        return None
    except Exception as error:
        about = {
            "error": f"{type(error).__name__}: {error}",
            "not_applicable": isinstance(error, NOT_APPLICABLE),
            "traceback": "".join(traceback.format_exception(error)),
        }
        runs.write_json(folder / runs.ERROR, {**head, **about})
        return error
    finally:
        runs.clear(folder, runs.RUNNING)


def task_module(name: str) -> Any:
    """Import the task called `name`.

    Raises:
        UnknownNameError: there is none.
    """
    from twilight.registry import registry
    from twilight.tasks import TASKS

    registry().selectors()  # loads plugins, which may bring tasks
    if name not in TASKS:
        raise unknown_name("task", name, list(TASKS), see="twilight run --help")
    return importlib.import_module(TASKS[name])


def gpu_of_worker(name: str, visible: Sequence[str]) -> str | None:
    """Return which of the `visible` GPUs a process called `name` is to use: they take turns by its number."""
    number = name.rpartition("-")[2]
    return visible[(int(number) - 1) % len(visible)] if visible and number.isdecimal() else None


def _take_gpu() -> None:
    """Leave this worker of joblib one GPU, before it has looked at any."""
    import multiprocessing

    import torch

    if torch.cuda.is_initialized() or os.environ.get("TWILIGHT_WORKER_GPU"):
        return
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = listed.split(",") if listed else [str(index) for index in range(torch.cuda.device_count())]
    gpu = gpu_of_worker(multiprocessing.current_process().name, visible)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["TWILIGHT_WORKER_GPU"] = gpu


def provenance(cfg: DictConfig) -> dict[str, Any]:
    """Return what a result depends on beside its configuration: versions, device, type, kernels, the model's commit."""
    from twilight import kernels, loading
    from twilight.report import versions

    found: dict[str, Any] = {"versions": versions(), "device": "cpu", "dtype": None, "kernels": None}
    found |= {"model_revision": cfg.model.get("revision"), "model_hash": None}
    if not loading.load_model.cache_info().currsize:  # a task without a model
        return found
    options = OmegaConf.to_container(cfg.model, resolve=True)
    assert isinstance(options, dict)
    options.pop("dense_layers", None)
    loaded = loading.load_model(**{str(key): value for key, value in options.items()})
    found["dtype"] = str(loaded.model.dtype).removeprefix("torch.")
    found["model_revision"] = getattr(loaded.model.config, "_commit_hash", None) or found["model_revision"]
    found["model_hash"] = loading.model_hash(loaded.path)
    if loaded.model.device.type == "cuda":
        import torch

        found["device"] = torch.cuda.get_device_name(loaded.model.device)
        found["kernels"] = kernels.source_hash()
    return found
