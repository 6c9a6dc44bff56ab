"""Train the tiny long-context model of `examples/tiny`: a byte-level Llama that reads Python and finds facts.

On one large GPU, in minutes, and as a smoke test on any CPU:

    python examples/train_tiny.py --out examples/tiny
    python examples/train_tiny.py --out smoke --minutes 0.2 --context 512 --batch-tokens 2048 --eval-prompts 1

`--shape larger` trains one of 40 M parameters, with the heads of a Llama 3 (groups of 4, head dim 128), for what the
tiny one is too small to measure; it is not kept in the repository.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import queue
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from twilight.evaluation.corpus import document, heldout_text, source_files, source_roots
from twilight.evaluation.facts import (
    ANSWER_BYTES,
    FACT_BYTES,
    build_fact_prompt,
    fact_line,
    line_start,
    random_codes,
    random_names,
)

EOS, PAD, VOCAB = 256, 257, 258
MAX_CONTEXT, ROPE_THETA = 32768, 100_000.0
MAX_FACTS, ANSWER_WEIGHT = 12, 4.0
FACTS_ASKED, FACT_CONTEXTS = 8, (4096, 8192, 16384, 32512)

# Share of the time a stage ends at, and the sequence lengths drawn from in it. Short sequences make the model
# learn to copy early; the long ones that follow only have to stretch that.
STAGES = (
    (0.08, (1024,)),
    (0.22, (4096,)),
    (0.60, (8192, 8192, 8192, 16384)),
    (1.00, (8192, 8192, 8192, 8192, 16384, 16384, 16384, 32768)),
)


SHAPES = {
    "tiny": {
        "hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 7,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64,
    },
    "larger": {
        "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
    },
}  # fmt: skip


def make_config(shape: str) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        **SHAPES[shape],
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        rope_theta=ROPE_THETA,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer whose token ids are byte values; only the end of text and padding are more."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    # Byte-level BPE writes bytes as characters: printable ones as themselves, the others from U+0100 on.
    symbols = {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=symbols, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=MAX_CONTEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, PAD)
    return tokenizer


def load_corpus(max_bytes: int, seed: int) -> bytes:
    """Join the training files in random order, each after a NUL that stands for the end of text."""
    files = source_files("train")
    random.Random(seed).shuffle(files)
    parts, total = [], 0
    for file in files:
        parts.append(b"\0" + document(file).replace(b"\0", b""))
        total += len(parts[-1])
        if total >= max_bytes:
            break
    return b"".join(parts)


def plant(rng: random.Random, text: bytes, num_facts: int) -> tuple[bytes, np.ndarray]:
    """Put facts into `text` and ask for each again further on; the end of `text` makes room for them.

    Returns the bytes, of the length of `text`, and each byte's weight in the loss: what cannot be foreseen
    (names, codes first told) weighs nothing, answers weigh more than text.
    """
    room = len(text) - 2 * num_facts * FACT_BYTES
    text = text[: room - 1] + b"\n"
    ask_at_end = rng.random() < 0.5
    lines = []
    for name, code in zip(random_names(rng, num_facts), random_codes(rng, num_facts), strict=True):
        if ask_at_end:
            told, asked = rng.randrange(room), room
        else:
            # Distances spread evenly over their logarithm: near ones teach copying, far ones keep it honest.
            distance = int(math.exp(rng.uniform(math.log(32), math.log(room))))
            asked = rng.randrange(distance, room + 1)
            told = asked - distance
        line = fact_line(name, code)
        lines.append((line_start(text, told), 0, rng.random(), line))
        lines.append((line_start(text, asked), 1, rng.random(), line))
    parts, weights, done = [], np.ones(len(text) + 2 * num_facts * FACT_BYTES, np.float32), 0
    for at, (start, is_question, _, line) in enumerate(sorted(lines)):
        parts += [text[done:start], line]
        place = start + at * FACT_BYTES
        weights[place : place + FACT_BYTES] = 0
        if is_question:
            end = place + FACT_BYTES - 1
            weights[end - ANSWER_BYTES : end] = ANSWER_WEIGHT
        done = start
    return b"".join([*parts, text[done:]]), weights


def make_batch(rng: random.Random, corpus: bytes, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids int64 and loss weights fp32, both [batch, length + 1]."""
    ids = np.empty((batch, length + 1), np.int64)
    weights = np.empty((batch, length + 1), np.float32)
    for row in range(batch):
        start = rng.randrange(len(corpus) - length - 1)
        num_facts = rng.randint(1, min(MAX_FACTS, length // (4 * FACT_BYTES)))
        # Half of the sequences show the end of text between files, the others run on as evaluation text does.
        text = corpus[start : start + length + 1]
        if rng.random() < 0.5:
            text = text.replace(b"\0", b"").ljust(length + 1, b"\n")
        planted, weights[row] = plant(rng, text, num_facts)
        ids[row] = np.frombuffer(planted, np.uint8)
    ids[ids == 0] = EOS
    return torch.from_numpy(ids), torch.from_numpy(weights)


def lengths_at(progress: float) -> tuple[int, ...]:
    return next(lengths for end, lengths in STAGES if progress < end or end == 1.0)


class Loader:
    """Makes batches on a thread of its own, a few ahead of the steps that use them."""

    def __init__(self, corpus: bytes, args: argparse.Namespace, device: str) -> None:
        self.progress, self.stop = 0.0, False
        self._corpus, self._args, self._pin = corpus, args, device == "cuda"
        self._queue: queue.Queue[tuple[torch.Tensor, torch.Tensor]] = queue.Queue(4)
        threading.Thread(target=self._fill, daemon=True).start()

    def _fill(self) -> None:
        rng = random.Random(self._args.seed)
        while not self.stop:
            length = min(rng.choice(lengths_at(self.progress)), self._args.context)
            batch = make_batch(rng, self._corpus, max(1, self._args.batch_tokens // length), length)
            self._queue.put(tuple(t.pin_memory() for t in batch) if self._pin else batch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield self._queue.get(timeout=120)


def build_model(args: argparse.Namespace, device: str) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(make_config(args.shape)).to(device)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data /= math.sqrt(2 * len(model.model.layers))
        if args.compile:
            layer.compile(dynamic=False)
    return model


def train(model: LlamaForCausalLM, corpus: bytes, args: argparse.Namespace, device: str) -> dict:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")

    loader, begin = Loader(corpus, args, device), time.monotonic()
    step = tokens = skipped = 0
    shown_at = begin
    for ids, weights in loader:
        elapsed = time.monotonic() - begin
        loader.progress = progress = elapsed / (60 * args.minutes)
        if progress >= 1:
            break
        ids, weights = ids.to(device, non_blocking=True), weights[:, 1:].to(device, non_blocking=True)
        warm_up = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(ids[:, :-1], use_cache=False).logits
        targets = ids[:, 1:]
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        losses = losses.view_as(weights)
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # One bad batch must not spoil the weights of a run that cannot be repeated for free.
        if torch.isfinite(norm):
            optimizer.step()
        else:
            skipped += 1
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens += weights.numel()
        if time.monotonic() - shown_at > args.log_seconds:
            shown_at = time.monotonic()
            text_bits = losses[weights == 1].mean().item() / math.log(2)
            answer_bits = losses[weights == ANSWER_WEIGHT].mean().item() / math.log(2)
            print(
                f"{elapsed:6.1f} s  step {step:5d}  {tokens / 1e6:6.1f} Mtok  length {targets.shape[1]:5d} "
                f" text {text_bits:.3f} bits/byte  answers {answer_bits:.3f} bits/digit",
                flush=True,
            )
    loader.stop = True
    return {"steps": step, "skipped_steps": skipped, "tokens": tokens, "minutes": round(elapsed / 60, 2)}


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write a folder that transformers 4.57 and 5.x read alike, in bf16."""
    bf16 = LlamaForCausalLM(model.config).to(torch.bfloat16)
    bf16.load_state_dict(model.state_dict())
    bf16.save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    # 4.x looks for rope_theta and torch_dtype where 5.x writes rope_parameters and dtype, and does not know
    # the tokenizer class that 5.x names.
    _patch(out / "config.json", rope_theta=ROPE_THETA, torch_dtype="bfloat16", dtype="bfloat16")
    _patch(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _patch(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2, sort_keys=True) + "\n")


@torch.inference_mode()
def bits_per_byte(model: torch.nn.Module, text: bytes, window: int) -> float:
    """Mean bits that `model` needs for a byte of `text`, cut into windows that share nothing."""
    ids = torch.tensor(np.frombuffer(text, np.uint8).astype(np.int64), device=model.device)
    nats = 0.0
    for part in ids[: len(ids) // window * window].view(-1, 1, window):
        logits = model(part, use_cache=False).logits[0, :-1].float()
        nats += F.cross_entropy(logits, part[0, 1:], reduction="mean").item()
    return nats / math.log(2) / (len(ids) // window)


@torch.inference_mode()
def fact_accuracy(model: torch.nn.Module, context: int, prompts: int) -> float:
    """Share of facts whose six digits greedy decoding gets right; the prompts have seeds from 0."""
    right = 0
    for seed in range(prompts):
        prompt = build_fact_prompt(context, FACTS_ASKED, seed)
        cache = model(_ids(prompt.context, model), use_cache=True, logits_to_keep=1).past_key_values
        for question, answer in zip(prompt.questions, prompt.answers, strict=True):
            # Greedy decoding gives all digits exactly when each place's argmax is right after the right ones.
            logits = model(_ids(question + answer[:-1], model), past_key_values=cache, use_cache=True).logits
            right += logits[0, -len(answer) :].argmax(-1).tolist() == list(answer)
            # Negative, the number to drop: not every version knows the length to keep.
            cache.crop(1 - len(question + answer))
    return right / (prompts * FACTS_ASKED)


def _ids(text: bytes, model: torch.nn.Module) -> torch.Tensor:
    return torch.tensor([list(text)], device=model.device)


def evaluate(out: Path, args: argparse.Namespace, device: str) -> dict:
    """Measure the model as saved: its bf16 weights, computed in bf16 on a GPU and in fp32 on a CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype).to(device).eval()
    window = min(8192, args.context)
    texts = {
        "heldout_all_roots": heldout_text(args.eval_bytes, 0, source_roots()),
        "heldout_stdlib": heldout_text(args.eval_bytes, 0),
    }
    bits = {name: round(bits_per_byte(model, text, window), 4) for name, text in texts.items()}
    print(bits, flush=True)
    facts = []
    for context in [length for length in FACT_CONTEXTS if length <= args.context] or [args.context]:
        accuracy = fact_accuracy(model, context, args.eval_prompts)
        print(f"facts at {context}: {accuracy:.3f}", flush=True)
        facts.append({"context_bytes": context, "prompts": args.eval_prompts, "accuracy": round(accuracy, 4)})
    return {
        "bits_per_byte": {"bytes": args.eval_bytes // window * window, "window": window, **bits},
        "facts": {"facts_per_prompt": FACTS_ASKED, "seeds": [0, args.eval_prompts - 1], "contexts": facts},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--minutes", type=float, default=7.0, help="time for training, compilation included")
    parser.add_argument("--context", type=int, default=MAX_CONTEXT, help="longest sequence, in bytes")
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-corpus-bytes", type=int, default=10**9)
    parser.add_argument("--eval-bytes", type=int, default=262144)
    parser.add_argument("--eval-prompts", type=int, default=16)
    parser.add_argument("--log-seconds", type=float, default=10.0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    args = parser.parse_args()
    if not 512 <= args.context <= MAX_CONTEXT:
        parser.error(f"--context: expected 512 to {MAX_CONTEXT}, got {args.context}")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.suppress_errors = True  # without a compiler, run eagerly
    torch._dynamo.config.recompile_limit = 64
    corpus = load_corpus(args.max_corpus_bytes, args.seed)
    model = build_model(args, device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(corpus) / 1e6:.0f} MB of text, {device}", flush=True)
    done = train(model, corpus, args, device)
    save(model, args.out)
    print(f"trained {done}", flush=True)
    record = {
        "parameters": parameters,
        "seed": args.seed,
        "corpus_bytes": len(corpus),
        **done,
        "batch_tokens": args.batch_tokens,
        "longest_sequence": args.context,
        "learning_rate": args.lr,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "dense_attention": evaluate(args.out, args, device),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
