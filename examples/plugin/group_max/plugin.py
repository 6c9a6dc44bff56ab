"""What twilight calls: the entry point in pyproject.toml names this module."""

from __future__ import annotations

from group_max.selector import GroupMax
from twilight import hookimpl


@hookimpl
def twilight_register_selectors(register):
    register(GroupMax)


@hookimpl
def twilight_config_searchpath():
    # The options of `selector=group_max` are made of its fields; presets lie here.
    return ["pkg://group_max.conf"]
