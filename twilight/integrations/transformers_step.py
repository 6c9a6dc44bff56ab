"""Decode steps of an attached model over static shapes: captured once in a CUDA graph, then replayed for every token.

    with handle.capture(cache, max_new_tokens=100) as step:      # `cache` holds the prompts
        for _ in range(100):
            logits = step(tokens)                                # [b] -> [b, 1, vocab]
            tokens = logits[:, -1].argmax(-1)

The model's forward runs as it is. All of its layers lie in pages that are reserved ahead (`StaticCache`), tokens and
positions in tensors that stay where they are, and no mask is needed: pages hold no padding. On a CPU, or where the
reference runs, the same forward is run again for every token instead of being replayed.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from twilight.attention import TwilightAttention, why_reference
from twilight.checks import check_positive
from twilight.errors import CaptureError, UnsupportedModelError
from twilight.graph import DecodeGraph, StaticCache
from twilight.integrations.transformers_cache import TwilightCache
from twilight.stats import Record

if TYPE_CHECKING:
    from twilight.integrations.transformers import Handle

STEPS = 4096
"""Tokens a sequence that pages are reserved for at a time. A capture costs three eager steps, and shapes follow from
the longest sequence that it allows for: with as many replays, neither matters.
"""


class DecodeStep:
    """One token for every sequence of a cache. Made by `Handle.capture`.

    A graph holds what it was captured with. When the pages are full, or `p`, the budget or `min_context` was set anew,
    the next step is captured again.

    Attributes:
        eager: why the step is not replayed from a CUDA graph, or None: it is.
    """

    def __init__(
        self,
        model: Any,
        attention: TwilightAttention,
        cache: TwilightCache,
        *,
        max_new_tokens: int | None = None,
        graph: bool = True,
    ) -> None:
        reason = why_not_static(model, cache)
        if reason is not None:
            raise UnsupportedModelError(f"{type(model).__name__}: its decode step cannot be captured: {reason}")
        if max_new_tokens is not None:
            check_positive("max_new_tokens", max_new_tokens)
        self._model, self._attention, self._cache = model, attention, cache
        self._parameters = inspect.signature(model.forward).parameters
        self._left = max_new_tokens
        self._static = self._reserve()
        device = self._static.geometry.device
        self._ids, self._positions = torch.zeros((2, cache.num_rows, 1), dtype=torch.long, device=device)
        self._graph: DecodeGraph[tuple[torch.Tensor, list[Record]]] | None = None
        self.eager = "graph=False" if not graph else why_reference(cache.paged.layers[0])  # type: ignore[union-attr]
        if graph and self.eager is not None and device.type == "cuda":
            _say_eager(self.eager)
        self._capture()

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Do a step.

        Args:
            input_ids: `[b]` or `[b, 1]` int, the newest token of each sequence. That of a row without one counts for
                nothing.
            position_ids: `[b, 1]` int; by default the number of tokens that each sequence holds already, which is what
                `generate` gives padded batches too.

        Returns:
            `[b, 1, vocab]` logits. The next step overwrites them.
        """
        static, rows = self._open(), self._cache.num_rows
        if input_ids.numel() != rows:
            raise ValueError(f"input_ids: expected [{rows}] or [{rows}, 1], got {list(input_ids.shape)}")
        full = any(static.lengths[row] >= static.limits[row] for row in static.active)
        if full or (self._graph is not None and self._settings() != self._captured):
            static = self._renew()
        self._ids.copy_(input_ids.view(rows, 1))
        self._positions.copy_(static.seq_lens[:, None] if position_ids is None else position_ids)
        try:
            logits, records = self._forward() if self._graph is None else self._graph.replay()
        except BaseException:
            self._cache.failed = True
            raise
        self._cache.advance()
        self._left = None if self._left is None else self._left - 1
        self._attention.stats.keep(records)
        return logits

    def leave(self, row: int) -> None:
        """Take a sequence out of the batch, between two steps. Its row stands empty until another joins."""
        static = self._open()
        if row not in static.active:
            raise ValueError(f"row: expected one that holds a sequence, {static.active}, got {row}")
        self._cache.leave(row)

    @torch.no_grad()
    def join(self, row: int, input_ids: torch.Tensor) -> torch.Tensor:
        """Run the prompt of another sequence into an empty row, between two steps. The captured step stays.

        Args:
            row: a row that was left.
            input_ids: `[n]` or `[1, n]` int, without padding.

        Returns:
            `[1, 1, vocab]` logits of its last token.
        """
        static = self._open()
        empty = [other for other in range(self._cache.num_rows) if other not in static.active]
        if row not in empty:
            raise ValueError(f"row: expected an empty one, {empty}, got {row}; leave(row) empties it")
        ids = input_ids.view(1, -1).to(self._ids)
        new = ids.shape[1]
        if new > static.limits[row]:
            self._renew(new)
        inputs = self._inputs(ids, torch.arange(new, device=ids.device)[None], 0)
        try:
            with self._cache.join(row):
                logits: torch.Tensor = self._model(**inputs).logits
        except BaseException:
            self._cache.failed = True
            raise
        return logits[:, -1:]

    def close(self) -> None:
        """Hand unused pages back. The cache goes on as usual, this step does not."""
        self._graph = None
        self._cache.release()

    def __enter__(self) -> DecodeStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> StaticCache:
        if self._cache.static is not self._static:
            raise ValueError("step: it is closed; handle.capture(cache) makes another")
        return self._static

    def _settings(self) -> tuple[Any, ...]:
        """Return what a captured step cannot be told any more."""
        a = self._attention
        return a.selector, a.pruner, a.budget, a.min_context, a.stats.enabled

    def _reserve(self, prompt: int = 0) -> StaticCache:
        """Reserve pages for the steps to come, after a prompt of so many tokens."""
        steps = min(STEPS, self._left) if self._left is not None and self._left > 0 else STEPS
        return self._cache.reserve(prompt + steps)

    def _renew(self, prompt: int = 0) -> StaticCache:
        self.close()
        self._static = self._reserve(prompt)
        self._capture()
        return self._static

    def _capture(self) -> None:
        self._captured = self._settings()
        if self.eager is not None:
            return
        try:
            with torch.no_grad():
                self._graph = DecodeGraph(self._static, self._forward)
        except CaptureError as error:
            self.eager = str(error)
            _say_eager(self.eager)
        except BaseException:
            self.close()
            raise

    def _forward(self) -> tuple[torch.Tensor, list[Record]]:
        with self._attention.stats.aside() as records:
            out = self._model(**self._inputs(self._ids, self._positions, self._cache.get_seq_length()))
        return out.logits, records

    def _inputs(self, ids: torch.Tensor, positions: torch.Tensor, seen: int) -> dict[str, Any]:
        inputs = {"input_ids": ids, "position_ids": positions, "past_key_values": self._cache}
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = 1
        if "cache_position" in self._parameters:
            # transformers 4.57 makes its mask from this. On the host, where looking at it makes nobody wait.
            inputs["cache_position"] = torch.arange(seen, seen + ids.shape[1])
        return {**inputs, "use_cache": True, "return_dict": True}


def why_not_static(model: Any, cache: TwilightCache) -> str | None:
    """Say why a model cannot decode over static shapes, or return None."""
    sliding = [str(index) for index, slides in enumerate(cache.is_sliding) if slides]
    if sliding:
        return f"layers {', '.join(sliding)} attend to a sliding window, for which there are no pages"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids"
    return None


def generate(model: Any, handle: Handle, inputs: torch.Tensor | None, options: dict[str, Any], *, capture: bool) -> Any:
    """Do what `Handle.generate` says."""
    if options.get("past_key_values") is None and options.get("use_cache") is not False:
        options["past_key_values"] = handle.cache()
    reason = None
    if capture:
        reason = _why_not_sampled(model, options) or why_not_static(model, options["past_key_values"])
        if reason is not None:
            _say_eager(reason)
    if not capture or reason is not None:
        return model.generate(inputs, **options)
    # transformers gives a loop that is not its own no streamer.
    loop = functools.partial(_sample, handle=handle, streamer=options.get("streamer"))
    return model.generate(inputs, custom_generate=loop, **options)


def _sample(model: Any, input_ids: torch.Tensor, *, handle: Handle, generation_config: Any, **options: Any) -> Any:
    """Run transformers' sampling loop with captured steps. `generate` calls it when everything is prepared."""
    cache: TwilightCache = options["past_key_values"]
    # One token comes with the prompt, the last one is never fed back.
    cache.max_new_tokens = min(STEPS, max(1, generation_config.max_length - input_ids.shape[1]))
    stand_in = _StandIn(model, handle, cache)
    try:
        return type(model)._sample(stand_in, input_ids, generation_config=generation_config, **options)
    finally:
        stand_in.close()


class _StandIn:
    """What the sampling loop calls instead of the model: a call with one token a sequence is a captured step.

    The prompt goes to the model itself, and so does everything else that is asked of it.
    """

    def __init__(self, model: Any, handle: Handle, cache: TwilightCache) -> None:
        self._model, self._handle, self._cache = model, handle, cache
        self._step: DecodeStep | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, input_ids: torch.Tensor | None = None, **inputs: Any) -> Any:
        positions = inputs.get("position_ids")
        single = input_ids is not None and input_ids.shape == (self._cache.num_rows, 1)
        if not single or (positions is not None and positions.ndim != 2):
            return self._model(input_ids, **inputs)
        if self._step is None:
            self._step = self._handle.capture(self._cache, max_new_tokens=self._cache.max_new_tokens)
        logits = self._step(input_ids, positions)  # type: ignore[arg-type]  # single: it is a tensor
        return CausalLMOutputWithPast(logits=logits, past_key_values=self._cache)

    def close(self) -> None:
        """Let the cache go on as usual."""
        if self._step is not None:
            self._step.close()


def _why_not_sampled(model: Any, options: dict[str, Any]) -> str | None:
    """Say why a call of `generate` does not sample, or choose greedily, token by token, or return None."""
    if options.get("custom_generate") is not None:
        return "custom_generate brings a loop of its own"
    if options.get("synced_gpus"):
        return "synced_gpus keeps several processes in step"
    # The function with which `generate` itself begins.
    words = {name: value for name, value in options.items() if name not in _NOT_FOR_CONFIG}
    config, _ = model._prepare_generation_config(options.get("generation_config"), **words)
    mode = config.get_generation_mode(options.get("assistant_model"))
    if mode not in ("greedy_search", "sample"):
        return f"this is {str(mode.value).replace('_', ' ')}, and captured steps serve greedy search and sampling"
    if config.use_cache is False:
        return "use_cache=False keeps nothing to decode from"
    for name in ("stop_strings", "token_healing"):
        if getattr(config, name, None):
            return f"{name} needs the tokenizer, which transformers gives its own loops only"
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(config, name, None):
            return f"{name} asks for more than logits"
    return None


_NOT_FOR_CONFIG = ("generation_config", "assistant_model", "streamer", "logits_processor", "stopping_criteria",
                   "prefix_allowed_tokens_fn", "synced_gpus", "custom_generate", "past_key_values")  # fmt: skip


def _say_eager(reason: str) -> None:
    warnings.warn(f"twilight decodes eagerly, without a captured step: {reason}", UserWarning, stacklevel=4)
