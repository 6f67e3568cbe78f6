"""StepBuffer: all that differs from step to step, in one host buffer that is copied once.

Its first part has fixed places for T rows; behind it stand the lists, of which only what is used is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.model.attention import RowBatch, Segment
from runtime.model.cuda.arrays import ANCHOR_BIT, CHUNK, DEPTH, CacheArrays, ChoiceArrays, RowArrays
from runtime.model.cuda.paged_cache import PagedKVCache, Pages
from runtime.model.sampler import GREEDY_BELOW, Sampled
from runtime.step import Row, Seq

HEADER = 16
"""Words: counts, then for each cache where its moves stand in the lists, and how many they are."""
NUM_ROW_ARRAYS = 8
NUM_CHOICE_ARRAYS = 7
NUM_CACHE_ARRAYS = 8
FIRST_CACHE_ARRAY = NUM_ROW_ARRAYS + NUM_CHOICE_ARRAYS
ONE = int(np.float32(1).view(np.int32))
SAMPLING = (Seq.TEMPERATURE, Seq.TOP_K, Seq.TOP_P, Seq.SEED_LOW, Seq.SEED_HIGH)
"""Columns of a sequence's line that ChoiceArrays has."""

Ints = NDArray[np.int64]


class StepBuffer:
    def __init__(self, num_rows: int, caches: Sequence[PagedKVCache], window: int | None, rows_per_tile: int) -> None:
        """`num_rows`: T; `window`: the sliding window of those of the model's layers that have one."""
        assert 2 + 2 * len(caches) <= HEADER
        self.num_rows, self.window, self.rows_per_tile = num_rows, window, rows_per_tile
        self.device = device = caches[0].device
        num_fixed = HEADER + (FIRST_CACHE_ARRAY + NUM_CACHE_ARRAYS * len(caches)) * num_rows
        num_listed = sum(cache.num_pages + 4 * cache.max_staged for cache in caches) + num_rows * (num_rows + 1) // 2
        host = torch.zeros(num_fixed + num_listed, dtype=torch.int32)
        self.host = host.pin_memory() if device.type == "cuda" else host
        self.buffer = torch.zeros(len(host), dtype=torch.int32, device=device)
        self.array = self.host.numpy()
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

        arrays = self.buffer[HEADER:num_fixed].view(-1, num_rows)
        tokens, positions, rope_lengths, dense_stop, diverged, path_start = arrays[:6]
        self.columns = arrays[:3]
        """[3, T] tokens, positions, prompt lengths."""
        lists = self.buffer[num_fixed:]
        counts, tiles = self.buffer[:2], arrays[6:8]
        self.rows = RowArrays(counts, tokens, positions, rope_lengths, dense_stop, diverged, path_start, tiles, lists)
        self.choices = ChoiceArrays(*arrays[NUM_ROW_ARRAYS:FIRST_CACHE_ARRAY])
        per_cache = arrays[FIRST_CACHE_ARRAY:].view(len(caches), NUM_CACHE_ARRAYS, num_rows)
        self.cached = [CacheArrays(*part) for part in per_cache]
        self.moves = [self.buffer[2 + 2 * index : 4 + 2 * index] for index in range(len(caches))]
        """Per cache, the header that `move` wants."""
        self._fixed = self.array[HEADER:num_fixed].reshape(-1, num_rows)
        self._lists = self.array[num_fixed:]
        self._num_fixed = num_fixed

    def load(
        self,
        batch: RowBatch,
        caches: Sequence[PagedKVCache],
        wanted: Ints | None = None,
        sampled: Sampled | None = None,
    ) -> None:
        """Describe a step of at most T rows, and send it. Raises OutOfPagesError.

        `wanted` [R], the rows that choose a token, and which of them by chance.
        """
        assert batch.num_rows <= self.num_rows
        if self._copied is not None:
            self._copied.synchronize()  # the copy of the step before, done long ago
        fixed, lists = self._fixed, _Lists(self._lists)
        fixed.fill(0)
        fixed[FIRST_CACHE_ARRAY:].reshape(len(caches), NUM_CACHE_ARRAYS, -1)[:, :2] = -1
        self._load_choices(wanted, sampled)
        for index, cache in enumerate(caches):
            moves = cache.begin_step()
            self.array[2 + 2 * index : 4 + 2 * index] = lists.add(moves.ravel()), moves.shape[1]
        on_host = batch.columns.device.type == "cpu"
        if on_host:
            fixed[:3, : batch.num_rows] = batch.columns.numpy()
        num_tiles = 0
        for segment in batch.segments:
            num_tiles = self._load_segment(segment, caches, lists, num_tiles)
        self.array[:2] = batch.num_rows, num_tiles
        used = self._num_fixed + lists.used
        self.buffer[:used].copy_(self.host[:used], non_blocking=True)
        if not on_host:
            self.columns[:, : batch.num_rows].copy_(batch.columns)
        if self._copied is not None:
            self._copied.record()

    def _load_choices(self, wanted: Ints | None, sampled: Sampled | None) -> None:
        arrays = self._fixed[NUM_ROW_ARRAYS:FIRST_CACHE_ARRAY]
        arrays[3] = ONE
        if wanted is not None:
            arrays[0, : len(wanted)] = wanted
        if sampled is not None:
            arrays[1:6, sampled.index] = sampled.sequences[:, SAMPLING].T
            cold = arrays[1].view(np.float32) < GREEDY_BELOW
            arrays[1, cold] = 0
            arrays[6, sampled.index] = sampled.rows[:, Row.POSITION] + 1

    def _load_segment(self, segment: Segment, caches: Sequence[PagedKVCache], lists: _Lists, num_tiles: int) -> int:
        rows, positions = slice(segment.start, segment.stop), segment.positions
        in_place, diverged, path_start, path = paths(segment)
        if len(path):
            may_anchor = np.zeros(len(positions), np.bool_)
            for cache in caches:
                may_anchor |= cache.retained[segment.slot].may_anchor(positions, segment.tokens)
            path = segment.start + path + np.where(may_anchor[path], ANCHOR_BIT, 0)
        dense_stop = np.minimum(np.maximum(positions - DEPTH, 0), diverged) // CHUNK * CHUNK
        self._fixed[3:6, rows] = dense_stop, diverged, lists.add(path) + path_start
        for index, cache in enumerate(caches):
            per_cache = self._fixed[FIRST_CACHE_ARRAY + NUM_CACHE_ARRAYS * index :][:NUM_CACHE_ARRAYS, rows]
            self._load_cache(per_cache, cache, segment, in_place, diverged, lists)
        starts = np.arange(segment.start, segment.stop, self.rows_per_tile)
        stop = num_tiles + len(starts)
        self._fixed[6, num_tiles:stop] = starts
        self._fixed[7, num_tiles:stop] = np.minimum(starts + self.rows_per_tile, segment.stop)
        return stop

    def _load_cache(
        self,
        arrays: NDArray[np.int32],
        cache: PagedKVCache,
        segment: Segment,
        in_place: NDArray[np.bool_],
        diverged: Ints,
        lists: _Lists,
    ) -> None:
        """`arrays` [NUM_CACHE_ARRAYS, t] in the order of CacheArrays."""
        slot, positions, retained = segment.slot, segment.positions, cache.retained[segment.slot]
        staged = cache.stage(slot, segment.tokens, positions, in_place, segment.start)
        arrays[0], arrays[1] = staged.places, staged.anchor_places
        arrays[2] = _table(lists, cache.runs[slot])
        if cache.has_anchors:
            known = cache.anchor_positions[slot]
            arrays[3], arrays[6] = _table(lists, cache.anchors[slot]), len(known)
            if cache.window is not None:
                known = np.concatenate([known, positions[staged.anchor_places >= 0]])
                arrays[6] = np.searchsorted(known, np.minimum(positions - cache.window, diverged - 1), side="right")
            if self.window is not None and not cache.has_slots:
                arrays[5] = np.searchsorted(known, positions - self.window, side="right")
        arrays[4] = cache.lowest(slot, positions)
        arrays[7] = retained.slots(positions) if cache.has_slots else positions


class _Lists:
    """An array that is filled from its start."""

    def __init__(self, array: NDArray[np.int32]) -> None:
        self.array, self.used = array, 0

    def add(self, values: Sequence[int] | Ints) -> int:
        """Where they stand now."""
        start, self.used = self.used, self.used + len(values)
        self.array[start : self.used] = values
        return start


def _table(lists: _Lists, pages: Pages) -> int:
    return lists.add(pages.pages) - pages.first


def paths(segment: Segment) -> tuple[NDArray[np.bool_], Ints, Ints, Ints]:
    """Which rows stand where their positions are, and how the others are reached.

    Returns `in_place` [t]; `diverged` [t], as RowArrays has it; and for each row the start [t] in a list of rows of the
    segment, [P], of those on its path that are not in place.
    """
    positions = segment.positions
    if len(positions) == 1 or (np.diff(positions) == 1).all():  # a chain: a prompt's chunk, or a single row
        none = np.zeros(len(positions), np.int64)
        return np.ones(len(positions), np.bool_), positions + 1, none, none[:0]
    ancestors = segment.ancestors
    is_first = np.zeros(len(positions), np.bool_)
    is_first[np.unique(positions, return_index=True)[1]] = True
    in_place: NDArray[np.bool_] = np.logical_not(np.any(ancestors & ~is_first, axis=1))
    on_path = ancestors & ~in_place
    lengths: Ints = on_path.sum(axis=1)
    return in_place, positions + 1 - lengths, np.cumsum(lengths) - lengths, np.nonzero(on_path)[1].astype(np.int64)
