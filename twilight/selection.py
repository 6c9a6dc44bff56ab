"""Selection: the one value that the stages of a decode step hand each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twilight.checks import check_positive, check_tensor

_PAST_END = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Selection:
    """For each sequence and kv head, an ascending list of tokens, or of pages.

    Lists are padded to one capacity and counted, so that shapes do not change while budgets do.

    Attributes:
        indices: `[b, Hkv, capacity]` int32. Logical positions in the sequence if `granularity` is 1, logical page
            numbers (position // page size) otherwise. Ascending and unique up to the row's length; what lies behind
            is padding that nothing reads.
        lengths: `[b, Hkv]` int32, how many entries of each row count.
        granularity: tokens an index stands for: 1, or the page size.
        log_weight: optional `[b, Hq, capacity]` float32, added to the logit of each token that an entry stands for,
            per query head. Sampling selectors put the negative log of their inclusion probability here; `-inf` hides
            an entry from one query head while its group reads it.
    """

    indices: torch.Tensor
    lengths: torch.Tensor
    granularity: int = 1
    log_weight: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor("indices", self.indices, (None, None, None), dtype=torch.int32)
        check_tensor("lengths", self.lengths, self.indices.shape[:2], dtype=torch.int32, device=self.indices.device)
        check_positive("granularity", self.granularity)
        # On a GPU this would wait for the device at every step.
        if self.lengths.device.type == "cpu" and self.lengths.numel():
            low, high = self.lengths.aminmax()
            if low < 0 or high > self.capacity:
                raise ValueError(f"lengths: expected 0 to {self.capacity}, the capacity, got {int(low)} to {int(high)}")
        if self.log_weight is not None:
            b, _, capacity = self.indices.shape
            device = self.indices.device
            check_tensor("log_weight", self.log_weight, (b, None, capacity), dtype=torch.float32, device=device)

    def check_fits(self, name: str, num_rows: int, num_q_heads: int, num_kv_heads: int) -> None:
        """Refuse a selection made for another batch or other heads; `name` is what the caller calls it."""
        check_tensor(f"{name}.indices", self.indices, (num_rows, num_kv_heads, None))
        if self.log_weight is not None:
            check_tensor(f"{name}.log_weight", self.log_weight, (num_rows, num_q_heads, None))

    @property
    def capacity(self) -> int:
        """Entries a row can hold."""
        return self.indices.shape[-1]

    def counted(self) -> torch.Tensor:
        """Return `[b, Hkv, capacity]` bool: which entries count."""
        slots = torch.arange(self.capacity, device=self.indices.device)
        return slots < self.lengths.unsqueeze(-1)

    def mask(self, size: int) -> torch.Tensor:
        """Return `[b, Hkv, size]` bool: which tokens, or pages, are listed. None of them may be `size` or above."""
        where = self.indices.long().masked_fill(~self.counted(), size)
        listed = torch.zeros((*where.shape[:2], size + 1), dtype=torch.bool, device=where.device)
        return listed.scatter_(-1, where, True)[..., :size]

    def positions(self, seq_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Spell the entries out as tokens.

        Args:
            seq_lens: `[b]` int32, tokens of each sequence; cuts the tail of the newest page.

        Returns:
            `(positions, valid)`, both `[b, Hkv, capacity * granularity]`: int64 positions (0 where not valid, so that
            they can be gathered with) and bool.
        """
        offsets = torch.arange(self.granularity, device=self.indices.device)
        tokens = (self.indices.long().unsqueeze(-1) * self.granularity + offsets).flatten(-2)
        valid = self.counted().repeat_interleave(self.granularity, dim=-1)
        valid = valid & (tokens < seq_lens.long()[:, None, None])
        return tokens.masked_fill(~valid, 0), valid

    def token_log_weight(self) -> torch.Tensor | None:
        """Return `log_weight` spelled out as `[b, Hq, capacity * granularity]`, or None."""
        return None if self.log_weight is None else self.log_weight.repeat_interleave(self.granularity, dim=-1)

    def num_tokens(self, seq_lens: torch.Tensor) -> torch.Tensor:
        """Return `[b, Hkv]` int32: the tokens that each row's entries stand for."""
        return self.positions(seq_lens)[1].sum(-1, dtype=torch.int32)

    @classmethod
    def everything(cls, seq_lens: torch.Tensor, num_kv_heads: int, *, max_seq_len: int, granularity: int) -> Selection:
        """Select every token of every sequence.

        Args:
            seq_lens: `[b]` int32.
            num_kv_heads: rows a sequence gets.
            max_seq_len: the longest that any of `seq_lens` is; sets the capacity.
            granularity: 1, or the page size.
        """
        capacity = -(-max_seq_len // granularity)
        indices = torch.arange(capacity, dtype=torch.int32, device=seq_lens.device)
        lengths = (seq_lens + granularity - 1) // granularity
        return cls(
            indices.expand(len(seq_lens), num_kv_heads, capacity).contiguous(),
            lengths.to(torch.int32)[:, None].expand(-1, num_kv_heads).contiguous(),
            granularity,
        )

    @classmethod
    def top(cls, scores: torch.Tensor, counts: torch.Tensor, *, capacity: int, granularity: int) -> Selection:
        """Select the highest-scoring tokens or pages.

        Args:
            scores: `[b, Hkv, n]`, larger is better; `-inf` where there is nothing to select, `+inf` to force one in.
                Equal scores go to the lower index.
            counts: `[b, Hkv]` int, how many to take; never more than there are finite or forced scores.
            capacity: entries a row of the result can hold; at least the largest of `counts` that can be met.
            granularity: tokens an index of `scores` stands for.
        """
        check_tensor("counts", counts, scores.shape[:2])
        capacity = min(capacity, scores.shape[-1])
        ranked = torch.sort(scores, dim=-1, descending=True, stable=True)
        indices, values = ranked.indices[..., :capacity], ranked.values[..., :capacity]
        taken = torch.arange(capacity, device=scores.device) < counts.unsqueeze(-1)
        return cls.compact(indices, taken & (values != -torch.inf), granularity=granularity)

    @classmethod
    def compact(
        cls, indices: torch.Tensor, keep: torch.Tensor, *, granularity: int, log_weight: torch.Tensor | None = None
    ) -> Selection:
        """Drop the entries that `keep` is False for, and sort the rest.

        Args:
            indices: `[b, Hkv, n]` int, unique where kept.
            keep: `[b, Hkv, n]` bool.
            granularity: tokens an index stands for.
            log_weight: `[b, Hq, n]` float32 that travels along, or None.
        """
        order = torch.where(keep, indices.long(), _PAST_END).argsort(dim=-1, stable=True)
        lengths = keep.sum(-1, dtype=torch.int32)
        packed = indices.gather(-1, order).to(torch.int32)
        counted = torch.arange(packed.shape[-1], device=packed.device) < lengths.unsqueeze(-1)
        if log_weight is not None:
            group = log_weight.shape[1] // indices.shape[1]
            log_weight = log_weight.gather(-1, order.repeat_interleave(group, dim=1))
        return cls(packed.masked_fill(~counted, 0), lengths, granularity, log_weight)

    def trimmed(self) -> Selection:
        """Cut the padding off. Reads the longest length on the host, so never inside a CUDA graph."""
        longest = max(1, int(self.lengths.max()))
        log_weight = None if self.log_weight is None else self.log_weight[..., :longest].contiguous()
        return Selection(self.indices[..., :longest].contiguous(), self.lengths, self.granularity, log_weight)
