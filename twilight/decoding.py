"""The main job: prefill a long prompt densely, decode with Twilight, and show what it saved."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from twilight.config import build_budget, build_pruner, build_selector
from twilight.evaluation.asking import branch, by_length, greedy
from twilight.evaluation.session import eager, load
from twilight.loading import LoadedModel
from twilight.prompts import Prompt, prompt_from_file, prompt_with_facts
from twilight.report import check_outputs, print_decode, save_budget_plot, save_json, versions
from twilight.stats import Stats

_DENSE_RUNS: dict[tuple[Any, ...], dict[str, Any]] = {}
"""Dense results of this process: a sweep decodes the same prompt densely once."""


def run(cfg: DictConfig) -> dict[str, Any]:
    """Decode as a composed configuration says, print the result, and return it as plain data.

    Args:
        cfg: groups ``selector budget pruner model task``; see ``conf/``.

    Raises:
        TwilightError, ValueError, TypeError, FileNotFoundError: what is wrong with the request, before anything runs.
    """
    name = cfg.task.get("name", "decode")
    if name != "decode":
        raise ValueError(f"task: twilight decode shows one prompt; measure with: twilight run task={name}")
    task = cfg.task
    console = Console(stderr=task.json == "-")
    result, stats, layers = measure(cfg, console)
    if task.json:
        save_json(task.json, result)
    print_decode(console, result)
    if task.plot:
        save_budget_plot(task.plot, stats, layers, title=_title(result))
        console.print(f"budget per layer and head: {task.plot}", markup=False)
    return result


def measure(cfg: DictConfig, console: Console) -> tuple[dict[str, Any], Stats, dict[int, str]]:
    """Do what `run` does but for what is shown and saved at its end; progress goes to `console`.

    Returns:
        The result, what was read, and what each layer is.
    """
    from twilight.integrations.transformers import attach

    task = cfg.task
    selector, pruner, budget = build_selector(cfg), build_pruner(cfg), build_budget(cfg)
    check_outputs(task.json, task.plot)
    loaded = load(cfg)
    prompt = _prompt(task, loaded)
    handle = attach(
        loaded.model,
        selector,
        budget=budget,
        pruner=pruner,
        dense_layers=cfg.model.dense_layers,
        min_context=task.min_context,
        page_size=task.page_size,
        stats=True,
    )
    try:
        with _progress(console) as progress:
            cache = handle.cache()
            sparse = _decode(loaded, prompt, cache, _bar(progress, f"twilight · {cfg.selector.name}", prompt))
        stats = handle.stats()
        assert cache.paged is not None
        memory = cache.paged.nbytes()
        layers = handle.layers
    finally:
        handle.detach()
    dense = None
    if task.compare_dense:
        key = (loaded.path, str(loaded.model.dtype), str(loaded.model.device), repr(prompt))
        if key not in _DENSE_RUNS:
            from transformers import DynamicCache

            with _progress(console) as progress:
                _DENSE_RUNS[key] = _decode(loaded, prompt, DynamicCache(), _bar(progress, "dense", prompt))
        dense = _DENSE_RUNS[key]
    return _result(cfg, loaded, prompt, sparse, dense, stats.summary(), memory, layers), stats, layers


def _prompt(task: DictConfig, loaded: LoadedModel) -> Prompt:
    if task.max_new_tokens < 1:
        raise ValueError(f"task.max_new_tokens: expected at least 1, got {task.max_new_tokens}")
    if task.prompt is not None:
        prompt = prompt_from_file(task.prompt, loaded.tokenizer, task.max_new_tokens)
    else:
        prompt = prompt_with_facts(task.prompt_tokens, task.num_facts, task.seed, loaded.tokenizer)
    if prompt.longest > loaded.max_tokens:
        raise ValueError(
            f"prompt: {prompt.longest} tokens with what is decoded are more than the {loaded.max_tokens} positions "
            f"of '{loaded.path}'"
        )
    return prompt


@torch.inference_mode()
def _decode(loaded: LoadedModel, prompt: Prompt, cache: Any, step: Callable[[int], None]) -> dict[str, Any]:
    """Prefill the context once, then decode every question from there.

    Questions are fed one token a step, so that they too see the context through the attention that is measured.
    Questions of equal length make a batch, whose rows share the context's pages.
    """
    model = loaded.model
    started = _now(model)
    context = torch.tensor([prompt.context], device=model.device)
    model(context, past_key_values=cache, use_cache=True, logits_to_keep=1)
    prefill = _now(model) - started
    step(len(prompt.context))

    out: dict[int, list[int]] = {}
    seconds, tokens = 0.0, 0
    for length, members in by_length(prompt.questions).items():
        steps = length + prompt.new_tokens - 1
        with branch(cache, len(members), steps):
            forced = torch.tensor([prompt.questions[i] for i in members], device=model.device)
            started = _now(model)
            chosen = greedy(eager(model, cache), forced, prompt.new_tokens, step)
            seconds += _now(model) - started
        tokens += len(members) * steps
        out |= dict(zip(members, chosen.tolist(), strict=True))
    return {
        "tokens": [out[i] for i in range(len(out))],
        "texts": [loaded.tokenizer.decode(out[i]) for i in range(len(out))],
        "prefill_seconds": prefill,
        "decode_seconds": seconds,
        "decode_tokens": tokens,
        "tokens_per_second": tokens / seconds,
    }


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} tokens"),
        TimeElapsedColumn(),
        console=console,
    )


def _bar(progress: Progress, name: str, prompt: Prompt) -> Callable[[int], None]:
    decoded = sum(len(question) + prompt.new_tokens - 1 for question in prompt.questions)
    bar = progress.add_task(name, total=len(prompt.context) + decoded)
    return lambda tokens: progress.advance(bar, tokens)


def _title(result: dict[str, Any]) -> str:
    return (
        f"{result['selector']['name']}, {result['pruner']['name']} p={result['p']}, {result['context_tokens']} tokens"
    )


def _result(
    cfg: DictConfig,
    loaded: LoadedModel,
    prompt: Prompt,
    sparse: dict[str, Any],
    dense: dict[str, Any] | None,
    layers: list[dict[str, Any]],
    memory: dict[str, int],
    kinds: dict[int, str],
) -> dict[str, Any]:
    groups = {
        name: OmegaConf.to_container(cfg[name], resolve=True) for name in ("selector", "pruner", "budget", "model")
    }
    read = sum(row["kv_bytes"] for row in layers)
    would = sum(row["dense_bytes"] for row in layers)
    num_dense = sum(kind != "sparse" for kind in kinds.values())
    beside = would / len(layers) * num_dense if layers else 0.0
    result: dict[str, Any] = {
        **groups,
        "p": cfg.p,
        "seed": cfg.task.seed,
        "prompt": cfg.task.prompt or f"held-out source, {len(prompt.answers)} planted facts",
        "context_tokens": len(prompt.context),
        "questions": prompt.texts,
        "expected": prompt.answers,
        "twilight": sparse,
        "dense": dense,
        "layers": layers,
        "layer_kinds": {str(index): kind for index, kind in kinds.items()},
        "kv_bytes": {
            "sparse_layers": read,
            "sparse_layers_dense": would,
            "all_layers": read + beside,
            "all_layers_dense": would + beside,
        },
        "cache_bytes": memory,
        "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "versions": versions(),
    }
    if prompt.answers:
        result["correct"] = {
            name: sum(text.startswith(answer) for text, answer in zip(side["texts"], prompt.answers, strict=True))
            for name, side in (("twilight", sparse), ("dense", dense))
            if side is not None
        }
    if dense is not None:
        pairs = [
            (a, b)
            for mine, theirs in zip(sparse["tokens"], dense["tokens"], strict=True)
            for a, b in zip(mine, theirs, strict=True)
        ]
        result["agreement"] = sum(a == b for a, b in pairs) / len(pairs)
    return result
