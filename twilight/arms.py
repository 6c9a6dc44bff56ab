"""What a sweep is the product of: the command line's words, and the lists that its configuration brings.

`hydra.sweeper.params` and `arms` are overrides for what the command line does not say. An arm is a part of the sweep
whose product is made by itself, so that one may sweep a task's options without another having them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from twilight import runs

SWEEPER = "hydra_plugins.twilight.ResumingSweeper"
"""What Hydra calls `twilight.sweeper.ResumingSweeper`."""
SUBDIR = "${run_folder:}"
"""The folder of a run, in the configuration's words."""


@dataclass
class Part:
    """Overrides whose product is made by itself: those of the configuration first, so that the others win.

    Attributes:
        optional: for each, whether jobs are made without it that have no such option.
    """

    overrides: list[Override]
    optional: list[bool]

    def fitting(self, job: Sequence[str], chosen: DictConfig) -> list[str]:
        """Return the words of `job`, one of each override, without those that its choices have no option for.

        Args:
            chosen: the configuration that the job's choices make.
        """
        each = zip(job, self.overrides, self.optional, strict=True)
        return [word for word, override, optional in each if not optional or has_option(chosen, override)]


def parts(
    given: Sequence[Override],
    params: Mapping[str, Any],
    arms: Sequence[Mapping[str, Any]],
    parse: Callable[[list[str]], list[Override]],
) -> list[Part]:
    """Return the parts of a sweep: one for each arm that makes a choice of the command line's.

    A choice of the command line's that no arm makes replaces theirs, and their options for another choice go with it.

    Args:
        given: the command line's overrides.
        params, arms: the configuration's.
        parse: what makes overrides of words.
    """
    chosen = {override.key_or_group: choices(override) for override in given if is_choice(override)}
    lists = [parse([f"{key}={as_word(value)}" for key, value in {**params, **arm}.items()]) for arm in arms or [{}]]
    lists = [each for each in lists if all(_agrees(override, chosen) for override in each)] or lists
    found = []
    for each in lists:
        # Of several overrides of a key the last counts, at the place of the first: the command line's, that is.
        merged = {one.get_key_element(): (one, is_option(one) and group(one) in chosen) for one in each}
        merged |= {one.get_key_element(): (one, is_option(one) and group(one) == "task") for one in given}
        found.append(Part([one for one, _ in merged.values()], [optional for _, optional in merged.values()]))
    return found


def lists(master: DictConfig | None) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Return `params` and `arms` of a configuration, None if another sweeper than ours makes its jobs.

    Raises:
        ValueError: a folder for each run that is not named after it, and in which ours would not find it.
    """
    if master is None or master.hydra.sweeper.get("_target_") != SWEEPER:
        return None
    subdir = OmegaConf.to_container(master.hydra.sweep)["subdir"]  # type: ignore[index, call-overload]
    if subdir != SUBDIR:
        raise ValueError(
            f"hydra.sweep.subdir={subdir}: a sweep names each run's folder after it, to find what is finished\n"
            "  --out DIR says where the folders lie"
        )
    sweeper = OmegaConf.to_container(master.hydra.sweeper)
    assert isinstance(sweeper, dict)
    return sweeper.get("params") or {}, sweeper.get("arms") or []


def unsettled(given: Sequence[Override], params: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the groups that are chosen job by job, so that nothing can be said of their options before."""
    listed = {key for each in (params, *arms) for key in each}
    return (listed | {each.key_or_group for each in given if each.is_sweep_override()}) & set(runs.GROUPS)


def group(override: Override) -> str:
    """Return the first part of an override's key."""
    return override.key_or_group.partition(".")[0]


def is_choice(override: Override) -> bool:
    """Say whether it chooses of a group, one or several."""
    return override.type is OverrideType.CHANGE and override.package is None and override.key_or_group in runs.GROUPS


def is_option(override: Override, *, any_type: bool = False) -> bool:
    """Say whether it gives a value to an option of a group's choice, or with `any_type` adds or deletes one."""
    of_group = "." in override.key_or_group and group(override) in runs.GROUPS
    return of_group and (any_type or override.type is OverrideType.CHANGE)


def has_option(chosen: DictConfig, override: Override) -> bool:
    """Say whether the choice that an option is for has it."""
    name, _, option = override.key_or_group.partition(".")
    return isinstance(chosen.get(name), DictConfig) and option.partition(".")[0] in chosen[name]


def choices(override: Override) -> set[str]:
    """Return what of a group an override chooses."""
    if override.is_discrete_sweep():
        return set(override.sweep_string_iterator())
    return {override.get_value_element_as_str()}


def as_word(value: Any) -> str:
    """Write a YAML value as what stands behind ``=`` on a command line; text is that already."""
    return value if isinstance(value, str) else Override._get_value_element_as_str(_quoted(value))


def _quoted(value: Any) -> Any:
    value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    if isinstance(value, Mapping):  # keys cannot be quoted
        return {str(key): _quoted(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_quoted(each) for each in value]
    return QuotedString(value, Quote.single) if isinstance(value, str) else value


def _agrees(override: Override, chosen: Mapping[str, set[str]]) -> bool:
    """Say whether a choice of the configuration's is among those of the command line, if that makes any."""
    mine = chosen.get(override.key_or_group) if is_choice(override) else None
    return mine is None or not mine.isdisjoint(choices(override))
