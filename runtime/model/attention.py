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

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.cache import KVCache

Ints = NDArray[np.integer]
Bias = tuple[int, torch.Tensor]
"""(first column, additive mask [t, columns from there to the end])"""


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
    _biases: dict[int | None, Bias | None] = field(default_factory=dict)

    def bias(self, window: int | None) -> Bias | None:
        """Additive mask for layers with this sliding window; None if every row sees every key."""
        if window not in self._biases:
            self._biases[window] = self._make_bias(window)
        return self._biases[window]

    def _make_bias(self, window: int | None) -> Bias | None:
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


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: RowBatch,
    cache: KVCache,
    layer: int,
    window: int | None,
) -> torch.Tensor:
    """Stage `keys` and `values` [T, K, d] of one layer, and attend with `queries` [T, H, d].

    Two matrix products over the KV heads instead of a fused kernel, so that a row's result does not
    depend on how many rows stand beside it. Returns [T, H * d].
    """
    num_rows, num_heads, head_dim = queries.shape
    num_kv = keys.shape[1]
    group = num_heads // num_kv
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    for segment in batch.segments:
        part = slice(segment.start, segment.stop)
        count = segment.stop - segment.start
        seen_keys, seen_values = cache.stage(layer, segment.slot, keys[part], values[part])
        # [t, K, G, d] -> [K, G * t, d]; scaled while it is copied
        query = torch.empty(num_kv, group, count, head_dim, dtype=queries.dtype, device=queries.device)
        torch.mul(queries[part].view(count, num_kv, group, head_dim).permute(1, 2, 0, 3), head_dim**-0.5, out=query)
        scores = torch.bmm(query.view(num_kv, group * count, head_dim), seen_keys.transpose(1, 2))
        bias = segment.bias(window)
        if bias is not None:
            first, mask = bias
            scores.view(num_kv, group, count, -1)[..., first:].add_(mask)
        weights = torch.softmax(scores, dim=-1, dtype=softmax_dtype(scores.dtype)).to(scores.dtype)
        mixed = torch.bmm(weights, seen_values)
        out[part].view(count, num_kv, group, head_dim).copy_(
            mixed.view(num_kv, group, count, head_dim).permute(2, 0, 1, 3)
        )
    return out.view(num_rows, num_heads * head_dim)


def softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half-precision scores are normalised in float32."""
    return dtype if dtype == torch.float64 else torch.float32
