"""What is wrong with a command line's Hydra overrides, found before anything runs and said in one style.

Hydra itself says neither what was probably meant nor, in a sweep, that the last of its jobs cannot start.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Sweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twilight import config, resources, runs
from twilight.errors import TwilightError, UnknownNameError, did_you_mean, unknown_name
from twilight.registry import registry

_HELP = "twilight decode --help"


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


def defer_options(words: Sequence[str]) -> list[str]:
    """Spell ``task.context=512`` as a list of one value, for a sweep.

    Hydra composes a configuration of what is not a list before it makes jobs. In it, ``task=facts,fidelity`` has not
    been chosen yet, and an option of theirs is none.
    """
    parser = OverridesParser.create()
    deferred = []
    for word in words:
        key, _, value = word.partition("=")
        group, _, option = key.partition(".")
        plain = group in runs.GROUPS and option and value and "${" not in value
        if plain and not parser.parse_override(word).is_sweep_override():
            word = f"{key}=choice({value})"
        deferred.append(word)
    return deferred


def check(
    words: Sequence[str], *, multirun: bool, config_name: str | None = None, folders: Sequence[str] = ()
) -> list[DictConfig]:
    """Compose what the overrides ask for, in a sweep each value once, and build the objects that it names.

    Args:
        words: overrides, after `expand_budget`.
        multirun: whether lists are sweeps.
        config_name: another primary config than ours.
        folders: config folders that the user adds.

    Returns:
        The configurations that were composed.

    Raises:
        UnknownNameError: a group's choice or a key that is not there.
        OverrideError: anything else that Hydra refuses.
        ValueError, TypeError: a value that cannot be built from.
    """
    config.setup()
    directory = str(resources.folder("conf"))
    with config.search_path(folders), initialize_config_dir(directory, version_base="1.3", job_name="decode"):
        overrides = _parse(words)
        if not multirun and not any(override.key_or_group == "hydra.mode" for override in overrides):
            for override in overrides:
                if override.is_sweep_override():
                    raise OverrideError(f"{override.input_line}: a list is a sweep; add -m to run each value")
        for override in overrides:
            _check_choice(override)
        return [_compose(job, overrides, config_name or config.CONFIG_NAME) for job in _jobs(overrides)]


def _parse(words: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()).parse_overrides(list(words))
    except HydraException as error:
        lines = str(error).splitlines()
        raise OverrideError(f"{lines[0]}\n  expected option=value, group=choice or a flag  ({_HELP})") from error


def _check_choice(override: Override) -> None:
    group = override.key_or_group
    if override.is_delete() or override.package is not None or group not in _groups():
        return
    options = _options(group)
    for choice in _values(override):
        if choice not in options and choice != "null":
            if group == "selector":
                raise registry().unknown_selector(choice)
            raise unknown_name(group, choice, options, see=_HELP)


def _compose(job: list[str], overrides: list[Override], config_name: str) -> DictConfig:
    try:
        cfg = compose(config_name, job)
        config.build_selector(cfg)
        config.build_pruner(cfg)
        config.build_budget(cfg)
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
        _check_keys(job, overrides, config_name)
        raise OverrideError(_reason(error)) from error


def _check_keys(job: list[str], overrides: list[Override], config_name: str) -> None:
    """Raise if an override names a key that is not in the configuration that the job's choices make."""
    groups = [word for word, override in zip(job, overrides, strict=True) if override.key_or_group in _groups()]
    try:
        keys = list(_keys(compose(config_name, groups)))
    except HydraException:  # then no key is to blame
        return
    for override in overrides:
        key = override.key_or_group
        if override.is_add() or override.is_force_add() or key in _groups() or key in keys or key.startswith("hydra"):
            continue
        parent, _, leaf = key.rpartition(".")
        siblings = [known for known in keys if known.rpartition(".")[0] == parent] if parent else []
        if siblings:
            chosen = next((word for word in groups if word.startswith(f"{parent}=")), "")
            near = did_you_mean(leaf, [known.rpartition(".")[2] for known in siblings])
            hint = near.replace("'", f"'{parent}.", 1)
        else:
            siblings, chosen = [*(known for known in keys if "." not in known), *_groups()], ""
            elsewhere = [known for known in keys if known.endswith(f".{key}")]
            hint = f" Did you mean '{elsewhere[0]}'?" if elsewhere else did_you_mean(key, [*keys, *_groups()])
        raise UnknownNameError(
            f"no option '{key}'{f' with {chosen}' if chosen else ''}.{hint}\n"
            f"  options: {', '.join(dict.fromkeys(siblings))}  ({_HELP})"
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
    first = str(error).strip().partition("\n")[0].removeprefix("Error merging override ")
    cause = str(error.__cause__ or "").strip().partition("\n")[0]
    return f"{first}: {cause}" if cause and cause not in first else first


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE) is not None
