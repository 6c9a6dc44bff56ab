"""What is wrong with a command line's Hydra overrides, found before anything runs and said in one style.

Hydra itself says neither what was probably meant nor, in a sweep, that the last of its jobs cannot start.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Sweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twilight import arms, config, resources
from twilight.composing import Composer
from twilight.errors import TwilightError, UnknownNameError, did_you_mean, unknown_name
from twilight.registry import registry


class OverrideError(TwilightError, ValueError):
    """A command line that no configuration can be made of."""


def expand_budget(words: Sequence[str]) -> list[str]:
    """Spell ``budget=1024``, ``budget=0.25`` and lists of them as ``budget.value=…``; a name stays the choice it is."""
    expanded = []
    for word in words:
        key, _, value = word.partition("=")
        items = [item.strip() for item in value.split(",")]
        numbers = [item for item in items if _is_number(item)]
        if key == "budget" and numbers:
            if len(numbers) < len(items):
                raise OverrideError(f"budget={value}: expected numbers or choices, not both in one list")
            word = f"budget.value={value}"
        expanded.append(word)
    return expanded


@dataclass
class Checked:
    """A command line that configurations can be made of.

    Attributes:
        jobs: overrides of jobs that together have each value of each list at least once.
        configs: the configuration of each.
        settled: the command line's words without options of what is chosen job by job. Hydra composes a configuration
            before it makes jobs, in which an option of ``task=facts,fidelity`` is none.
    """

    jobs: list[list[str]]
    configs: list[DictConfig]
    settled: list[str]


def check(words: Sequence[str], **options: Any) -> list[DictConfig]:
    """Return the configurations that `examine` composes."""
    return examine(words, **options).configs


def examine(
    words: Sequence[str],
    *,
    multirun: bool,
    config_name: str | None = None,
    folders: Sequence[str] = (),
    verb: str = "decode",
    shown: bool = False,
) -> Checked:
    """Compose what the overrides ask for, in a sweep each value once, and build the objects that it names.

    Args:
        words: overrides, after `expand_budget`.
        multirun: whether lists are sweeps.
        config_name: another primary config than ours.
        folders: config folders that the user adds.
        verb: what to name in hints.
        shown: whether the configuration is to be looked at, not to be run.

    Raises:
        UnknownNameError: a group's choice or a key that is not there.
        OverrideError: anything else that Hydra refuses.
        ValueError, TypeError: a value that cannot be built from.
    """
    config.setup()
    directory = str(resources.folder("conf"))
    with config.search_path(folders), initialize_config_dir(directory, version_base="1.3", job_name="decode"):
        examiner = _Examiner(config_name or config.CONFIG_NAME, f"twilight {verb} --help")
        overrides = examiner.parse(words)
        multirun = multirun or any(each.input_line == "hydra.mode=MULTIRUN" for each in overrides)
        if not multirun:
            for override in overrides:
                if override.is_sweep_override():
                    again = "add -m to run each value" if verb == "decode" else "twilight sweep runs each value"
                    raise OverrideError(f"{override.input_line}: a list is a sweep; {again}")
        for override in overrides:
            examiner.check_choice(override)
        master = examiner.master(overrides)
        lists = arms.lists(master)
        if multirun and lists is not None:
            assert master is not None
            return examiner.sweep(master, overrides, *lists)
        if not multirun and not shown and lists and any(lists):
            said = next((word for word in words if word.startswith("experiment=")), "hydra.sweeper")
            raise OverrideError(f"{said}: a sweep, with lists of its own\n  twilight sweep {shlex.join(words)}")
        jobs = list(_jobs(overrides))
        return Checked(jobs, [examiner.compose(job) for job in jobs], list(words))


@dataclass
class _Examiner:
    """What composes and complains.

    Attributes:
        config_name: the primary configuration.
        help: the command that lists what there is.
    """

    config_name: str
    help: str

    def parse(self, words: Sequence[str]) -> list[Override]:
        loader = GlobalHydra.instance().config_loader()
        try:
            return OverridesParser.create(config_loader=loader).parse_overrides(list(words))
        except HydraException as error:
            said = str(error).partition("\n")[0]
            raise OverrideError(f"{said}\n  expected option=value, group=choice or a flag  ({self.help})") from error

    def check_choice(self, override: Override) -> None:
        group = override.key_or_group
        if override.is_delete() or override.package is not None or group not in _groups():
            return
        options = _options(group)
        for choice in _values(override):
            if choice not in options and choice != "null":
                if group == "selector":
                    raise registry().unknown_selector(choice)
                raise unknown_name(group, choice, options, see=self.help)

    def master(self, overrides: Sequence[Override]) -> DictConfig | None:
        """Compose what says how jobs are made, with Hydra's own part; None if that fails, which a job will explain."""
        for each in overrides:
            if each.key_or_group == "experiment" and each.is_sweep_override():
                raise OverrideError(f"{each.input_line}: an experiment is a sweep of its own, so give one at a time")
        choices = [each for each in overrides if each.key_or_group in _groups() or each.is_hydra_override()]
        words = [str(each.input_line) for each in choices if not each.is_sweep_override()]
        try:
            return compose(self.config_name, words, return_hydra_config=True)
        except (OmegaConfBaseException, HydraException, yaml.YAMLError):
            return None

    def sweep(
        self, master: DictConfig, given: list[Override], params: dict[str, Any], more: list[dict[str, Any]]
    ) -> Checked:
        """Check what our own sweeper makes jobs of, which leaves options out of those whose task has none such."""
        composer = Composer(GlobalHydra.instance().config_loader(), master)
        unsettled = arms.unsettled(given, params, more)
        options = [each for each in given if arms.is_option(each, any_type=True)]
        withheld = [each for each in options if arms.group(each) in unsettled]
        checked = Checked([], [], [str(each.input_line) for each in given if each not in withheld])
        bases: dict[int, DictConfig] = {}
        for part in arms.parts(given, params, more, self.parse):
            for job in _jobs(part.overrides):
                base = self._composed(composer.base, job, build=False)
                bases[id(base)] = base
                words = part.fitting(job, base)
                if words not in checked.jobs:
                    checked.jobs.append(words)
                    checked.configs.append(self._composed(composer.compose, words))
        for each in given:
            if arms.is_option(each) and not any(arms.has_option(base, each) for base in bases.values()):
                raise self._no_option(each.key_or_group, list(bases.values()))
        return checked

    def compose(self, job: list[str]) -> DictConfig:
        return self._composed(lambda words: compose(self.config_name, words), job)

    def _composed(self, make: Callable[[list[str]], DictConfig], job: list[str], *, build: bool = True) -> DictConfig:
        try:
            cfg = make(job)
            if build:
                config.build_selector(cfg)
                config.build_pruner(cfg, see=self.help)
                config.build_budget(cfg, see=self.help)
            return cfg
        except OmegaConfBaseException as error:
            raise OverrideError(_reason(error)) from error
        except yaml.YAMLError as error:
            where = " ".join(str(getattr(error, "problem_mark", None) or "").split())
            raise OverrideError(f"a config file is no YAML: {getattr(error, 'problem', error)} {where}") from error
        except HydraException as error:
            missing = str(getattr(error, "missing_cfg_file", ""))
            if missing.startswith("selector/"):  # the default's plugin may be disabled or broken
                raise registry().unknown_selector(missing.removeprefix("selector/")) from error
            self._check_keys(job)
            raise OverrideError(_reason(error)) from error

    def _check_keys(self, job: list[str]) -> None:
        """Raise if an override names a key that is not in the configuration that the job's choices make."""
        overrides = self.parse(job)
        words = [word for word, override in zip(job, overrides, strict=True) if override.key_or_group in _groups()]
        try:
            base = compose(self.config_name, words)
        except HydraException:  # then no key is to blame
            return
        keys = set(_keys(base))
        for override in overrides:
            key = override.key_or_group
            if override.is_add() or override.is_force_add() or key in _groups() or key.startswith("hydra"):
                continue
            if key not in keys:
                raise self._no_option(key, [base], words)

    def _no_option(self, key: str, bases: Sequence[DictConfig], words: Sequence[str] | None = None) -> UnknownNameError:
        """Return the error for a key that none of the configurations has, which words have made, or lists."""
        keys = list(dict.fromkeys(known for base in bases for known in _keys(base)))
        parent, _, leaf = key.rpartition(".")
        siblings = [known for known in keys if known.rpartition(".")[0] == parent] if parent else []
        if siblings:
            if words is None:
                words = [f"{parent}={OmegaConf.select(base, f'{parent}.name')}" for base in bases]
            chosen = " or ".join(dict.fromkeys(word for word in words if word.startswith(f"{parent}=")))
            near = did_you_mean(leaf, [known.rpartition(".")[2] for known in siblings])
            hint = near.replace("'", f"'{parent}.", 1)
        else:
            siblings, chosen = [*(known for known in keys if "." not in known), *_groups()], ""
            elsewhere = [known for known in keys if known.endswith(f".{key}")]
            hint = f" Did you mean '{elsewhere[0]}'?" if elsewhere else did_you_mean(key, [*keys, *_groups()])
        return UnknownNameError(
            f"no option '{key}'{f' with {chosen}' if chosen else ''}.{hint}\n"
            f"  options: {', '.join(dict.fromkeys(siblings))}  ({self.help})"
        )


def _jobs(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Yield overrides of jobs that together have each value of each sweep at least once."""
    values = [_strings(override) for override in overrides]
    yield [options[0] for options in values]
    for index, options in enumerate(values):
        for option in options[1:]:
            yield [option if at == index else others[0] for at, others in enumerate(values)]


def _strings(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key = override.get_key_element()
    found = [f"{key}={value}" for value in _values(override)]
    if not found:
        raise OverrideError(f"{override.input_line}: matches nothing of {', '.join(_options(override.key_or_group))}")
    return found


def _values(override: Override) -> list[str]:
    if override.is_discrete_sweep():
        return list(override.sweep_string_iterator())
    value = override.value()
    if isinstance(value, IntervalSweep):
        # For sweepers that draw from it; its ends stand for it here.
        return [str(value.start), str(value.end)]
    return [] if isinstance(value, (Sweep, list, dict)) else [override.get_value_element_as_str()]


def _groups() -> list[str]:
    return [group for group in GlobalHydra.instance().config_loader().list_groups("") if group != "hydra"]


def _options(group: str) -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options(group, results_filter=ObjectType.CONFIG)


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, node):
        yield f"{prefix}{key}"
        # Not resolved: an interpolation may need what only a running job has.
        value = None if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key) else node[key]
        if isinstance(value, DictConfig):
            yield from _keys(value, f"{prefix}{key}.")


def _reason(error: BaseException) -> str:
    """Return the first lines of an error and of its cause: what, and why."""
    lines = str(error).strip().split("\n")
    first = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).removeprefix("Error merging override ")
    cause = str(error.__cause__ or "").strip().partition("\n")[0]
    return f"{first}: {cause}" if cause and cause not in first else first


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE) is not None
