"""Budget policies that give layers and heads different shares of one budget.

Each takes C, what `UniformBudget` gives every layer and kv head, and hands it out anew, with the rules of methods that
evict the prompt. Nothing is evicted here: a share says how many tokens a selector may propose, at every step, and C may
be a fraction of a length that grows. The window w of the newest tokens, which those methods always keep, counts as a
part of C that is not shared out. Layers are the sparse ones, whose mean the total is kept over.

AdaKV and DynamicKV look at how the end of the prompt attends: each layer's chunk of at least w tokens is observed, and
the last one counts. Rows without such a chunk have C everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from twilight import ops
from twilight.budget import Budget, UniformBudget
from twilight.checks import check_positive
from twilight.selector import StateSpec

if TYPE_CHECKING:
    from twilight.geometry import Geometry
    from twilight.layer_cache import LayerCache


@dataclass(frozen=True, eq=False)
class PyramidBudget(UniformBudget):
    """Less and less from layer to layer, linearly (PyramidKV, Cai et al., arXiv 2406.02069, section 3.2).

    With base = C - w, N tokens in the sequence and L layers, as in the official code (Zefan-Cai/KVCache-Factory):

        min = floor(base / beta), max = 2 base - min; where max > N - w: max = N - w, min = 2 base - max
        layer l gets w + max - l floor((max - min) / (L - 1))

    or C, where N < 2 base. The floor makes the mean a little more than C.

    Attributes:
        beta: how much less the last layer has than the mean.
        window: w, tokens that every layer has.
    """

    name: ClassVar[str] = "pyramid"
    beta: int = 20
    window: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)
        check_positive("window", self.window)

    def for_layer(self, mean: Budget, layer: LayerCache) -> Budget:
        ids = layer.geometry.layer_ids
        last, place = len(ids) - 1, ids.index(layer.index)
        if not last:
            return mean
        lens = layer.seq_lens.long()[:, None]
        base, room = mean.tokens.long() - self.window, lens - self.window
        least = base.clamp(min=0) // self.beta
        most = torch.minimum(2 * base - least, room)
        least = 2 * base - most
        mine = self.window + most - place * ((most - least) // last)
        plain = (base <= 0) | (lens < 2 * base)
        tokens = torch.where(plain, mean.tokens.long(), mine.minimum(lens))
        # The largest of it, whatever N is: N caps the slope, which takes from the first half and gives to the second.
        ends = max(0, mean.capacity - self.window)
        slope = max(0.0, 1 - 2 * place / last)
        bound = self.window + math.ceil(ends + (ends - ends // self.beta) * slope) + place
        return Budget(tokens.to(torch.int32), max(1, min(max(bound, mean.capacity), layer.max_seq_len)))


@dataclass(frozen=True, eq=False)
class ObservedBudget(UniformBudget):
    """Base of the policies that keep a share for each row, layer and kv head, from what the prompt's end looks at.

    Attributes:
        window: w, queries that observe, and tokens that every head has.
        kernel: neighbouring tokens whose scores are pooled, an odd number.
        pool: "max" or "avg".
    """

    name: ClassVar[str]
    window: int = 32
    kernel: int = 7
    pool: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("window", self.window)
        if check_positive("kernel", self.kernel) % 2 == 0:
            raise ValueError(f"kernel: expected an odd number, got {self.kernel}")
        if self.pool not in ("max", "avg"):
            raise ValueError(f"pool: expected 'max' or 'avg', got {self.pool!r}")

    def state(self, geometry: Geometry) -> tuple[StateSpec, ...]:
        # In float64, so that share * base is the number that the rule came to.
        return (StateSpec(self._share, (), torch.float64, fill=1.0),)

    @property
    def _share(self) -> str:
        return f"{self.name}_share"

    def observe(self, q: torch.Tensor, layer: LayerCache) -> None:
        if q.shape[1] < self.window or not layer.max_seq_len:
            return
        queries, places = ops.window(q, layer.seq_lens, layer.new_tokens, self.window)
        pages = (layer.k_pages, layer.page_table, layer.seq_lens)
        scores = ops.window_scores(
            queries, places, *pages, max_seq_len=layer.max_seq_len, kernel=self.kernel, pool=self.pool,  # type: ignore[arg-type]
            sm_scale=layer.geometry.sm_scale,
        )  # fmt: skip
        self._observe(scores, self._base(layer), layer)

    def _observe(self, scores: torch.Tensor, base: torch.Tensor, layer: LayerCache) -> None:
        """Work out shares from `scores [b, Hkv, n]`, `-inf` for the window, and `base [b]` int64, C - w."""
        raise NotImplementedError

    def _base(self, layer: LayerCache) -> torch.Tensor:
        g = layer.geometry
        mean = self.resolve(layer.seq_lens, g.num_kv_heads, max_seq_len=layer.max_seq_len, page_size=g.page_size)
        return (mean.tokens[:, 0].long() - self.window).clamp(min=0)

    def _keep(self, layer: LayerCache, share: torch.Tensor, step: LayerCache) -> None:
        """Write `share [b, Hkv]` to the rows that `step` has observed a whole window of."""
        whole = (step.new_tokens >= self.window)[:, None]
        layer.update_state(self._share, torch.where(whole, share, layer.state(self._share)))

    def _spread(self, mean: Budget, layer: LayerCache, fixed: float, most: float) -> Budget:
        """Return w + round(((1 - fixed) share + fixed) base) tokens; `most` is how large that factor may be."""
        base = mean.tokens.double() - self.window
        factor = (1 - fixed) * layer.state(self._share) + fixed
        mine = (self.window + (factor * base).round()).clamp(min=1)
        lens = layer.seq_lens[:, None]
        plain = (base <= 0) | (mean.tokens >= lens)
        tokens = torch.where(plain, mean.tokens, mine.to(torch.int32).minimum(lens))
        bound = self.window + math.ceil(most * max(0, mean.capacity - self.window))
        return Budget(tokens, max(1, min(max(bound, mean.capacity), layer.max_seq_len)))


@dataclass(frozen=True, eq=False)
class AdaBudget(ObservedBudget):
    """More for heads whose attention is spread (AdaKV, Feng et al., arXiv 2407.11550, algorithm 1; FFY0/AdaKV).

    Of the scores of all H kv heads of a layer the H base largest are marked, base = C - w. A head with B* marks gets

        w + round((1 - alpha) B* + alpha base)

    so that the layer's total stays H C. Scores are SnapKV's, the mean over a group's query heads, as the official code
    does with `gqa_support`.

    Attributes:
        alpha: the part that every head has alike.
    """

    name: ClassVar[str] = "ada"
    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha: expected a float in [0, 1], got {self.alpha}")

    def _observe(self, scores: torch.Tensor, base: torch.Tensor, layer: LayerCache) -> None:
        marks = _marks(scores, base)
        share = marks / base.clamp(min=1)[:, None]
        # Where there are fewer scores than marks, as in a prompt that C holds whole, nothing is learned.
        enough = (scores != -torch.inf).flatten(1).sum(1) >= base * scores.shape[1]
        self._keep(layer, torch.where((enough & (base > 0))[:, None], share, 1.0), layer)

    def for_layer(self, mean: Budget, layer: LayerCache) -> Budget:
        heads = layer.geometry.num_kv_heads
        return self._spread(mean, layer, self.alpha, (1 - self.alpha) * heads + self.alpha)


@dataclass(frozen=True, eq=False)
class DynamicBudget(ObservedBudget):
    """More for layers that the prompt's end looks at in many places (DynamicKV, Zhou et al., arXiv 2412.14838).

    Of the scores of all H kv heads of all L layers the H L base largest are marked, base = C - w. With n_l marks in
    layer l, t_l = n_l / sum n and r = min(r_max base, N - w), as in the official code (DreamMr/DynamicKV):

        B_l = floor(floor(r t_l) / rho),  rho = sum floor(r t_l) / (L base),  what is left over to the last layer

    and each head of layer l gets w + min(B_l, r). The official code does so every fourth layer, over the layers until
    then, to free memory while the prompt is read; here the last layer does it once, over all.

    Attributes:
        r_max: no layer has more than so many times the mean.
    """

    name: ClassVar[str] = "dynamic"
    window: int = 8
    pool: str = "avg"
    r_max: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r_max", self.r_max)

    def _observe(self, scores: torch.Tensor, base: torch.Tensor, layer: LayerCache) -> None:
        seen = layer.scratch.setdefault("dynamic_budget", [])
        seen.append((layer, scores))
        layers = len(layer.geometry.layer_ids)
        if len(seen) < layers:
            return
        seen.sort(key=lambda pair: layer.geometry.layer_ids.index(pair[0].index))
        del layer.scratch["dynamic_budget"]
        every = torch.stack([found for _, found in seen], dim=1)
        marks = _marks(every.flatten(2), base * every.shape[2])
        top = torch.minimum(self.r_max * base, (layer.seq_lens.long() - self.window).clamp(min=0))
        parts = top[:, None] * marks // marks.sum(1, keepdim=True).clamp(min=1)
        given = parts * (layers * base)[:, None] // parts.sum(1, keepdim=True).clamp(min=1)
        given[:, -1] += layers * base - given.sum(1)
        share = given.minimum(top[:, None]) / base.clamp(min=1)[:, None]
        whole = (base > 0) & (marks.sum(1) == base * layers * every.shape[2])
        share = torch.where(whole[:, None], share, 1.0)
        for place, (each, _) in enumerate(seen):
            self._keep(each, share[:, place : place + 1].expand(-1, scores.shape[1]), layer)

    def for_layer(self, mean: Budget, layer: LayerCache) -> Budget:
        return self._spread(mean, layer, 0.0, self.r_max)


def _marks(scores: torch.Tensor, each: torch.Tensor) -> torch.Tensor:
    """Return `[b, parts]` int64: how many of a row's `parts * each` largest scores lie in each of its parts.

    Args:
        scores: `[b, parts, n]`, `-inf` where there is none. Of equal ones the first are taken.
        each: `[b]` int64.
    """
    b, parts, n = scores.shape
    marks = torch.zeros(b, parts, dtype=torch.long, device=scores.device)
    for row in range(b):  # the scores of all layers of a long prompt are many
        values, order = scores[row].flatten().sort(descending=True, stable=True)
        wanted = torch.arange(parts * n, device=scores.device) < parts * each[row]
        marks[row].scatter_add_(0, order // n, (wanted & (values != -torch.inf)).long())
    return marks


POLICIES: dict[str, type[UniformBudget]] = {
    "fixed": UniformBudget,
    "fraction": UniformBudget,
    **{cls.name: cls for cls in (PyramidBudget, AdaBudget, DynamicBudget)},
}
