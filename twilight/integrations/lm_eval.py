"""A model with Twilight attached, as lm-evaluation-harness wants it."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from twilight.errors import missing_extra

try:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils_hf import stop_sequences_criteria
except ImportError as error:
    raise missing_extra("lm_eval", "eval", "lm-evaluation-harness") from error


class TwilightLM(HFLM):
    """Generates through `Handle.generate`, with a fresh cache for each batch.

    Prompts are attended to densely, generated tokens through Twilight. What is scored by loglikelihood never decodes:
    it is dense, and a warning says so.

    Args:
        handle: from `twilight.attach`, attached.
        model, tokenizer: what it is attached to.
        batch_size: prompts that are generated for at a time, padded on the left.
        max_length: tokens of prompt and answer; by default the model's positions.
    """

    def __init__(
        self, handle: Any, model: Any, tokenizer: Any, *, batch_size: int = 1, max_length: int | None = None
    ) -> None:
        super().__init__(model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        self._handle = handle

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        if generation_kwargs.get("temperature", 0.0) == 0.0 and not generation_kwargs.get("do_sample"):
            generation_kwargs.pop("temperature", None)  # transformers warns of what greedy choice does not look at
            generation_kwargs["do_sample"] = False
        stops = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
        out: torch.Tensor = self._handle.generate(
            context,
            max_length=max_length,
            stopping_criteria=stops,
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **generation_kwargs,
        )
        return out

    def loglikelihood(self, requests: Any, *args: Any, **options: Any) -> Any:
        self._say_dense()
        return super().loglikelihood(requests, *args, **options)

    def loglikelihood_rolling(self, requests: Any, *args: Any, **options: Any) -> Any:
        self._say_dense()
        return super().loglikelihood_rolling(requests, *args, **options)

    def _say_dense(self) -> None:
        warnings.warn(
            "lm_eval: a loglikelihood task reads prompts and never decodes: every figure of it is dense attention's. "
            "Only tasks that generate (output_type: generate_until) measure Twilight.",
            UserWarning,
            stacklevel=3,
        )
