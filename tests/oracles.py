"""Oracles: the definitions once more, as loops over numpy arrays. They share no code with the package."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

import numpy as np
import torch


def array(tensor: torch.Tensor) -> np.ndarray:
    """Return a float64 copy."""
    return tensor.detach().to(torch.float64).numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return float64 weights of one row; all zero if the row is all -inf."""
    top = max(logits)
    if top == -math.inf:
        return np.zeros(len(logits))
    weights = np.array([math.exp(logit - top) for logit in logits])
    return weights / weights.sum()


def quantize(key: Sequence[float], bits: int = 4) -> tuple[list[int], float, float]:
    """Return (codes, scale, zero) of one key. Rounds where the definition says so: to half, and to an integer."""
    steps = {2: 3, 4: 15, 8: 255}[bits]
    k = np.asarray(key, dtype=np.float32)
    zero = np.float32(np.float16(k.min()))
    scale = np.float32(np.float16(max((k.max() - zero) / np.float32(steps), np.float32(2.0**-14))))
    codes = [int(min(steps, max(0, np.rint((value - zero) / scale)))) for value in k]
    return codes, float(scale), float(zero)


def dequantize(key: Sequence[float], bits: int = 4) -> np.ndarray:
    """Return the float64 key that the codes of `key` stand for."""
    codes, scale, zero = quantize(key, bits)
    return np.array([scale * code + zero for code in codes])


def pack(codes: Sequence[int], bits: int = 4) -> bytes:
    """Return the bytes of one key: with n codes a byte, byte j holds channels j, j + d/n, ..., lowest bits first."""
    each = 8 // bits
    stride = len(codes) // each
    return bytes(sum(codes[j + k * stride] * 2 ** (bits * k) for k in range(each)) for j in range(stride))


def mean(keys: np.ndarray) -> np.ndarray:
    """Return the float32 mean of some keys, `[n, d]`: a sum in float32 in their order, then one division."""
    total = np.zeros(keys.shape[1], dtype=np.float32)
    for key in keys.astype(np.float32):
        total = (total + key).astype(np.float32)
    return total / np.float32(len(keys))


def shadow_page(keys: Sequence[Sequence[float]], page_size: int, fill: int = 0xFF) -> bytes:
    """Return the bytes of one (page, kv head): rows of codes, then pairs of halves. Slots without a key are `fill`."""
    dim = len(keys[0])
    codes, params = b"", b""
    for key in keys:
        row, scale, zero = quantize(key)
        codes += pack(row)
        params += struct.pack("<ee", scale, zero)
    missing = page_size - len(keys)
    return codes + bytes([fill]) * (missing * dim // 2) + params + bytes([fill]) * (missing * 4)


def top_p(logits: Sequence[float], p: float) -> set[int]:
    """Return the entries that top-p keeps: sort, add up until the mass is reached, then finish the class of ties."""
    weights = softmax(np.asarray(logits, dtype=np.float64))
    order = sorted((i for i in range(len(logits)) if logits[i] != -math.inf), key=lambda i: -logits[i])
    kept: set[int] = set()
    mass, last = 0.0, math.inf
    for i in order:
        # Equal logits tie, not equal weights: exp rounds logits 1e-38 apart to one weight.
        if mass >= p and logits[i] < last and p < 1:
            break
        kept.add(i)
        mass, last = mass + weights[i], logits[i]
    return kept


def bounded_top_p(logits: Sequence[float], p: float, least: int, most: int | None) -> set[int]:
    """Return what top-p keeps between a floor and a ceiling: go down the classes of equal logits, one at a time."""
    real = [i for i in range(len(logits)) if logits[i] != -math.inf]
    weights = softmax(np.asarray(logits, dtype=np.float64)) if real else []
    kept: set[int] = set()
    for level in sorted({logits[i] for i in real}, reverse=True):
        mass = math.fsum(weights[i] for i in kept)
        enough = (p < 1 and mass >= p) and len(kept) >= least
        if kept and (enough or (most is not None and len(kept) >= most)):
            break
        kept |= {i for i in real if logits[i] == level}
    return kept


def threshold(logits: Sequence[float], share: float, weight: float) -> set[int]:
    """Return the entries that weigh at least `share` of the heaviest and `weight` of all; the heaviest in any case."""
    weights = softmax(np.asarray(logits, dtype=np.float64))
    real = [i for i in range(len(logits)) if logits[i] != -math.inf]
    top = max(weights)
    return {i for i in real if weights[i] == top or (weights[i] >= share * top and weights[i] >= weight)}


def mean_value(values: np.ndarray, *, packed: bool) -> np.ndarray:
    """Return the mean of a page's values `[n, d]`, as 8 bits read back if `packed`."""
    mean = values.astype(np.float64).mean(0)
    if not packed:
        return mean
    zero = np.float64(np.float16(mean.min()))
    scale = np.float64(np.float16(max((mean.max() - zero) / 255, 2.0**-14)))
    return scale * np.clip(np.rint((mean - zero) / scale), 0, 255) + zero


def attend(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, log_weight: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Return (out, lse) of one query over the tokens given, `[n, d]`."""
    logits = [float(q @ key) * scale for key in keys]
    if log_weight is not None:
        logits = [logit + float(extra) for logit, extra in zip(logits, log_weight, strict=True)]
    if not logits or max(logits) == -math.inf:
        return np.zeros_like(q), -math.inf
    top = max(logits)
    total = sum(math.exp(logit - top) for logit in logits)
    out = np.zeros_like(q)
    for logit, value in zip(logits, values, strict=True):
        if logit != -math.inf:
            out = out + math.exp(logit - top) / total * value
    return out, top + math.log(total)


def page_table(lengths: Sequence[int], page_size: int, seed: int = 0) -> torch.Tensor:
    """Return `[b, max_pages]` int32: pages in shuffled order, none used twice, none 0; padded with 0."""
    counts = [-(-length // page_size) for length in lengths]
    numbers = np.random.default_rng(seed).permutation(np.arange(1, sum(counts) + 1)).tolist()
    table = torch.zeros(len(lengths), max(1, *counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        for logical in range(count):
            table[row, logical] = numbers.pop()
    return table


def lay_out(rows: torch.Tensor, lengths: Sequence[int], table: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return pages `[pages, Hkv, P, d]` holding `rows [b, n, Hkv, d]`; whatever holds no token is NaN."""
    _, _, heads, dim = rows.shape
    pages = torch.full((int(table.max()) + 1, heads, page_size, dim), torch.nan, dtype=rows.dtype)
    for row, length in enumerate(lengths):
        for position in range(length):
            pages[int(table[row, position // page_size]), :, position % page_size] = rows[row, position]
    return pages


def lay_out_shadow(rows: torch.Tensor, lengths: Sequence[int], table: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return the 4-bit copy `[pages, Hkv, bytes]` of `rows`; whatever holds no token is 0xff, which is NaN in half."""
    _, _, heads, dim = rows.shape
    shadow = torch.full((int(table.max()) + 1, heads, page_size * dim // 2 + 4 * page_size), 0xFF, dtype=torch.uint8)
    for row, length in enumerate(lengths):
        for first in range(0, length, page_size):
            for head in range(heads):
                keys = rows[row, first : min(length, first + page_size), head].float().numpy()
                data = shadow_page(keys, page_size)
                shadow[int(table[row, first // page_size]), head] = torch.tensor(list(data), dtype=torch.uint8)
    return shadow


def random_lists(lengths: Sequence[int], heads: int, seed: int = 0) -> list[list[list[int]]]:
    """Return for each row and kv head an ascending list of about half of the row's entries."""
    rng = np.random.default_rng(seed)
    return [[[i for i in range(length) if rng.random() < 0.5] for _ in range(heads)] for length in lengths]


def pad(lists: list[list[list[int]]], fill: Callable[[], int] = lambda: 2**30) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (indices, lengths) of lists, with two entries of nonsense behind the longest."""
    capacity = 2 + max(len(entries) for row in lists for entries in row)
    indices = [[entries + [fill() for _ in range(capacity - len(entries))] for entries in row] for row in lists]
    lengths = [[len(entries) for entries in row] for row in lists]
    return torch.tensor(indices, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)


def tokens_of(entries: Sequence[int], granularity: int, length: int) -> list[int]:
    """Spell out a list of pages as the tokens that the sequence has in them."""
    return [t for entry in entries for t in range(entry * granularity, (entry + 1) * granularity) if t < length]
