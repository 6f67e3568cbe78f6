"""The rows of one step, and their attention.

Shapes, here and in decoder.py:
    T  rows of the step (all sequences)      H  query heads on this rank      D  hidden size
    t  rows of one sequence                  K  KV heads on this rank         d  head size
    n  stored tokens of a sequence           G  query heads per KV head, H = K * G

A row sees those stored tokens of its sequence that its policy shows it, its ancestors in the step, and
itself. Keys stand in the cache as [K, n + t, d], the step's own rows last.

Two frames. Keys are stored rotated, and a row's query is rotated at its true position, so keys of the
recent run have their true distance from every row of a step, however deep it stands in the tree. Where a
policy counts positions by cache slots (StreamingLLM, section 3.2), only the anchors have another distance
than in the text; so for them the query is rotated a second time, at the row's slot. No key is rotated
again as the window moves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from runtime import core
from runtime.core import Share
from runtime.mesh.device import upload
from runtime.model.kv_cache import KVCache, Stage
from runtime.model.layers import at_least_float32
from runtime.model.rotary import Rotary
from runtime.model.shard import HeadShard
from runtime.retention import Retention

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

Masked = tuple[torch.Tensor, torch.Tensor]
"""(view [K, G, t, columns] of the scores, additive mask [t, columns])"""


@dataclass
class Segment:
    """The rows of one sequence: rows start .. stop-1 of the step."""

    slot: int
    start: int
    stop: int
    tokens: Ints  # [t]
    positions: Ints  # [t]
    parents: NDArray[np.int32]  # [t] among these rows; -1: none

    @functools.cached_property
    def ancestors(self) -> Bools:
        """[t, t]: row j is an ancestor of row i, or row i itself."""
        return ancestry(self.parents)

    def sees(self, retained: Retention, window: int | None) -> Bools | None:
        """[t, n + t] what each row sees in a layer with this sliding window of the model's own; None: all of it.

        Where positions are slots, no distance exceeds the cache's size, nor, so, the window (ModelSpec.check_cache).
        """
        stored = retained.sees(self.positions, retained.positions, retained.anchored)
        own = retained.sees(self.positions, self.positions, retained.may_anchor(self.positions, self.tokens))
        own = self.ancestors if own is None else self.ancestors & own
        if window is not None and not retained.slot and int(self.positions.max()) - window >= 0:
            keys = np.concatenate([retained.positions, self.positions])
            near = keys > self.positions[:, None] - window
            stored = near[:, : -len(own)] if stored is None else stored & near[:, : -len(own)]
            own = own & near[:, -len(own) :]
        if stored is None:
            if own.all():
                return None
            stored = np.ones((len(own), retained.num_stored), np.bool_)
        return np.concatenate([stored, own], axis=1)

    def view(self, cache: KVCache) -> SegmentView:
        return SegmentView(self, cache)


@dataclass(frozen=True)
class Anchors:
    """Stored tokens, the first ones, whose distance to a row counts from the row's slot."""

    count: int
    """A, how many columns are looked at."""
    slots: torch.Tensor
    """[t] int64: the rows' places in the cache."""
    chosen: torch.Tensor | None = None
    """[A] bool: which of the columns are anchors; None: all of them."""


class View(Protocol):
    """A cache as the rows of one sequence see it in one step, all on the device."""

    @property
    def num_rows(self) -> int: ...

    @property
    def stage(self) -> Stage: ...

    @property
    def anchors(self) -> Anchors | None: ...

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Added to the scores, [t, last columns]: -inf where a row does not see a key; None: they see all."""


Views = Sequence[tuple[Sequence[int], Sequence[View]]]
"""Per group of layers that keep the same tokens: the layers, and the sequences' views of the group's cache."""


class SegmentView:
    """The view of a step that is run once: shapes are those of the rows and of what is stored."""

    def __init__(self, segment: Segment, cache: KVCache) -> None:
        self.segment, self.device, self.dtype = segment, cache.device, cache.dtype
        self.retained = cache.retained[segment.slot]
        self.num_rows = segment.stop - segment.start
        self.stage = cache.stage(segment.slot, self.num_rows)
        self.anchors: Anchors | None = None
        if count := self.retained.num_slot_anchors:
            self.anchors = Anchors(count, upload(self.retained.slots(segment.positions), cache.device))

    def mask(self, window: int | None) -> torch.Tensor | None:
        """The mask from the first column on that not every row sees."""
        sees = self.segment.sees(self.retained, window)
        if sees is None:
            return None
        first = int(sees.all(axis=0).argmin())
        bias = np.where(sees[:, first:], np.float32(0), np.float32(-np.inf))
        return upload(bias, self.device).to(self.dtype)


@dataclass
class RowBatch:
    """The rows that one rank runs in a step."""

    columns: torch.Tensor
    """[3, T] int64, on the device: token, position, and length of the row's prompt, which dynamic RoPE scales by."""
    segments: list[Segment]

    @property
    def num_rows(self) -> int:
        return self.columns.shape[1]

    @property
    def tokens(self) -> torch.Tensor:
        return self.columns[0]

    @property
    def positions(self) -> torch.Tensor:
        return self.columns[1]

    @property
    def rope_lengths(self) -> torch.Tensor:
        return self.columns[2]

    @classmethod
    def build(
        cls,
        tokens: NDArray[np.integer],
        positions: NDArray[np.integer],
        parents: NDArray[np.integer],
        slots: NDArray[np.integer],
        rope_lengths: NDArray[np.integer],
        device: torch.device,
    ) -> RowBatch:
        """Arrays of length T. `parents` are indices into this batch, smaller than the row's own, or -1.

        Rows of one slot must stand together, and a row's parent is of the same slot.
        """
        starts = [0, *(np.flatnonzero(np.diff(slots)) + 1).tolist()] if len(slots) else []
        stops = [*starts[1:], len(slots)]
        assert len({int(slots[start]) for start in starts}) == len(starts), "rows of one slot must stand together"
        columns = np.stack([np.asarray(column, np.int64) for column in (tokens, positions, rope_lengths)])
        runs = [(int(slots[start]), start, stop) for start, stop in zip(starts, stops, strict=True)]
        first = np.repeat(starts, np.subtract(stops, starts)) if starts else np.empty(0, np.int64)
        local = np.where(np.asarray(parents) < 0, -1, parents - first).astype(np.int32)
        return cls._of(columns, local, runs, device)

    @classmethod
    def of(cls, share: Share, device: torch.device) -> RowBatch:
        """The rows of a step that this rank runs."""
        return cls._of(share.columns, share.parents, share.runs, device)

    @classmethod
    def _of(
        cls, columns: Ints, parents: NDArray[np.int32], runs: Sequence[tuple[int, int, int]], device: torch.device
    ) -> RowBatch:
        """`parents` count from their run's first row."""
        tokens, positions, _ = columns
        segments = [
            Segment(slot, start, stop, tokens[start:stop], positions[start:stop], parents[start:stop])
            for slot, start, stop in runs
        ]
        return cls(upload(columns, device), segments)


def ancestry(parents: NDArray[np.integer]) -> Bools:
    """[t, t]: row i has row j as an ancestor, or is row j. Parents come before their children, else ValueError; -1 is
    none."""
    return core.ancestry(parents)


class StepAttention:
    """The attention of a step's rows, layer by layer.

    A small step costs as many operations as it has, however small they are. So what layers have in
    common is made once per step: rotation factors, masks, scratch memory, views into the cache.
    """

    def __init__(
        self,
        positions: torch.Tensor,
        rope_lengths: torch.Tensor,
        views: Views,
        rotary_of: Callable[[int], Rotary],
        heads: HeadShard,
        dtype: torch.dtype,
    ) -> None:
        """`positions` and `rope_lengths` [T]; the groups of `views` together have every layer; `rotary_of` a layer, the
        same for all of a group."""
        self.wide = at_least_float32(dtype)
        made: dict[Rotary, torch.Tensor] = {}

        def factors_of(rotary: Rotary) -> torch.Tensor:
            """[T, H + 2K, d/2]"""
            if rotary not in made:
                turns = rotary.turns(positions, rope_lengths)
                parts = (turns * scale, heads.num_heads), (turns, num_kv), (torch.ones_like(turns), num_kv)
                factors = torch.cat([part[:, None].expand(-1, count, -1) for part, count in parts], dim=1)
                made[rotary] = factors.to(self.wide.to_complex())
            return made[rotary]

        num_rows, num_kv = len(positions), heads.num_kv_heads
        half = len(rotary_of(views[0][0][0]).inv_freq)
        scale = (2 * half) ** -0.5
        self.pairs_shape = (num_rows, heads.num_heads + 2 * num_kv, half, 2)
        self.counts = [view.num_rows for view in views[0][1]]
        out = torch.empty(num_rows, heads.num_heads, 2 * half, dtype=dtype, device=positions.device)
        self.out = out.view(num_rows, -1)
        self.layers: dict[int, tuple[list[_SegmentAttention], int]] = {}
        """Per layer, its group's segments, and the layer's index in the group."""
        for layers, of_sequences in views:
            segments, rotary = [], rotary_of(layers[0])
            for view, rows, lengths, part in zip(
                of_sequences,
                factors_of(rotary).split(self.counts),
                rope_lengths.split(self.counts),
                out.split(self.counts),
                strict=True,
            ):
                slot_factors = None
                if view.anchors is not None:
                    slot_turns = rotary.turns(view.anchors.slots, lengths) * scale
                    slot_factors = slot_turns[:, None].to(self.wide.to_complex())
                segments.append(_SegmentAttention(view, rows, slot_factors, part))
            self.layers |= {layer: (segments, index) for index, layer in enumerate(layers)}

    def __call__(self, qkv: torch.Tensor, layer: int, window: int | None) -> torch.Tensor:
        """Stage the keys and values in `qkv` [T, (H + 2K) * d], and attend. Returns [T, H * d], until the next call."""
        if qkv.dtype != self.wide:
            qkv = qkv.to(self.wide)
        pairs = torch.view_as_complex(qkv.view(self.pairs_shape))
        segments, index = self.layers[layer]
        for segment, rows in zip(segments, pairs.split_with_sizes(self.counts), strict=True):
            segment(rows, index, window)
        return self.out


class _SegmentAttention:
    """The attention of one sequence's rows, with its scratch memory.

    Two matrix products over the KV heads instead of a fused kernel, so that a row's result does not
    depend on how many rows stand beside it.
    """

    def __init__(self, view: View, factors: torch.Tensor, slot_factors: torch.Tensor | None, out: torch.Tensor) -> None:
        """`factors` [t, H + 2K, d/2], what queries, keys and values are multiplied by; `slot_factors` [t, 1, d/2], the
        same for queries that look at anchors; `out` [t, H, d] is filled."""
        count, num_heads, head_dim = out.shape
        num_kv = (factors.shape[1] - num_heads) // 2
        self.view = view
        self.factors = factors
        self.stage = view.stage
        turned = torch.empty_like(factors.transpose(0, 1), memory_format=torch.contiguous_format)
        self.turned = turned.transpose(0, 1)
        self.turned_heads = torch.view_as_real(turned).flatten(-2)  # [H + 2K, t, d]
        self.heads = self.turned_heads.to(out.dtype)  # the same memory, unless the dtype is a narrow one
        self.queries = self.heads[:num_heads].view(num_kv, -1, head_dim)  # [K, G * t, d]
        self.keys_values = self.heads[num_heads:].view(2, num_kv, count, head_dim)
        self.scores = out.new_empty(*self.queries.shape[:2], self.stage.keys[0].shape[-1])
        self.anchors = None
        if view.anchors is not None:
            assert slot_factors is not None
            self.anchors = _AnchorScores(self, view.anchors, slot_factors, num_heads)
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
        self.stage.write(layer, self.keys_values)
        torch.bmm(self.queries, self.stage.keys[layer], out=self.scores)
        if self.anchors is not None:
            self.anchors(pairs, layer)
        if window not in self.masked:
            self.masked[window] = self._mask(window)
        if masked := self.masked[window]:
            scores, bias = masked
            scores.add_(bias)
        torch.softmax(self.scores, dim=-1, out=self.weights)
        torch.bmm(self.weights, self.stage.values[layer], out=self.mixed)
        self.out.copy_(self.mixed_heads)

    def _mask(self, window: int | None) -> Masked | None:
        bias = self.view.mask(window)
        if bias is None:
            return None
        count, num_columns = bias.shape
        return self.scores.unflatten(1, (-1, count))[..., -num_columns:], bias


class _AnchorScores:
    """The scores of a sequence's rows with its anchors, whose distance counts from the rows' slots.

    They take the place of those by true positions, which cost next to nothing to compute along with the rest.
    """

    def __init__(self, attention: _SegmentAttention, anchors: Anchors, factors: torch.Tensor, num_heads: int) -> None:
        """`factors` [t, 1, d/2] turn the queries."""
        self.factors = factors
        self.num_heads = num_heads
        self.chosen = anchors.chosen
        self.keys = [keys[..., : anchors.count] for keys in attention.stage.keys]  # [K, d, A] each
        turned = torch.empty_like(attention.turned.transpose(0, 1)[:num_heads])
        self.turned = turned.transpose(0, 1)
        self.turned_heads = torch.view_as_real(turned).flatten(-2)  # [H, t, d]
        self.heads = self.turned_heads.to(attention.scores.dtype)
        self.queries = self.heads.view_as(attention.queries)
        self.scores = attention.scores[..., : anchors.count]

    def __call__(self, pairs: torch.Tensor, layer: int) -> None:
        torch.mul(pairs[:, : self.num_heads], self.factors, out=self.turned)
        if self.heads is not self.turned_heads:
            self.heads.copy_(self.turned_heads)
        scores = torch.bmm(self.queries, self.keys[layer])
        if self.chosen is not None:
            scores = torch.where(self.chosen, scores, self.scores)
        self.scores.copy_(scores)
