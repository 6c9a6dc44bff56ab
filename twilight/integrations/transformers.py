"""Twilight in transformers: `attach` registers an attention and a mask function, and patches nothing."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from types import TracebackType
from typing import Any, Literal

import torch

from twilight.errors import UnsupportedModelError, missing_extra

try:
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, sdpa_mask
except ImportError as error:
    raise missing_extra("transformers", "hf", "twilight.attach") from error

from twilight.attention import TwilightAttention, attend_densely
from twilight.budget import UniformBudget
from twilight.calibration import default_calibration
from twilight.checks import check_p, check_positive
from twilight.geometry import Geometry
from twilight.integrations import transformers_step
from twilight.integrations.transformers_cache import TwilightCache, TwilightLayer
from twilight.integrations.transformers_rotary import rotary_frequencies
from twilight.integrations.transformers_step import DecodeStep
from twilight.ops.dense_attention import gather_dense
from twilight.pruner import BoundedTopP, Pruner, TopP
from twilight.registry import create_selector
from twilight.selector import Selector
from twilight.stats import Stats

NAME = "twilight"
_ATTACHED: weakref.WeakKeyDictionary[torch.nn.Module, Handle] = weakref.WeakKeyDictionary()


class Handle:
    """What `attach` returns: makes caches, keeps stats, and takes Twilight off again.

    Attributes:
        attention: selector, pruner and budget.
        layers: for each layer number, ``"sparse"`` or why it is dense.
    """

    def __init__(
        self, model: PreTrainedModel, attention: TwilightAttention, geometry: Geometry, layers: dict[int, str]
    ) -> None:
        self.attention = attention
        self.layers = layers
        self._model = weakref.ref(model)  # _ATTACHED is weak in the model's modules, and holds this handle
        self._geometry = geometry
        self._config = _text_config(model)
        self._before = model.config._attn_implementation
        self._detached = False
        self._coming: dict[int, tuple[TwilightLayer, torch.Tensor]] = {}
        self._mask: tuple[torch.Tensor | None, tuple[int, int], torch.Tensor | None] = (None, (0, 0), None)

    @property
    def p(self) -> float:
        """The mass that top-p keeps; set it to change p between runs."""
        if not isinstance(self.attention.pruner, (TopP, BoundedTopP)):
            raise AttributeError(f"p: this handle prunes with {self.attention.pruner!r}")
        return self.attention.pruner.p

    @p.setter
    def p(self, value: float) -> None:
        if not isinstance(self.attention.pruner, (TopP, BoundedTopP)):
            raise AttributeError(f"p: this handle prunes with {self.attention.pruner!r}, which has none")
        self.attention.pruner = replace(self.attention.pruner, p=value)

    @property
    def geometry(self) -> Geometry:
        """Sizes of the sparse layers' caches."""
        return self._geometry

    def __repr__(self) -> str:
        attention = self.attention
        return f"<twilight.Handle: {attention.selector!r}, {attention.pruner!r}, {'; '.join(self.explain())}>"

    def cache(self, *, max_new_tokens: int | None = None) -> TwilightCache:
        """Return an empty cache for ``generate(..., past_key_values=...)``; one for each batch of sequences.

        Args:
            max_new_tokens: tokens that a sequence is expected to gain after its prompt. Room for them is made at once,
                where otherwise the pool of pages doubles when it is full.
        """
        own = DynamicCache(config=self._config).layers
        sparse, attention = self._geometry.layer_ids, self.attention
        return TwilightCache(own, sparse, self._geometry, attention, self._announce, max_new_tokens)

    def generate(self, inputs: torch.Tensor | None = None, *, capture: bool = True, **options: Any) -> Any:
        """Do what ``model.generate(inputs, **options)`` does, in captured steps, with a fresh cache if none is given.

        On a GPU the model's step is captured in a CUDA graph and replayed for every token: small models and batches,
        which are bound by the host, gain most. Transformers' own loop chooses the tokens. On a CPU the same step runs
        without a graph. What cannot be captured is decoded as by ``model.generate``, and a warning says why: beam
        search and speculation, layers with a sliding window, a model or selector that waits for the GPU.

        Args:
            inputs, options: as transformers' `generate` takes them.
            capture: False decodes as ``model.generate(..., past_key_values=handle.cache())``.
        """
        return transformers_step.generate(self._attached_model(), self, inputs, options, capture=capture)

    def capture(self, cache: TwilightCache, *, max_new_tokens: int | None = None, graph: bool = True) -> DecodeStep:
        """Return the next decode steps of a cache that holds prompts, captured: `generate` for a loop of your own.

        Args:
            cache: one of this handle's.
            max_new_tokens: how many steps there will be; pages are reserved and the step is captured for as many. More
                may follow, which takes another capture.
            graph: False runs the step without a CUDA graph, as on a CPU.

        Returns:
            A step: call it with the newest token of each sequence, and it returns their logits. A context manager;
            closing it lets the cache go on as usual.

        Raises:
            UnsupportedModelError: the model cannot decode over static shapes, and why.
        """
        return DecodeStep(self._attached_model(), self.attention, cache, max_new_tokens=max_new_tokens, graph=graph)

    def stats(self) -> Stats:
        """Return what the sparse layers read since the handle was made, or since ``stats().clear()``."""
        return self.attention.stats

    def explain(self) -> list[str]:
        """Return one line for each kind of layer: which are sparse, which are dense and why."""
        kinds: dict[str, list[int]] = {}
        for index, kind in self.layers.items():
            kinds.setdefault(kind, []).append(index)
        return [f"{kind}: layers {', '.join(map(str, layers))}" for kind, layers in kinds.items()]

    def detach(self) -> None:
        """Give the model back the attention it had. Caches made before are of no more use."""
        model, self._detached = self._model(), True
        if model is None:
            return
        for module in _attention_modules(model):
            if _ATTACHED.get(module) is self:
                del _ATTACHED[module]
        if model.config._attn_implementation == NAME:
            model.set_attn_implementation(self._before)

    def reattach(self) -> None:
        """Undo `detach`: the model attends with Twilight again, and caches made before serve again.

        Raises:
            UnsupportedModelError: the model is gone, or another handle's.
        """
        model = self._model()
        if model is None:
            raise UnsupportedModelError("the handle's model is gone: call twilight.attach(model, ...) on another")
        modules = _attention_modules(model)
        if any(_ATTACHED.get(module, self) is not self for module in modules):
            raise UnsupportedModelError(
                f"{type(model).__name__} has Twilight attached already; detach() the earlier handle first"
            )
        self._detached = False
        self._coming.clear()  # of a step that an error ended
        AttentionInterface.register(NAME, _attention_function)
        AttentionMaskInterface.register(NAME, _mask_function)
        if model.config._attn_implementation != NAME:
            self._before = model.config._attn_implementation
            model.set_attn_implementation(NAME)
        for module in modules:
            _ATTACHED[module] = self

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _attached_model(self) -> PreTrainedModel:
        model = self._model()
        if self._detached or model is None:
            raise UnsupportedModelError("this handle is detached: call twilight.attach(model, ...) for another")
        return model

    def _announce(self, layer: TwilightLayer, key: torch.Tensor) -> None:
        # What was announced last time and never collected: another attention, or another model, uses the cache.
        if self._detached or self._coming.get(layer.index, (None,))[0] is layer:
            raise UnsupportedModelError(
                "past_key_values: the handle that made this cache is detached, or the model does not attend with it\n"
                "  pass a fresh one of the handle that is attached: past_key_values=handle.cache()"
            )
        self._coming[layer.index] = (layer, key)

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        index: int = module.layer_idx  # type: ignore[assignment]
        layer, announced = self._coming.pop(index, (None, None))
        if layer is None or announced is not key:
            if self.layers[index] == "sparse" and key.shape[2] > query.shape[2]:
                raise UnsupportedModelError(
                    "past_key_values: this model has Twilight attached, and the cache is not one of its own.\n"
                    "  pass a fresh one: model.generate(..., past_key_values=handle.cache())"
                )
            return self._sdpa(module, query, key, value, self._mask_4d(mask, query, key), scaling, **kwargs)
        if mask is not None and mask.ndim != 2:
            raise UnsupportedModelError(
                "attention_mask: expected a padding mask [b, length], got a custom one of 4 dimensions, "
                "which sparse layers cannot follow. Detach Twilight for this call."
            )
        if layer.owner.static is None:
            return self._attend_paged(layer, module, query, key, value, mask, scaling, **kwargs)
        pages = layer.owner.static_layer(layer)
        sparse = self.layers[index] == "sparse"
        if layer.owner.joining is not None:
            k, v, counts = layer.owner.for_one_row(key, value)
            pages.append(k, v, counts)
            if sparse:
                self.attention.selector.observe(query.transpose(1, 2).expand(len(counts), -1, -1, -1), pages)
            return self._sdpa(module, query, key, value, None, scaling, **kwargs)
        q, k, v = query[:, :, 0], key[:, :, 0], value[:, :, 0]
        if sparse:
            out, _ = self.attention.decode(q, k, v, pages)
        else:
            pages.append(k, v)
            out, _ = attend_densely(q, pages)
        return out.unsqueeze(1), None

    def _attend_paged(
        self,
        layer: TwilightLayer,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        cache, steps, sparse = layer.owner, query.shape[2], self.layers[layer.index] == "sparse"
        counts = cache.append(layer, key, value, mask)
        pages = cache.page_cache(layer)
        if steps == 1 and sparse and not self.attention.is_dense(pages):
            out, _ = self.attention.attend(query[:, :, 0], pages)
            return out.unsqueeze(1), None
        seen = cache.compact(query)
        if sparse:
            self.attention.observe(seen.transpose(1, 2), pages)
        if steps > 1 and layer.columns == steps:
            # The first chunk of a prompt: everything there is to attend to has just been handed over.
            return self._sdpa(module, query, key, value, self._mask_4d(mask, query, key), scaling, **kwargs)
        if steps == 1 and sparse:
            self.attention.stats.dense(pages)
        longest = pages.max_seq_len
        k, v = (
            gather_dense(part, pages.page_table, pages.seq_lens, longest) for part in (pages.k_pages, pages.v_pages)
        )
        visible = None
        if steps > 1 or min(cache.paged.table.lengths) < longest:  # type: ignore[union-attr]
            first = pages.seq_lens - torch.tensor(counts, dtype=torch.int32, device=query.device)
            last = first[:, None] + torch.arange(steps, device=query.device)
            # What is padding sees the first token, so that its softmax is over something; nobody reads it.
            last = last.minimum(pages.seq_lens[:, None] - 1).clamp(min=0)
            visible = torch.arange(longest, device=query.device) <= last[:, None, :, None]
        out, _ = self._sdpa(module, seen, k, v, visible, scaling, **kwargs)
        return cache.restore(out.transpose(1, 2)).transpose(1, 2).contiguous(), None

    def _sdpa(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        out, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
        return out, None

    def _mask_4d(self, mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
        """Return the mask that torch's attention wants, for dense attention over plain keys.

        The last one is kept: all dense layers of a step ask for the same.
        """
        if mask is not None and mask.ndim == 4:
            return mask
        new, length = query.shape[2], key.shape[2]
        if mask is None and new in (1, length):
            return None
        if self._mask[0] is mask and self._mask[1] == (new, length) and self._mask[2] is not None:
            return self._mask[2]
        columns = torch.arange(length, device=query.device)
        rows = columns[length - new :, None]
        visible = (columns <= rows)[None, None]
        if mask is not None:
            # A query that is padding sees itself: over nothing at all its softmax would be NaN, and spread.
            visible = (visible & mask[:, None, None, :].to(query.device)) | (columns == rows)
        self._mask = (mask, (new, length), visible)
        return visible


def attach(
    model: PreTrainedModel,
    selector: str | Selector = "quest",
    p: float = 0.95,
    *,
    budget: int | float | UniformBudget = 0.25,
    pruner: Pruner | None = None,
    selector_options: Mapping[str, Any] | None = None,
    dense_layers: int = 2,
    min_context: int | Literal["auto"] = "auto",
    page_size: int = 16,
    stats: bool = False,
) -> Handle:
    """Make a transformers model decode with Twilight.

    Prompts are attended to densely; each further token goes through select, estimate, prune, attend. Steps of several
    tokens (chunked prefill, verification of speculated tokens) are dense over the cache. The selector observes the
    queries of all dense steps.

    Args:
        model: a causal language model that uses transformers' attention interface.
        selector: name of a registered selector, or one you made.
        p: attention mass to keep, in (0, 1]. By default with 16 to 128 tokens a query head, and what the ceiling cuts
            off on the mean values of its pages; 1 keeps every candidate.
        budget: candidates a kv head: tokens (int), a fraction of the length (float), or a `UniformBudget`.
        pruner: instead of `BoundedTopP(p)`, and `p` is then not looked at. ``TopP(p)`` is the paper's rule.
        selector_options: options of the selector, if it is given by name.
        dense_layers: the first layers stay dense; two in the paper (section 5.1).
        min_context: contexts up to this many tokens are attended to densely. "auto" is the length up to which dense was
            measured to be as fast on a GPU that runs the kernels, and 0 elsewhere; see `TwilightAttention`.
        page_size: tokens of a page.
        stats: record what is read; see `Handle.stats`.

    Returns:
        A handle. Pass ``past_key_values=handle.cache()`` to `generate`. Usable as a context manager.

    Raises:
        UnsupportedModelError: an architecture that cannot be served, and why. The model is as it was.
        ValueError, TypeError: an argument out of range.
    """
    check_p(p)
    check_positive("page_size", page_size)
    if isinstance(dense_layers, bool) or not isinstance(dense_layers, int) or dense_layers < 0:
        raise ValueError(f"dense_layers: expected an int of at least 0, got {dense_layers!r}")
    layers = _classify_layers(model, dense_layers)
    config = _text_config(model)
    if isinstance(selector, str):
        selector = create_selector(selector, **dict(selector_options or {}))
    elif selector_options:
        raise ValueError("selector_options: given together with a selector that is made already")
    if is_dataclass(selector) and getattr(selector, "calibration", "") is None:
        found = default_calibration(getattr(config, "_name_or_path", None) or model.config._name_or_path, selector.name)
        selector = replace(selector, calibration=found)
    attention = TwilightAttention(
        selector, pruner if pruner is not None else BoundedTopP(p), budget, min_context=min_context, collect_stats=stats
    )
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(attention.budget.value, int) and longest and attention.budget.value > longest:
        raise ValueError(
            f"budget: {attention.budget.value} tokens are more than the {longest} positions that the model has"
        )
    modules = _attention_modules(model)
    sparse = tuple(index for index, kind in layers.items() if kind == "sparse")
    geometry = Geometry(
        num_layers=max(1, len(sparse)),
        num_q_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=modules[0].head_dim,
        page_size=page_size,
        dtype=model.dtype,
        device=model.device,
        scaling=modules[0].scaling,
        layer_ids=sparse or (0,),
        inv_freq=rotary_frequencies(model, modules),
    )
    if not sparse:
        raise UnsupportedModelError(
            f"no layer is left to be sparse: {len(layers)} layers, dense_layers={dense_layers}\n"
            "  " + "\n  ".join(sorted(set(layers.values())))
        )
    selector.prepare(geometry)
    handle = Handle(model, attention, geometry, layers)
    handle.reattach()
    return handle


def _attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for every layer: `[b, Hq, n, d]` queries in, `[b, n, Hq, d]` out."""
    handle = _ATTACHED.get(module)
    if handle is None:
        raise UnsupportedModelError(
            "attn_implementation='twilight' on a model that Twilight is not attached to (a copy of one that is?)\n"
            "  call twilight.attach(model, ...)"
        )
    if dropout:
        raise UnsupportedModelError(f"dropout: Twilight is for inference, got {dropout}; call model.eval()")
    return handle._attend(module, query, key, value, attention_mask, scaling, **kwargs)


def _mask_function(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """What transformers calls once a step: the padding mask `[b, length]`, or None if nothing is padded.

    A mask of 4 dimensions, 16 GB for one prompt of 128k tokens, is made only where the pattern is more than causal:
    sliding windows, packed sequences, caches with free room.
    """
    causal = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    position = kwargs.get("cache_position")  # transformers 4.57; since 5, an offset and a length
    offset = int(kwargs.get("q_offset", 0)) if position is None else int(position[0])
    end = offset + (kwargs["q_length"] if position is None else len(position))
    if not causal or kwargs["kv_length"] != end or kwargs.get("kv_offset", 0):
        return sdpa_mask(*args, **kwargs)
    mask = kwargs.get("attention_mask")
    if mask is None:
        return None
    mask = mask[:, :end].bool()
    return None if bool(mask.all()) else mask


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _attention_modules(model: torch.nn.Module) -> list[Any]:
    """Return the attention modules in order of layer."""
    needed = ("layer_idx", "head_dim", "num_key_value_groups", "scaling")
    found = [module for module in model.modules() if all(hasattr(module, name) for name in needed)]
    return sorted(found, key=lambda module: module.layer_idx)


def _classify_layers(model: PreTrainedModel, dense_layers: int) -> dict[int, str]:
    """Return what becomes of each layer, or refuse the model with the reason."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    name, config, modules = type(model).__name__, _text_config(model), _attention_modules(model)
    if model.config._attn_implementation == NAME:
        raise UnsupportedModelError(f"{name} has Twilight attached already; detach() the earlier handle first")
    reasons = []
    if getattr(model.config, "is_encoder_decoder", False):
        reasons.append("it is an encoder-decoder")
    if not modules:
        reasons.append("its attention layers do not use transformers' attention interface")
    if [module.layer_idx for module in modules] != list(range(getattr(config, "num_hidden_layers", -1))):
        reasons.append("not every one of its layers is an attention layer that Twilight knows")
    if len({(module.head_dim, module.scaling) for module in modules}) > 1:
        reasons.append("its layers differ in head_dim or scaling")
    devices = {parameter.device for module in modules for parameter in module.parameters()}
    if len(devices) > 1:
        reasons.append(f"its layers lie on several devices ({', '.join(sorted(map(str, devices)))})")
    if any(hasattr(module, "sinks") for module in modules):
        reasons.append("it has attention sinks that are parameters")
    if getattr(config, "attn_logit_softcapping", None):
        reasons.append("it caps its logits (attn_logit_softcapping)")
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * len(modules)
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        reasons.append(f"it has layers of type {', '.join(unknown)}")
    if reasons:
        raise UnsupportedModelError(f"{name} is not supported: " + "; ".join(reasons))
    layers = {}
    for index, kind in enumerate(kinds):
        if kind == "sliding_attention":
            layers[index] = f"dense, sliding window of {window} tokens"
        else:
            layers[index] = f"dense, one of the first {dense_layers}" if index < dense_layers else "sparse"
    return layers
