"""A model with Twilight attached, and the contexts that it has read.

Runs of a sweep that differ in p or in the pruner share both: a context is read once, and every run decodes on from it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from twilight.config import build_budget, build_pruner, build_selector
from twilight.errors import UnsupportedModelError
from twilight.evaluation.reading import Reading
from twilight.loading import LoadedModel, load_model
from twilight.pruner import Pruner

Step = Callable[[torch.Tensor], torch.Tensor]
"""Decodes one token of each sequence: `[b]` int64 ids to `[b, vocab]` logits, which the next step may overwrite."""

DENSE, TWILIGHT = "dense", "twilight"
_CPU_BYTES = 2 << 30
"""Of caches that are kept on a CPU; on a GPU a quarter of its memory."""
_NEVER_SPARSE = 1 << 30


class Session:
    """Decodes on from contexts, sparsely or densely.

    Caches are made under `torch.no_grad`: tensors of the inference mode could not be written to by captured steps.

    Args:
        loaded: the model.
        handle: what `twilight.attach` returned for it, with stats.
    """

    def __init__(self, loaded: LoadedModel, handle: Any) -> None:
        self.loaded, self.model, self.handle = loaded, loaded.model, handle
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    @torch.no_grad()
    def read(self, tokens: torch.Tensor) -> Any:
        """Return a cache that holds contexts, `[b, n]` token ids, attended to densely. Decode on from it in a `branch`.

        It is kept while there is room, the longest unused going first.
        """
        attention = self.handle.attention
        content = tokens.cpu().numpy()
        key = (content.shape, content.tobytes(), attention.pruner.metadata(self.handle.geometry))
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        _say(f"reads {tokens.numel():,} tokens")
        cache = self.handle.cache()
        self.model(tokens.to(self.model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._kept[key] = cache
        room = _room(self.model.device)
        sizes = {each: sum(kept.paged.nbytes().values()) for each, kept in self._kept.items()}
        while len(self._kept) > 1 and sum(sizes[each] for each in self._kept) > room:
            self._kept.popitem(last=False)
        return cache

    @contextlib.contextmanager
    def branch(self, cache: Any, repeats: int = 1) -> Iterator[None]:
        """Do as `TwilightCache.branch`, and forget the cache if that ends in an error."""
        try:
            with cache.branch(repeats):
                yield
        except BaseException:
            self._kept = OrderedDict((key, kept) for key, kept in self._kept.items() if kept is not cache)
            raise

    @contextlib.contextmanager
    def steps(self, cache: Any, count: int, *, capture: bool = True) -> Iterator[Step]:
        """Yield what decodes `count` tokens of each sequence, one a call: on a GPU by captured steps where that works.

        An observer sees all steps only if they are not captured.
        """
        if capture and self.model.device.type == "cuda":
            try:
                captured = self.handle.capture(cache, max_new_tokens=count)
            except UnsupportedModelError:
                pass  # a sliding window, say: the same steps, launched one by one
            else:
                with captured:
                    yield _counted(lambda ids: captured(ids)[:, -1], count)
                return
        with torch.no_grad():
            yield _counted(eager(self.model, cache), count)

    @contextlib.contextmanager
    def measuring(self, method: str, pruner: Pruner | None = None) -> Iterator[Reading]:
        """Meanwhile decode by `method`, and yield what will hold what was read, once that is over.

        Args:
            method: ``"twilight"`` or ``"dense"``: every layer attends to everything, over the same pages.
            pruner: in place of the attention's own.
        """
        attention, reading = self.handle.attention, Reading()
        before = attention.pruner, attention.min_context
        if pruner is not None:
            attention.pruner = pruner
        if method == DENSE:
            attention.min_context = _NEVER_SPARSE
        try:
            with attention.stats.aside() as records:
                yield reading
            reading.add(records)
        finally:
            attention.pruner, attention.min_context = before


def eager(model: Any, cache: Any) -> Step:
    """Return a `Step` that calls the model."""
    return lambda ids: model(ids[:, None], past_key_values=cache, use_cache=True).logits[:, -1]


_HEARERS: list[Callable[[str], None]] = []


@contextlib.contextmanager
def hearing(hear: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile call `hear` with what is being done, whatever session does it: a run may take minutes."""
    _HEARERS.append(hear)
    try:
        yield
    finally:
        _HEARERS.remove(hear)


def _say(text: str) -> None:
    for hear in _HEARERS:
        hear(text)


def _counted(step: Step, count: int) -> Step:
    """Return `step`, which says at each call how many of `count` have been made."""
    numbers = itertools.count(1)

    def counted(ids: torch.Tensor) -> torch.Tensor:
        _say(f"token {next(numbers)} of {count}" + (f", {len(ids)} at once" if len(ids) > 1 else ""))
        return step(ids)

    return counted if _HEARERS else step


_OPEN: dict[str, Session] = {}
_DENSE_RESULTS: dict[str, Any] = {}


@contextlib.contextmanager
def open_session(cfg: DictConfig) -> Iterator[Session]:
    """Yield the session of a composed configuration, attached; the one before, if it is of the same parts but p.

    Args:
        cfg: groups ``selector pruner budget model task``; of the task `page_size` and `min_context`.
    """
    from twilight.integrations.transformers import attach

    task = cfg.task
    selector, pruner, budget = build_selector(cfg), build_pruner(cfg), build_budget(cfg)
    key = _key(cfg, "model", "selector", "budget", page_size=task.page_size)
    if key not in _OPEN:
        _OPEN.clear()  # memory for one
        loaded = load(cfg)
        handle = attach(
            loaded.model,
            selector,
            budget=budget,
            pruner=pruner,
            dense_layers=cfg.model.dense_layers,
            page_size=task.page_size,
            stats=True,
        )
        _OPEN[key] = Session(loaded, handle)
    session = _OPEN[key]
    session.handle.reattach()
    session.handle.attention.pruner = pruner
    session.handle.attention.min_context = task.min_context
    try:
        yield session
    finally:
        session.handle.detach()


def load(cfg: DictConfig) -> LoadedModel:
    """Load the model of a composed configuration, or return it if it is the last one."""
    options = OmegaConf.to_container(cfg.model, resolve=True)
    assert isinstance(options, dict)
    options.pop("dense_layers")
    return load_model(**{str(key): value for key, value in options.items()})


def dense_once(cfg: DictConfig, part: str, measure: Callable[[], Any]) -> Any:
    """Return what `measure` does; what it did before, if model and task are the same: dense attention is then too.

    Args:
        cfg: the composed configuration.
        part: which part of the task this is.
        measure: called at most once a process.
    """
    key = _key(cfg, "model", "task", part=part)
    if key not in _DENSE_RESULTS:
        _DENSE_RESULTS[key] = measure()
    return _DENSE_RESULTS[key]


def _key(cfg: DictConfig, *groups: str, **more: Any) -> str:
    return json.dumps({**{g: OmegaConf.to_container(cfg[g], resolve=True) for g in groups}, **more}, sort_keys=True)


def _room(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else _CPU_BYTES
