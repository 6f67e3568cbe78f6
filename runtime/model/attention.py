"""The rows of one step, and their attention.

Shapes, here and in decoder.py:
    T  rows of the step (all sequences)      H  query heads on this rank      D  hidden size
    t  rows of one sequence                  K  KV heads on this rank         d  head size
    L  committed tokens of a sequence        G  query heads per KV head, H = K * G

A row sees the committed tokens of its sequence, its ancestors in the step, and itself. Keys stand in
the cache as [K, L + t, d], the step's own rows last, so a mask is needed only for the last t columns
(and, in sliding-window layers, for tokens that the window has left behind).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.cache import KVCache
from runtime.model.layers import at_least_float32

Ints = NDArray[np.integer]
Bias = tuple[int, torch.Tensor]
"""(first column, additive mask [t, columns from there to the end])"""

Masked = tuple[torch.Tensor, torch.Tensor]
"""(view [K, G, t, columns] of the scores, additive mask [t, columns])"""


@dataclass
class Segment:
    """The rows of one sequence: rows start .. stop-1 of the step."""

    slot: int
    start: int
    stop: int
    cached: int
    """L, committed tokens before this step."""
    positions: Ints  # [t]
    sees: NDArray[np.bool_]  # [t, t]: row i sees row j of the step
    dtype: torch.dtype
    device: torch.device

    def bias(self, window: int | None) -> Bias | None:
        """Additive mask for layers with this sliding window; None if every row sees every key."""
        first, sees = self.cached, self.sees
        if window is not None and int(self.positions.max()) - window >= 0:
            first = 0
            key_positions = np.concatenate([np.arange(self.cached), self.positions])
            reached = key_positions[None, :] > self.positions[:, None] - window
            sees = reached & np.concatenate([np.ones((len(sees), self.cached), np.bool_), sees], axis=1)
        if sees.all():
            return None
        bias = np.where(sees, np.float32(0), np.float32(-np.inf))
        return first, torch.from_numpy(bias).to(self.device, self.dtype)


@dataclass
class RowBatch:
    """The rows that one rank runs in a step."""

    tokens: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    rope_lengths: torch.Tensor  # [T] int64: length of the row's prompt, which dynamic RoPE scales by
    segments: list[Segment]

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @classmethod
    def build(
        cls, tokens: Ints, positions: Ints, parents: Ints, slots: Ints, rope_lengths: Ints, cache: KVCache
    ) -> RowBatch:
        """Arrays of length T. `parents` are indices into this batch, smaller than the row's own, or -1.

        Rows of one slot must stand together, and a row's parent is of the same slot.
        """
        starts = [0, *(np.flatnonzero(np.diff(slots)) + 1).tolist()] if len(slots) else []
        stops = [*starts[1:], len(slots)]
        assert len({int(slots[start]) for start in starts}) == len(starts), "rows of one slot must stand together"
        segments = []
        for start, stop in zip(starts, stops, strict=True) if starts else ():
            slot = int(slots[start])
            local = np.where(parents[start:stop] < 0, -1, parents[start:stop] - start)
            sees = ancestry(local)
            here = positions[start:stop]
            segments.append(Segment(slot, start, stop, cache.lengths[slot], here, sees, cache.dtype, cache.device))

        def upload(values: Ints) -> torch.Tensor:
            return torch.from_numpy(np.asarray(values, np.int64)).to(cache.device)

        return cls(upload(tokens), upload(positions), upload(rope_lengths), segments)


def ancestry(parents: Ints) -> NDArray[np.bool_]:
    """[t, t]: row i has row j as an ancestor, or is row j. Parents come before their children; -1 is none."""
    count = len(parents)
    rows = np.arange(count)
    assert (parents < rows).all() and (parents >= -1).all(), "a parent must come before its child, in the same slot"
    if (parents == rows - 1).all():  # a prompt's chunk
        return np.tri(count, dtype=np.bool_)
    sees = np.eye(count, dtype=np.bool_)
    for row, parent in enumerate(parents.tolist()):
        if parent >= 0:
            sees[row] |= sees[parent]
    return sees


class StepAttention:
    """The attention of a step's rows, layer by layer.

    A small step costs as many operations as it has, however small they are. So what layers have in
    common is made once per step: rotation factors, masks, scratch memory, views into the cache.
    """

    def __init__(self, batch: RowBatch, cache: KVCache, turns: torch.Tensor, num_heads: int) -> None:
        """`turns` [T, d/2] are the rows' complex rotation factors."""
        num_rows, half = turns.shape
        num_kv = cache.num_kv_heads
        parts = (turns * (2 * half) ** -0.5, num_heads), (turns, num_kv), (torch.ones_like(turns), num_kv)
        factors = torch.cat([part[:, None].expand(-1, count, -1) for part, count in parts], dim=1)
        self.wide = at_least_float32(cache.dtype)
        factors = factors.to(self.wide.to_complex())
        self.pairs_shape = (*factors.shape, 2)
        self.counts = [segment.stop - segment.start for segment in batch.segments]
        out = torch.empty(num_rows, num_heads, 2 * half, dtype=cache.dtype, device=cache.device)
        self.out = out.view(num_rows, -1)
        self.segments = [
            _SegmentAttention(segment, cache, *parts)
            for segment, *parts in zip(batch.segments, factors.split(self.counts), out.split(self.counts), strict=True)
        ]

    def __call__(self, qkv: torch.Tensor, layer: int, window: int | None) -> torch.Tensor:
        """Stage the keys and values in `qkv` [T, (H + 2K) * d], and attend. Returns [T, H * d], until the next call."""
        if qkv.dtype != self.wide:
            qkv = qkv.to(self.wide)
        pairs = torch.view_as_complex(qkv.view(self.pairs_shape))
        for segment, rows in zip(self.segments, pairs.split_with_sizes(self.counts), strict=True):
            segment(rows, layer, window)
        return self.out


class _SegmentAttention:
    """The attention of one sequence's rows, with its scratch memory.

    Two matrix products over the KV heads instead of a fused kernel, so that a row's result does not
    depend on how many rows stand beside it.
    """

    def __init__(self, segment: Segment, cache: KVCache, factors: torch.Tensor, out: torch.Tensor) -> None:
        """`factors` [t, H + 2K, d/2], what queries, keys and values are multiplied by; `out` [t, H, d] is filled."""
        count, num_heads, head_dim = out.shape
        num_kv = cache.num_kv_heads
        self.segment = segment
        self.factors = factors
        self.stage = cache.stage(segment.slot, count)
        turned = torch.empty_like(factors.transpose(0, 1), memory_format=torch.contiguous_format)
        self.turned = turned.transpose(0, 1)
        self.turned_heads = torch.view_as_real(turned).flatten(-2)  # [H + 2K, t, d]
        self.heads = self.turned_heads.to(cache.dtype)  # the same memory, unless the dtype is a narrow one
        self.queries = self.heads[:num_heads].view(num_kv, -1, head_dim)  # [K, G * t, d]
        self.keys_values = self.heads[num_heads:].view(2, num_kv, count, head_dim)
        self.scores = out.new_empty(*self.queries.shape[:2], segment.cached + count)
        self.weights = torch.empty_like(self.scores)
        self.mixed = torch.empty_like(self.queries)
        self.mixed_heads = self.mixed.view(num_heads, count, head_dim)
        self.out = out.transpose(0, 1)
        self.masked: dict[int | None, Masked | None] = {}

    def __call__(self, pairs: torch.Tensor, layer: int, window: int | None) -> None:
        """`pairs` [t, H + 2K, d/2]: queries, keys and values of one layer."""
        torch.mul(pairs, self.factors, out=self.turned)
        if self.heads is not self.turned_heads:
            self.heads.copy_(self.turned_heads)
        self.stage.rows[layer].copy_(self.keys_values)
        torch.bmm(self.queries, self.stage.keys[layer], out=self.scores)
        if window not in self.masked:
            self.masked[window] = self._mask(window)
        if masked := self.masked[window]:
            scores, bias = masked
            scores.add_(bias)
        torch.softmax(self.scores, dim=-1, out=self.weights)
        torch.bmm(self.weights, self.stage.values[layer], out=self.mixed)
        self.out.copy_(self.mixed_heads)

    def _mask(self, window: int | None) -> Masked | None:
        bias = self.segment.bias(window)
        if bias is None:
            return None
        first, mask = bias
        return self.scores.unflatten(1, (-1, len(mask)))[..., first:], mask
