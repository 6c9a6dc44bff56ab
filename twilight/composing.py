"""Composing the configurations of a sweep, many of which choose the same files."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig


class Composer:
    """Composes what `load_sweep_config` of Hydra's loader does, reading files once for each set of choices.

    Which files are read, and in which order, depends on the choices of groups alone; plain values are put in last.
    Hydra takes 70 ms a configuration, a copy and its values 5: 720 runs of 48 choices take 6 s instead of 50.
    """

    def __init__(self, loader: Any, master: DictConfig) -> None:
        self.loader, self.master = loader, master
        self.parser = OverridesParser.create(config_loader=loader)
        self.groups = set(loader.list_groups(""))
        self._parsed: dict[str, Override] = {}
        self._bases: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, words: Sequence[str]) -> DictConfig:
        """Return the configuration that the overrides of one job make."""
        overrides = [self._parse(word) for word in words]
        values = [each for each in overrides if self._is_value(each)]
        others = [word for word, each in zip(words, overrides, strict=True) if not self._is_value(each)]
        if any(not self._is_choice(self._parsed[word]) for word in others):
            # What adds or takes away may have to come after a value.
            return self.loader.load_sweep_config(self.master, list(words))
        cfg = copy.deepcopy(self._base(others))
        ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
        return cfg

    def base(self, words: Sequence[str]) -> DictConfig:
        """Return the configuration that the choices among the words make by themselves; not to be changed."""
        return self._base([word for word in words if self._is_choice(self._parse(word))])

    def _base(self, choices: Sequence[str]) -> DictConfig:
        if tuple(choices) not in self._bases:
            self._bases[tuple(choices)] = self.loader.load_sweep_config(self.master, list(choices))
        return self._bases[tuple(choices)]

    def _parse(self, word: str) -> Override:
        if word not in self._parsed:
            self._parsed[word] = self.parser.parse_override(word)
        return self._parsed[word]

    def _is_choice(self, override: Override) -> bool:
        return override.package is not None or "/" in override.key_or_group or override.key_or_group in self.groups

    def _is_value(self, override: Override) -> bool:
        plain = override.type is OverrideType.CHANGE and not override.is_sweep_override()
        return plain and not self._is_choice(override) and not override.is_hydra_override()
