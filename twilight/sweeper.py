"""Sweeps: a Hydra sweeper that orders its jobs, skips those that are finished, and tells what becomes of the others.

It works with any launcher, since it learns of runs by looking at their folders, which workers elsewhere write too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override, ValueType
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from twilight import arms, config, running, runs
from twilight.checks import check_positive
from twilight.composing import Composer
from twilight.errors import did_you_mean
from twilight.progress import Watch, print_summary
from twilight.ray_launcher import RayLauncher

NAMESPACE = arms.SWEEPER.rpartition(".")[0]


@dataclass
class Planned:
    """One run of a sweep.

    Attributes:
        overrides: what makes it.
        config: what determines its result.
        folder: where it lies.
        found: whether its selector was found by a glob rather than asked for by name.
    """

    overrides: list[str]
    config: dict[str, Any]
    folder: Path
    found: bool

    @property
    def name(self) -> str:
        """What to call it in a line."""
        return f"{self.folder.parent.name}/{self.folder.name}"


def register(words: Sequence[str] | None = None) -> None:
    """Tell Hydra of the sweeper, and it of the command line's `words`, and of the launcher for Ray.

    Hydra makes plugins of its own namespace only, and imports whatever package lies in it into every Hydra app of the
    environment. So the classes have a name in it, and no package is there.
    """
    ResumingSweeper.words = None if words is None else list(words)
    plugins = Plugins.instance()
    for cls in (ResumingSweeper, RayLauncher):
        plugins.register(cls)
        plugins.class_name_to_class[f"{NAMESPACE}.{cls.__name__}"] = cls


class ResumingSweeper(Sweeper):
    """Runs the product of all lists, or of each of `arms`, but for what is finished.

    Attributes:
        params: lists to sweep when the command line does not give the same option.
        arms: further lists, a mapping for each part of the sweep whose product is to be run by itself.
        rerun: run what is finished again.
        runs_per_job: so many runs of one model go to the launcher as one job.
        batch: the file with the other runs of a job; set for each job, not by users.
        words: the command line's overrides, where Hydra was not given all of them: it composes a configuration before
            there are jobs, in which an option of what each job chooses may be none.
    """

    words: ClassVar[list[str] | None] = None

    def __init__(
        self,
        params: Mapping[str, Any] | None = None,
        arms: Sequence[Mapping[str, Any]] | None = None,
        rerun: bool = False,
        runs_per_job: int = 1,
        batch: str | None = None,
    ) -> None:
        self.params = dict(params or {})
        self.arms = [dict(arm) for arm in arms or []]
        self.rerun = rerun
        self.runs_per_job = runs_per_job

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep.

        Raises:
            SystemExit: 1 if a run failed, 2 if the jobs cannot be made.
        """
        assert self.launcher is not None
        started = time.monotonic()
        try:
            check_positive("hydra.sweeper.runs_per_job", self.runs_per_job)
            plan = self.plan(arguments if self.words is None else self.words)
        except (*running.EXPECTED, HydraException, OmegaConfBaseException) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        todo = [each for each in plan if self.rerun or runs.read_result(each.folder, each.config) is None]
        for each in todo:
            runs.clear(each.folder, runs.RESULT, runs.ERROR, runs.RUNNING)
        watch = Watch(todo, skipped=len(plan) - len(todo))
        returned: Sequence[Any] = ()
        try:
            with watch:
                if todo:
                    returned = self.launcher.launch(self.jobs(todo), initial_job_idx=0)
        finally:
            print_summary(plan, watch, time.monotonic() - started)
        for job in returned:
            if job.status is JobStatus.FAILED:  # not the run, which `running.job` takes care of, but what is around it
                print(f"error: {job._return_value}", file=sys.stderr)
        if watch.failed or watch.lost:
            raise SystemExit(1)
        return [returned]

    def plan(self, arguments: Sequence[str]) -> list[Planned]:
        """Return the runs that the words make, each once, in the order to run them in."""
        assert self.config is not None
        composer = Composer(self.context.config_loader, self.config)
        planned: dict[str, Planned] = {}
        parse = composer.parser.parse_overrides
        given = [each for each in parse(list(arguments)) if not each.is_hydra_override()]
        for part in arms.parts(given, self.params, self.arms, parse):
            found = _found(part.overrides)
            (batch,) = BasicSweeper.split_arguments(part.overrides, None)
            for job in batch:
                each = self._planned(composer, part.fitting(job, composer.base(job)), found)
                planned.setdefault(str(each.folder), each)
        each_run = list(planned.values())
        return [each_run[index] for index in runs.sweep_order([each.config for each in each_run])]

    def jobs(self, todo: Sequence[Planned]) -> list[list[str]]:
        """Return the overrides of the launcher's jobs: those of a run, and where the others of its batch stand."""
        assert self.config is not None
        batches: list[list[Planned]] = []
        for each in todo:
            last = batches[-1] if batches else []
            if last and len(last) < self.runs_per_job and last[0].config["model"] == each.config["model"]:
                last.append(each)
            else:
                batches.append([each])
        jobs = []
        for first, *others in batches:
            words = list(first.overrides)
            if others:
                path = Path(self.config.hydra.sweep.dir).absolute() / ".batches" / f"{first.folder.name}.json"
                runs.write_json(path, [each.overrides for each in others])
                words.append(f"hydra.sweeper.batch='{path}'")
            jobs.append(words)
        return jobs

    def _planned(self, composer: Composer, job: list[str], found: bool) -> Planned:
        assert self.config is not None
        try:
            cfg = composer.compose(job)
            for build in (config.build_selector, config.build_pruner, config.build_budget):
                build(cfg)
            described = runs.run_config(cfg)
        except (*running.EXPECTED, HydraException, OmegaConfBaseException) as error:
            raise ValueError(f"{' '.join(job)}:\n  {str(error).partition(chr(10))[0]}") from error
        return Planned(job, described, Path(self.config.hydra.sweep.dir) / runs.run_path(described), found)


def _found(overrides: Sequence[Override]) -> bool:
    return any(
        override.key_or_group == "selector" and override.value_type is ValueType.GLOB_CHOICE_SWEEP
        for override in overrides
    )


def check_launcher(words: Sequence[str]) -> None:
    """Refuse a launcher whose package is not installed.

    Raises:
        MissingExtraError: what to install.
    """
    import importlib.util

    from twilight.errors import missing_extra

    needs = {
        "basic": "hydra",
        "joblib": "hydra_plugins.hydra_joblib_launcher",
        "submitit_slurm": "hydra_plugins.hydra_submitit_launcher",
        "submitit_local": "hydra_plugins.hydra_submitit_launcher",
        "ray": "ray",
    }
    for word in words:
        key, _, name = word.partition("=")
        if key != "hydra/launcher":
            continue
        if name not in needs:
            known = f"{did_you_mean(name, needs)}\n  known: {', '.join(needs)}  (docs/sweeps.md)"
            print(f"note: launcher '{name}' is none that twilight knows.{known}", file=sys.stderr)
            continue
        try:
            there = importlib.util.find_spec(needs[name]) is not None
        except ModuleNotFoundError:
            there = False
        if not there:
            raise missing_extra(needs[name].removeprefix("hydra_plugins."), "sweep", word)
