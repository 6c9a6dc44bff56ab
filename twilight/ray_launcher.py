"""A Hydra launcher for Ray: a fixed set of actors, each a process that keeps its model from run to run.

hydra-ray-launcher asks for boto3 and an old cloudpickle, and starts a Ray task for each run, which promises nothing
about the process that it lands in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from twilight.errors import missing_extra


class RayLauncher(Launcher):
    """Runs jobs in `workers` Ray actors.

    Attributes:
        workers: how many.
        init: arguments of ``ray.init``, such as ``{"address": "auto"}`` for a cluster that is running.
        remote: what each actor takes, such as ``{"num_gpus": 1}``.
    """

    def __init__(
        self, workers: int = 1, init: Mapping[str, Any] | None = None, remote: Mapping[str, Any] | None = None
    ) -> None:
        if workers < 1:
            raise ValueError(f"hydra.launcher.workers: expected at least 1, got {workers}")
        self.workers, self.init, self.remote = workers, _plain(init), _plain(remote)

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        try:
            import ray
            from ray.util import ActorPool
        except ImportError as error:
            raise missing_extra("ray", "sweep", "hydra/launcher=ray") from error
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        ours = not ray.is_initialized()
        if ours:
            ray.init(**self.init)
        try:
            # The singletons know the configs that plugins have stored; the state is shared by all jobs.
            shared = ray.put((self.context, self.config, self.task_function, Singleton.get_state()))
            actor = ray.remote(**self.remote)(_Worker) if self.remote else ray.remote(_Worker)
            count = min(self.workers, len(job_overrides))
            pool = ActorPool([actor.remote(shared) for _ in range(count)])
            jobs = [(list(words), initial_job_idx + index) for index, words in enumerate(job_overrides)]
            return list(pool.map(lambda worker, job: worker.run.remote(*job), jobs))
        finally:
            if ours:
                ray.shutdown()


class _Worker:
    """One process: it composes its jobs itself, as Hydra's other launchers do."""

    def __init__(self, shared: Any) -> None:
        self.context, self.config, self.task_function, state = shared
        setup_globals()
        Singleton.set_state(state)

    def run(self, overrides: list[str], number: int) -> JobReturn:
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        return run_job(
            hydra_context=self.context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def _plain(values: Mapping[str, Any] | None) -> dict[str, Any]:
    plain = OmegaConf.to_container(values, resolve=True) if isinstance(values, DictConfig) else dict(values or {})
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
