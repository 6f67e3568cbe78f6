"""CudaDecoder: a forward pass is one copy to the device and one launch, however many sequences the step has.

What differs from step to step stands in a StepBuffer, and all else is fixed: weights, caches, scratch memory, sizes. So
the device's work depends on nothing but the row count, which is filled up to a power of two, and on CUDA a graph per
row count does it. Kernels read where sequences stand and how long they are.

Without a GPU the same decoder calls the eager functions beside the kernels, or the kernels in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from runtime.model.attention import RowBatch
from runtime.model.cuda.activation import gated, gated_eager
from runtime.model.cuda.arrays import PAGE, CacheArrays
from runtime.model.cuda.attention import Parts, Tiling, attend, attend_eager
from runtime.model.cuda.embedding import embed, embed_eager
from runtime.model.cuda.graphs import Graph, Recorder
from runtime.model.cuda.heads import rotate_and_store, rotate_and_store_eager
from runtime.model.cuda.jit import power_of_two
from runtime.model.cuda.moves import move, move_eager
from runtime.model.cuda.norm import Norm, add_norm, add_norm_eager
from runtime.model.cuda.paged_cache import PagedKVCache, pages_of_slot
from runtime.model.cuda.step_buffer import StepBuffer
from runtime.model.cuda.top import DeviceLogits
from runtime.model.decoder import Decoder
from runtime.model.sampler import Logits, TokenChooser
from runtime.retention import LayerGroup

MEMORY_SHARE = 0.85
"""Of the device's free memory, for pages."""


@dataclass(frozen=True)
class Operations:
    """The functions that a step is made of, beside matrix products."""

    embed: Callable[..., torch.Tensor]
    add_norm: Callable[..., torch.Tensor]
    rotate_and_store: Callable[..., None]
    attend: Callable[..., None]
    gated: Callable[..., torch.Tensor]
    move: Callable[..., None]


KERNELS = Operations(embed, add_norm, rotate_and_store, attend, gated, move)
EAGER = Operations(embed_eager, add_norm_eager, rotate_and_store_eager, attend_eager, gated_eager, move_eager)


class CudaDecoder(TokenChooser):
    """Runs a Decoder's rows over paged caches. Same surface; what `forward` returns holds until the next call.

    `min_rows`: every step has at least the shape of so many. Matrix products, and so the last bits of a result, depend
    on the number of rows, so with one shape for steps with and without lookahead a token has the same bits in both.
    """

    def __init__(self, decoder: Decoder, kernels: bool | None = None, min_rows: int = 1) -> None:
        """`kernels`: Triton's, or the eager functions, which run on the CPU only; None: kernels on CUDA."""
        self.decoder = decoder
        self.spec, self.mesh, self.dtype, self.rotary = decoder.spec, decoder.mesh, decoder.dtype, decoder.rotary
        self.heads, self.num_kv_heads, self.vocab_range = decoder.heads, decoder.num_kv_heads, decoder.vocab_range
        self.min_rows = min_rows
        self.kernels = self.mesh.device.type == "cuda" if kernels is None else kernels
        self.operations = KERNELS if self.kernels else EAGER
        windows = {layer.window for layer in decoder.layers} - {None}
        assert len(windows) <= 1, f"one sliding window, not {sorted(map(str, windows))}"
        self.window = next(iter(windows), None)
        self.norms = [(Norm.of(layer.attention_norm), Norm.of(layer.mlp_norm)) for layer in decoder.layers]
        self.head_norms = [None if norm is None else Norm.of(norm) for norm in (x.head_norm for x in decoder.layers)]
        self._recorder = Recorder(self.mesh.device) if self.mesh.device.type == "cuda" else None
        self._steps: dict[tuple[tuple[PagedKVCache, ...], int], _Step] = {}

    @property
    def row_counts(self) -> list[int]:
        """Of the shapes that have been used."""
        return [num_rows for _, num_rows in self._steps]

    def make_caches(
        self, groups: Sequence[LayerGroup], num_slots: int, max_staged: int, num_pages: int | None = None
    ) -> tuple[PagedKVCache, ...]:
        """Empty caches, one per group of layers that keep the same tokens. Raises ConfigError without memory for them.

        `max_staged`: most rows of a step. `num_pages`: of each cache; None: as many as the slots can fill, or, on CUDA,
        as most of the free memory holds.
        """
        wanted = [num_slots * pages_of_slot(group.new(), max_staged) for group in groups]
        if num_pages is None and self.mesh.device.type == "cuda":
            token = 2 * self.num_kv_heads * self.spec.head_dim * self.dtype.itemsize
            size = sum(PAGE * token * len(group.layers) * count for group, count in zip(groups, wanted, strict=True))
            share = min(1.0, MEMORY_SHARE * torch.cuda.mem_get_info(self.mesh.device)[0] / size)
            wanted = [max(math.floor(count * share), 1) for count in wanted]
        kinds = self.num_kv_heads, self.spec.head_dim, max_staged, self.rotary, self.dtype, self.mesh.device
        return tuple(
            PagedKVCache(group, num_slots, *kinds, num_pages=num_pages or count)
            for group, count in zip(groups, wanted, strict=True)
        )

    @torch.inference_mode()
    def forward(self, batch: RowBatch, caches: Sequence[PagedKVCache]) -> torch.Tensor:
        """As Decoder.forward: [T, D] before the final norm. `caches` are of this decoder's `make_caches`.

        One copy to the device if the batch's columns are in the host's memory, else two. Raises OutOfPagesError.
        """
        num_rows = max(power_of_two(batch.num_rows), power_of_two(self.min_rows))
        key = tuple(caches), num_rows
        if key not in self._steps:
            self._steps[key] = _Step(self, caches, num_rows, self._recorder)
        return self._steps[key](batch)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As Decoder.logits; the rows are filled up to a power of two, at least `min_rows`."""
        count = len(hidden)
        missing = max(power_of_two(count), power_of_two(self.min_rows)) - count
        return self.decoder.logits(torch.nn.functional.pad(hidden, (0, 0, 0, missing)))[:count]

    @torch.inference_mode()
    def search(self, hidden: torch.Tensor, k: int, keep_all: bool) -> Logits:
        """As Decoder.search."""
        logits = self.logits(hidden)
        return DeviceLogits(logits.contiguous(), k) if self.kernels else Logits(logits)


class _Step:
    """Steps of one row count over some caches."""

    def __init__(
        self, owner: CudaDecoder, caches: Sequence[PagedKVCache], num_rows: int, recorder: Recorder | None
    ) -> None:
        decoder, device = owner.decoder, owner.mesh.device
        num_heads, head_dim = owner.heads.num_heads, owner.spec.head_dim
        self.owner, self.caches, self.num_rows = owner, tuple(caches), num_rows
        self.tiling = Tiling.of(num_rows, owner.num_kv_heads, owner.heads.group, head_dim)
        self.buffer = StepBuffer(num_rows, caches, owner.window, self.tiling.rows_per_tile(owner.heads.group))
        self.queries = torch.zeros(num_rows, num_heads, head_dim, dtype=owner.dtype, device=device)
        self.slot_queries = torch.zeros_like(self.queries)
        self.out = torch.empty_like(self.queries)
        self.parts = Parts.empty(num_rows, num_heads, head_dim, self.tiling.num_parts, device)
        self.layers = [(0, 0)] * len(decoder.layers)
        """Per layer, its cache, and its index there."""
        for index, cache in enumerate(caches):
            for within, layer in enumerate(cache.layers):
                self.layers[layer] = index, within
        self.run = self._run if recorder is None else Graph(self._run, recorder)

    def __call__(self, batch: RowBatch) -> torch.Tensor:
        """[t, D]"""
        self.buffer.load(batch, self.caches)
        return self.run()[: batch.num_rows]

    def _run(self) -> torch.Tensor:
        """Work for the device alone. [T, D]"""
        owner, operations, rows = self.owner, self.owner.operations, self.buffer.rows
        decoder = owner.decoder
        for cache, header in zip(self.caches, self.buffer.moves, strict=True):
            operations.move(cache.buffer, header, rows.lists)
        turns = self._turns(rows.positions)
        slot_turns = [
            self._turns(cached.slots) if cache.has_slots else None
            for cache, cached in zip(self.caches, self.buffer.cached, strict=True)
        ]
        table = decoder.embedding
        hidden = owner.mesh.all_reduce(operations.embed(rows.tokens, table.table, table.start, table.count))
        added = None
        for index, layer in enumerate(decoder.layers):
            attention_norm, mlp_norm = owner.norms[index]
            which, within = self.layers[index]
            qkv = layer.qkv(operations.add_norm(hidden, added, attention_norm))
            cached = self.buffer.cached[which]
            self._attend(qkv, self.caches[which], within, cached, turns, slot_turns[which], index)
            added = layer.output(self.out.view(self.num_rows, -1))
            gate_up = layer.mlp.gate_up(operations.add_norm(hidden, added, mlp_norm))
            added = layer.mlp.down(operations.gated(gate_up, layer.mlp.activation))
        assert added is not None
        return hidden + added

    def _attend(
        self,
        qkv: torch.Tensor,
        cache: PagedKVCache,
        within: int,
        cached: CacheArrays,
        turns: torch.Tensor,
        slot_turns: torch.Tensor | None,
        layer: int,
    ) -> None:
        """Fill `out` for layer `layer`, which is number `within` of its cache."""
        owner = self.owner
        keys, values = cache.buffer[within]
        slot_queries = self.slot_queries if cache.has_slots else None
        owner.operations.rotate_and_store(
            qkv, turns, slot_turns, owner.head_norms[layer], cached, keys, values, self.queries, slot_queries
        )
        window = None if cache.has_slots else owner.decoder.layers[layer].window
        owner.operations.attend(
            self.queries,
            slot_queries,
            keys,
            values,
            self.buffer.rows,
            cached,
            window,
            cache.has_anchors,
            self.tiling,
            self.parts,
            self.out,
        )

    def _turns(self, positions: torch.Tensor) -> torch.Tensor:
        """[T, d / 2, 2] cosines and sines."""
        turns = torch.view_as_real(self.owner.rotary.turns(positions, self.buffer.rows.rope_lengths))
        return turns if self.owner.dtype == torch.float64 else turns.float()
