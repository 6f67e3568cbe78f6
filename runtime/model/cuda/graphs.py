"""Steps in a few fixed shapes, so that CUDA graphs can hold them.

Launching a step's thousand small kernels one by one takes longer than a GPU needs to run them; a graph launches them at
once. It replays the same kernels on the same addresses and shapes, so a step is brought into a *shape* first (legend:
attention.py): its t rows are filled up to a bucket Tb, and of the cache the first Nb + Tb columns are read, n <= Nb of
them stored ones; columns that a row does not see are masked. What differs from step to step stands in fixed buffers:

    columns [3, Tb]          tokens, positions, prompt lengths
    places  [Tb]             cache columns that the rows' keys and values go to: n, n + 1, ...
    sees    [Tb, Nb + Tb]    the mask, once per sliding window that the model's layers have
    slots   [Tb], chosen [A] the rows' slots and which of the first A columns are anchors, where a policy has such

A row that fills up repeats the step's first row, sees nothing but itself, and goes behind the real ones in the
cache, where the next step writes over it. All cache policies run so. Steps of several sequences, and of more rows than
the largest bucket, run as they are.

On a device without CUDA graphs the same function is simply called with the same buffers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from runtime.mesh.device import pinned
from runtime.model.attention import Anchors, RowBatch, Segment
from runtime.model.decoder import Decoder
from runtime.model.kv_cache import KVCache
from runtime.model.sampler import Logits, TokenChooser
from runtime.retention import LayerGroup

ROW_BUCKETS = (2, 4, 8, 16, 32, 64, 128, 256)
MIN_STORED = 256
MIN_ANCHORS = 16
"""Buckets of stored tokens and of anchors are powers of two from these on, or all that a slot has room for."""


@dataclass(frozen=True)
class Shape:
    """What one graph is made for."""

    slot: int
    num_rows: int
    """Tb"""
    sizes: tuple[tuple[int, int], ...]
    """(Nb, A) of each cache; A = 0: no anchors whose distances count from slots."""


class GraphedDecoder(TokenChooser):
    """A decoder whose steps of one sequence run in fixed shapes, on CUDA as graphs. Same surface as Decoder.

    What `forward` returns holds until the next call.

    A GPU's kernels, and with them the last bits of a result, depend on the number of rows. With `min_rows` every
    decoding step, and the LM head's share of it, has at least the bucket of so many rows. So if lookahead needs no more
    than those, a token decoded alone and the same token verified among candidates run on the very same kernels, and
    near-ties that fall differently become rarer. Rows cost little there, but not nothing.
    """

    def __init__(
        self,
        decoder: Decoder,
        row_buckets: Sequence[int] = ROW_BUCKETS,
        min_rows: int = 1,
        min_stored: int = MIN_STORED,
        max_graphs: int = 64,
    ) -> None:
        """`row_buckets` ascending; `max_graphs` are kept, the least recently used goes first."""
        assert min_rows <= row_buckets[-1], f"no bucket has {min_rows} rows"
        self.decoder = decoder
        self.spec, self.mesh, self.dtype, self.rotary = decoder.spec, decoder.mesh, decoder.dtype, decoder.rotary
        self.heads, self.num_kv_heads, self.vocab_range = decoder.heads, decoder.num_kv_heads, decoder.vocab_range
        self.row_buckets, self.min_rows = tuple(row_buckets), min_rows
        self.min_stored, self.max_graphs = min_stored, max_graphs
        self._recorder = Recorder(self.mesh.device) if self.mesh.device.type == "cuda" else None
        self._steps: OrderedDict[tuple[tuple[KVCache, ...], Shape], _FixedStep] = OrderedDict()

    @property
    def shapes(self) -> list[Shape]:
        """Those kept, least recently used first."""
        return [shape for _, shape in self._steps]

    def forget_graphs(self) -> None:
        """To be called when the mesh has been formed anew: what was recorded speaks to ranks of the old one."""
        self._steps.clear()

    def make_caches(self, groups: Sequence[LayerGroup], num_slots: int, max_staged: int) -> tuple[KVCache, ...]:
        """As Decoder.make_caches, the memory filled with zeros."""
        caches = self.decoder.make_caches(groups, num_slots, max_staged)
        for cache in caches:
            cache.keep_finite()
        return caches

    @torch.inference_mode()
    def forward(self, batch: RowBatch, caches: Sequence[KVCache]) -> torch.Tensor:
        """As Decoder.forward. `caches` are of this decoder's `make_caches`."""
        shape = self._shape(batch, caches)
        if shape is None:
            return self.decoder.forward(batch, caches)
        key = tuple(caches), shape
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = _FixedStep(self.decoder, shape, caches, self._recorder)
            if len(self._steps) > self.max_graphs:
                self._steps.popitem(last=False)
        self._steps.move_to_end(key)
        return step(batch)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As Decoder.logits; the head's rows are filled up to a bucket, too."""
        count = len(hidden)
        missing = (self._row_bucket(count) or count) - count
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, missing)) if missing else hidden
        return self.decoder.logits(padded)[:count]

    def search(self, hidden: torch.Tensor, k: int, keep_all: bool) -> Logits:
        """As Decoder.search."""
        return Logits(self.logits(hidden))

    def _row_bucket(self, count: int) -> int | None:
        return next((bucket for bucket in self.row_buckets if bucket >= max(count, self.min_rows)), None)

    def _shape(self, batch: RowBatch, caches: Sequence[KVCache]) -> Shape | None:
        """The smallest shape that holds a step; None if it is to run as it is."""
        num_rows = self._row_bucket(batch.num_rows)
        if num_rows is None or len(batch.segments) != 1:
            return None
        slot = batch.segments[0].slot
        sizes = []
        for kept in (cache.retained[slot] for cache in caches):
            num_stored = min(_power(kept.num_stored, self.min_stored), kept.max_stored)
            num_anchors = min(_power(kept.num_slot_anchors, MIN_ANCHORS), num_stored) if kept.num_slot_anchors else 0
            sizes.append((num_stored, num_anchors))
        return Shape(slot, min(num_rows, *(cache.max_staged for cache in caches)), tuple(sizes))


def _power(count: int, least: int) -> int:
    """The power of two that holds `count`, at least `least`."""
    return max(least, 1 << max(count - 1, 0).bit_length())


class _FixedStep:
    """Steps of one shape, which differ in the contents of its buffers alone."""

    def __init__(self, decoder: Decoder, shape: Shape, caches: Sequence[KVCache], recorder: Recorder | None) -> None:
        self.columns = torch.zeros(3, shape.num_rows, dtype=torch.int64, device=decoder.mesh.device)
        self.views = []
        for cache, (num_stored, num_anchors) in zip(caches, shape.sizes, strict=True):
            windows = [decoder.layers[layer].window for layer in cache.layers]
            self.views.append(FixedView(cache, shape.slot, shape.num_rows, num_stored, num_anchors, windows))
        views = [(cache.layers, [view]) for cache, view in zip(caches, self.views, strict=True)]

        def run() -> torch.Tensor:
            return decoder.run(self.columns, views)

        self.run = run if recorder is None else Graph(run, recorder)

    def __call__(self, batch: RowBatch) -> torch.Tensor:
        """[t, D]"""
        count = batch.num_rows
        self.columns[:, :count] = batch.columns
        self.columns[:, count:] = batch.columns[:, :1]
        for view in self.views:
            view.load(batch.segments[0])
        return self.run()[:count]


class FixedView:
    """The first Nb + Tb columns of a cache slot as the rows of a step see them (attention.View), step after step."""

    def __init__(
        self, cache: KVCache, slot: int, num_rows: int, num_stored: int, num_anchors: int, windows: Sequence[int | None]
    ) -> None:
        """`windows`: the sliding windows of the layers."""
        assert cache.finite, "columns that no row sees are read, too"
        self.cache, self.retained, self.num_rows = cache, cache.retained[slot], num_rows
        self.windows = list(dict.fromkeys(windows))
        num_columns = num_stored + num_rows
        self.numbers = torch.zeros(2, num_rows, dtype=torch.int64, device=cache.device)
        """The rows' places in the cache, and their slots."""
        size = len(self.windows) * num_rows * num_columns
        self.flags = torch.zeros(size + num_anchors, dtype=torch.bool, device=cache.device)
        """What the rows see under each window, then which columns are anchors."""
        self.sees = self.flags[:size].view(len(self.windows), num_rows, num_columns)
        self.stage = cache.fixed_stage(slot, num_columns, places=self.numbers[0])
        self.anchors = Anchors(num_anchors, self.numbers[1], chosen=self.flags[size:]) if num_anchors else None

    def load(self, segment: Segment) -> None:
        """Fill the buffers for this step."""
        count, start = segment.stop - segment.start, self.retained.num_stored
        numbers = np.zeros(self.numbers.shape, np.int64)
        numbers[0] = np.arange(start, start + self.num_rows)
        flags = np.zeros(self.flags.shape, np.bool_)
        sees = flags[: self.sees.numel()].reshape(self.sees.shape)
        for index, window in enumerate(self.windows):
            seen = segment.sees(self.retained, window)
            sees[index, :count, : start + count] = True if seen is None else seen
        filling = np.arange(count, self.num_rows)
        sees[:, filling, start + filling] = True
        if self.anchors is not None:
            numbers[1, :count] = self.retained.slots(segment.positions)
            flags[self.sees.numel() :][: self.retained.num_slot_anchors] = True
        self.numbers.copy_(pinned(numbers, self.cache.device), non_blocking=True)
        self.flags.copy_(pinned(flags, self.cache.device), non_blocking=True)

    def mask(self, window: int | None) -> torch.Tensor:
        sees = self.sees[self.windows.index(window)]
        bias = torch.zeros(sees.shape, dtype=self.cache.dtype, device=self.cache.device)
        return bias.masked_fill_(~sees, -torch.inf)


class Recorder:
    """The side stream that graphs are recorded on, and their memory: what one needs while it runs, another may use."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()


class Graph:
    """A function that only gives a CUDA device work, on fixed buffers, as a graph.

    The first call is a plain one: it sets libraries and communicators up, and a shape that comes once is not worth a
    recording. The second is recorded. All ranks of a TP group come to record in the same step.
    """

    def __init__(self, run: Callable[[], torch.Tensor], recorder: Recorder) -> None:
        self.run, self.recorder = run, recorder
        self.called = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> torch.Tensor:
        """The function's result; every replay writes it anew, to the same place."""
        if not self.called:
            self.called = True
            return self._run_beside()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            pool, stream = self.recorder.pool, self.recorder.stream
            # thread_local: meanwhile NCCL's watchdog asks after events, from a thread of its own
            with torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
                self.result = self.run()
        self.graph.replay()
        return self.result

    def _run_beside(self) -> torch.Tensor:
        """Run on the side stream, in turn with the current one."""
        stream = self.recorder.stream
        current = torch.cuda.current_stream(stream.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = self.run()
        current.wait_stream(stream)
        return result
