"""The Hydra configuration: its types, the nodes that plugins bring, and what is built from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, DictConfig, OmegaConf

from twilight import parameters
from twilight.budget import UniformBudget
from twilight.budgets import POLICIES
from twilight.errors import unknown_name
from twilight.pruner import PRUNERS, Pruner
from twilight.registry import provider_name, registry
from twilight.selector import Selector

CONFIG_NAME = "config"
CONFIG_NAMES = {"decode": CONFIG_NAME, "run": "run", "sweep": "run"}
"""The primary configuration of each verb that Hydra serves."""
PROVIDER = "twilight-attn"


@dataclass
class ModelConfig:
    """Types of the group ``model``.

    Attributes:
        name: ``"tiny"`` or ``"hf"``.
        path: folder or hub name.
        dtype: ``"auto"``, ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        device: ``"auto"`` (a GPU if there is one), or a torch device.
        dense_layers: first layers that are left dense.
        revision: of a hub model.
        trust_remote_code: let a hub model run code of its own.
    """

    name: str = MISSING
    path: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    dense_layers: int = 2
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass
class DecodeConfig:
    """Types of ``task=decode``; ``conf/task/decode.yaml`` says what they mean."""

    prompt: str | None = None
    prompt_tokens: int = MISSING
    num_facts: int = MISSING
    max_new_tokens: int = MISSING
    seed: int = MISSING
    page_size: int = MISSING
    min_context: int = MISSING
    compare_dense: bool = MISSING
    json: str | None = None
    plot: str | None = None


@dataclass
class FactsConfig:
    """Types of ``task=facts``; ``conf/task/facts.yaml`` says what they mean, and so for the tasks below."""

    name: str = "facts"
    kinds: list[str] = MISSING
    context: int = MISSING
    num_facts: int = MISSING
    depths: list[float] | None = None
    samples: int = MISSING
    seed: int = MISSING
    max_new_tokens: int | None = None
    haystack: str | None = None
    data: dict[str, str | None] = field(default_factory=dict)
    compare_dense: bool = MISSING
    page_size: int = MISSING
    min_context: int = MISSING


@dataclass
class TextConfig:
    """What tasks over a text have in common."""

    text: str = MISSING
    text_split: str = MISSING
    text_column: str = MISSING
    text_subset: str | None = None
    context: int = MISSING
    windows: int = MISSING
    seed: int = MISSING
    page_size: int = MISSING
    min_context: int = MISSING


@dataclass
class PerplexityConfig(TextConfig):
    """Types of ``task=perplexity``."""

    name: str = "perplexity"
    positions: int = MISSING
    compare_dense: bool = MISSING


@dataclass
class FidelityConfig(TextConfig):
    """Types of ``task=fidelity``."""

    name: str = "fidelity"
    steps: int = MISSING
    every: int = MISSING
    layers: list[int] | None = None
    oracle_p: float | None = None


@dataclass
class LmEvalConfig:
    """Types of ``task=lm_eval``."""

    name: str = "lm_eval"
    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: int = MISSING
    max_length: int | None = None
    lengths: list[int] | None = None
    gen_kwargs: Any = None  # a mapping; were it typed as one, Hydra would take no key that is not there yet
    apply_chat_template: bool = MISSING
    seed: int = MISSING
    compare_dense: bool = MISSING
    page_size: int = MISSING
    min_context: int = MISSING


@dataclass
class SpeedConfig:
    """Types of ``task=speed``."""

    name: str = "speed"
    batch: int = MISSING
    context: int = MISSING
    heads: str = MISSING
    head_dim: int = MISSING
    page_size: int = MISSING
    repeats: int = MISSING
    bandwidth: float | None = None
    allow_cpu: bool = MISSING


@dataclass
class RootConfig:
    """Types of the top level. The groups bring their own."""

    p: float = MISSING
    selector: Any = MISSING
    budget: Any = MISSING
    pruner: Any = MISSING
    model: Any = MISSING
    task: Any = MISSING


TASK_CONFIGS: dict[str, type] = {
    "decode": DecodeConfig,
    "facts": FactsConfig,
    "fidelity": FidelityConfig,
    "lm_eval": LmEvalConfig,
    "perplexity": PerplexityConfig,
    "speed": SpeedConfig,
}
"""Types of each task's options, and the name of its file in ``conf/task``."""


def setup() -> None:
    """Tell Hydra what there is: our types, a node for each selector and pruner, and what plugins add."""
    store = ConfigStore.instance()
    _clear(store.repo)

    def add(name: str, node: Any, group: str | None = None, provider: str = PROVIDER) -> None:
        store.store(name=name, node=node, group=group, provider=provider)

    # Without a group, so that they are no one's choice in `--help` and `glob(*)`.
    add("twilight", RootConfig)
    for name, policy in POLICIES.items():
        add(f"twilight_budget_{name}", parameters.config_node(policy, name))
    add("twilight_model", ModelConfig)
    for name, node in TASK_CONFIGS.items():
        add(f"twilight_{name}", node)
    for name, pruner in PRUNERS.items():
        add(name, parameters.config_node(pruner, name, {"p": "${p}"}), group="pruner")
    for name, cls in registry().selectors().items():
        origin = registry().origin(name)
        add(name, parameters.config_node(cls, name), group="selector", provider=provider_name(origin))
    registry().register_configs(store)
    Plugins.instance().register(_SearchPath)


@contextlib.contextmanager
def search_path(extra: Sequence[str] = ()) -> Iterator[None]:
    """Let Hydra see the YAML configs of plugins, and of the folders `extra`, while it is ours to run."""
    _SearchPath.entries = [*registry().config_searchpath(), *(f"file://{folder}" for folder in extra)]
    try:
        yield
    finally:
        _SearchPath.entries = []


class _SearchPath(SearchPathPlugin):
    """Hydra applies it to every app in the process, so it is empty while another's runs."""

    entries: list[str] = []

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for entry in self.entries:
            search_path.append(provider=PROVIDER, path=entry)


def _clear(nodes: dict[str, Any]) -> None:
    """Remove what an earlier `setup` stored: a selector may have gone since."""
    for name, node in list(nodes.items()):
        if isinstance(node, dict):
            _clear(node)
            if not node:
                del nodes[name]
        elif (node.provider or "").startswith(PROVIDER):
            del nodes[name]


def build_selector(cfg: DictConfig) -> Selector:
    """Return the selector that ``cfg.selector`` describes."""
    values = _values(cfg, "selector")
    name = values.pop("name")
    cls = registry().get_selector(name)
    return registry().create_selector(name, **parameters.from_config(cls, values))


def build_pruner(cfg: DictConfig, *, see: str = "twilight decode --help") -> Pruner:
    """Return the pruner that ``cfg.pruner`` describes."""
    values = _values(cfg, "pruner")
    name = values.pop("name")
    if name not in PRUNERS:
        raise unknown_name("pruner", name, list(PRUNERS), see=see)
    cls = PRUNERS[name]
    return parameters.create(cls, f"pruner '{name}'", parameters.from_config(cls, values), see=see)


def build_budget(cfg: DictConfig, *, see: str = "twilight decode --help") -> UniformBudget:
    """Return the policy that ``cfg.budget`` describes."""
    values = _values(cfg, "budget")
    name = values.pop("name")
    if name not in POLICIES:
        raise unknown_name("budget", name, list(POLICIES), see=see)
    return parameters.create(POLICIES[name], f"budget '{name}'", values, see=see)


def _values(cfg: DictConfig, group: str) -> dict[str, Any]:
    node = OmegaConf.select(cfg, group)
    if not isinstance(node, DictConfig):
        raise ValueError(f"{group}: expected a choice of the group, such as {group}=NAME, got {node!r}")
    missing = [str(key) for key in node if OmegaConf.is_missing(node, key)]
    if missing:
        raise ValueError(f"{group}.{missing[0]}: needs a value, {group}.{missing[0]}=…")
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
