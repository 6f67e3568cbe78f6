"""CudaDecoder: a step is one copy to the device, one launch and one copy back, however many sequences it has.

What differs from step to step stands in a StepBuffer, and all else is fixed: weights, caches, scratch memory, sizes. So
the device's work depends on nothing but the shape: how many rows there are and how many of them choose a token, both
filled up to powers of two, and whether any draws it. On CUDA a graph per shape does it, from the embedding to the
chosen tokens. Kernels read where sequences stand and how long they are.

Without a GPU the same decoder calls the eager functions beside the kernels, or the kernels in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.errors import ConfigError
from runtime.model.attention import RowBatch
from runtime.model.cuda.activation import gated, gated_eager
from runtime.model.cuda.arrays import PAGE, CacheArrays
from runtime.model.cuda.attention import Parts, Tiling, attend, attend_eager
from runtime.model.cuda.draw import draw, draw_eager, least_kept, least_kept_eager
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
from runtime.model.sampler import Logits, Logprobs, Parameters, Sampled, TokenChooser, best_of_shards, top_tokens
from runtime.model.shard import split
from runtime.retention import LayerGroup
from runtime.step import MOST_TOP_K, Int32

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
    search: Callable[[torch.Tensor, int], Logits]
    least_kept: Callable[..., torch.Tensor]
    draw: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _plain_search(values: torch.Tensor, k: int) -> Logits:
    return Logits(values)


KERNELS = Operations(embed, add_norm, rotate_and_store, attend, gated, move, DeviceLogits, least_kept, draw)
EAGER = Operations(
    embed_eager,
    add_norm_eager,
    rotate_and_store_eager,
    attend_eager,
    gated_eager,
    move_eager,
    _plain_search,
    least_kept_eager,
    draw_eager,
)


@dataclass(frozen=True)
class Choosing:
    """What a step's rows are asked for; with the number of rows, its shape."""

    num_rows: int
    """R that choose a token, a power of two."""
    top_k: int
    """Likeliest tokens wanted of each."""
    draws: bool
    """Some choose by chance."""
    filters: bool
    """Some of those by top-k or top-p."""


class CudaDecoder(TokenChooser):
    """Runs a Decoder's rows over paged caches. Same surface; what `forward` returns holds until the next call.

    `min_rows`: every step has at least the shape of so many. Matrix products, and so the last bits of a result, depend
    on the number of rows, so with one shape for steps with and without lookahead a token has the same bits in both.
    """

    def __init__(self, decoder: Decoder, kernels: bool | None = None, min_rows: int = 1, graphs: bool = True) -> None:
        """`kernels`: Triton's, or the eager functions, which run on the CPU only; None: kernels on CUDA. `graphs`: CUDA
        graphs, where there are such."""
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
        self.final_norm = Norm.of(decoder.norm)
        self.head_norms = [None if norm is None else Norm.of(norm) for norm in (x.head_norm for x in decoder.layers)]
        records = graphs and self.mesh.device.type == "cuda" and self.mesh.can_record
        self._recorder = Recorder(self.mesh.device) if records else None
        self._steps: dict[tuple[tuple[PagedKVCache, ...], int], _Step] = {}

    def forget_graphs(self) -> None:
        """To be called when the mesh has been formed anew: what was recorded speaks to ranks of the old one."""
        self._steps.clear()

    @property
    def batch_device(self) -> torch.device:
        """The host's memory: columns go with all else."""
        return torch.device("cpu")

    @property
    def row_counts(self) -> list[int]:
        """Of the shapes that have been used."""
        return [num_rows for _, num_rows in self._steps]

    def padded(self, num_rows: int) -> int:
        """The rows that a step of so many is filled up to."""
        return max(power_of_two(num_rows), power_of_two(self.min_rows))

    def make_caches(
        self, groups: Sequence[LayerGroup], num_slots: int, max_staged: int, num_pages: int | None = None
    ) -> tuple[PagedKVCache, ...]:
        """Empty caches, one per group of layers that keep the same tokens. Raises ConfigError without memory for them.

        `max_staged`: most rows of a step. `num_pages`: of each cache; None: as many as the slots can fill, or, on CUDA,
        as most of the free memory holds, but at least what one slot can fill.
        """
        least = [pages_of_slot(group.new(), max_staged) for group in groups]
        wanted = [num_slots * count for count in least]
        if num_pages is None and self.mesh.device.type == "cuda":
            token = 2 * self.num_kv_heads * self.spec.head_dim * self.dtype.itemsize
            size = sum(PAGE * token * len(group.layers) * count for group, count in zip(groups, wanted, strict=True))
            torch.cuda.empty_cache()  # what loading needed
            free = torch.cuda.mem_get_info(self.mesh.device)[0]
            wanted = shared_pages(wanted, least, MEMORY_SHARE * free / size, groups[0].new().max_stored)
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
        return self._step_of(batch, caches).forward(batch)

    @torch.inference_mode()
    def step(
        self,
        batch: RowBatch,
        caches: Sequence[PagedKVCache],
        wanted: NDArray[np.int64],
        top_k: int,
        sampled: Sampled | None = None,
        logprobs: Logprobs | None = None,
    ) -> Int32:
        """As TokenChooser.step: one copy there, one launch, one copy back, but where a row's choice takes more than
        temperature, top-k and top-p. Raises OutOfPagesError."""
        if logprobs is not None or sampled is not None and not _is_plain(sampled):
            return super().step(batch, caches, wanted, top_k, sampled, logprobs)
        step = self._step_of(batch, caches)
        if not len(wanted):
            step.forward(batch)
            return np.zeros((0, 1 + top_k), np.int32)
        filters = sampled is not None and bool(Parameters(sampled.sequences).is_filtered.any())
        choosing = Choosing(self.padded(len(wanted)), top_k, sampled is not None, filters)
        return step.choose(batch, wanted, choosing, sampled)

    def _step_of(self, batch: RowBatch, caches: Sequence[PagedKVCache]) -> _Step:
        key = tuple(caches), self.padded(batch.num_rows)
        if key not in self._steps:
            self._steps[key] = _Step(self, caches, key[1], self._recorder)
        return self._steps[key]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As Decoder.logits; the rows are filled up to a power of two, at least `min_rows`."""
        count = len(hidden)
        return self._head(torch.nn.functional.pad(hidden, (0, 0, 0, self.padded(count) - count)))[:count]

    @torch.inference_mode()
    def search(self, hidden: torch.Tensor, k: int, keep_all: bool) -> Logits:
        """As Decoder.search."""
        return self.operations.search(self.logits(hidden).contiguous(), k)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, D] -> [R, V_local], as Decoder.logits."""
        logits = self.decoder.head(self.operations.add_norm(hidden, None, self.final_norm))
        return logits if self.dtype == torch.float64 else logits.float()


def shared_pages(wanted: Sequence[int], least: Sequence[int], share: float, capacity: int) -> list[int]:
    """Of the pages that each cache wants, as many as this share of the memory for all of them holds.

    Raises ConfigError where that is fewer than one slot's, `least`, which has room for `capacity` tokens.
    """
    found = [math.floor(count * min(share, 1.0)) for count in wanted]
    if any(have < need for have, need in zip(found, least, strict=True)):
        problem = f"the GPU's free memory has room for {min(found)} pages of {PAGE} tokens, and one sequence takes"
        problem += f" {max(least)}"
        remedy = "Lower it, choose a smaller model, or split it with parallel.tp."
        raise ConfigError("cache.capacity", capacity, problem, remedy)
    return found


def _is_plain(sampled: Sampled) -> bool:
    """Whether what the kernels of draw.py know decides."""
    more = sampled.counts, sampled.biases, sampled.mask_of
    return all(part is None for part in more) and not (Parameters(sampled.sequences).min_p > 0).any()


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
        self._recorder = recorder
        self._runs: dict[Choosing | None, Callable[[], torch.Tensor]] = {}
        on_gpu = device.type == "cuda"
        self._results = torch.empty(num_rows, 1 + MOST_TOP_K, dtype=torch.int32, pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None

    def forward(self, batch: RowBatch) -> torch.Tensor:
        """[t, D]"""
        self.buffer.load(batch, self.caches)
        return self._run_of(None)()[: batch.num_rows]

    def choose(self, batch: RowBatch, wanted: NDArray[np.int64], choosing: Choosing, sampled: Sampled | None) -> Int32:
        """[R, 1 + top_k]: the chosen token and, packed, the likeliest ones."""
        self.buffer.load(batch, self.caches, wanted, sampled)
        found = self._run_of(choosing)()
        results = self._results.view(-1)[: found.numel()].view(found.shape)
        results.copy_(found, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
            self._arrived.synchronize()
        return results[: len(wanted)].numpy().copy()

    def _run_of(self, choosing: Choosing | None) -> Callable[[], torch.Tensor]:
        if choosing not in self._runs:
            run = partial(self._run, choosing)
            self._runs[choosing] = run if self._recorder is None else Graph(run, self._recorder)
        return self._runs[choosing]

    def _run(self, choosing: Choosing | None) -> torch.Tensor:
        """Work for the device alone: [T, D], or, where rows choose, int32 [R, 1 + top_k]."""
        hidden = self._hidden()
        return hidden if choosing is None else self._chosen(hidden, choosing)

    def _chosen(self, hidden: torch.Tensor, choosing: Choosing) -> torch.Tensor:
        owner, choices = self.owner, self.buffer.choices
        mesh, vocab_range = owner.mesh, owner.vocab_range
        logits = owner._head(hidden.index_select(0, choices.rows[: choosing.num_rows]))
        searched = owner.operations.search(logits, max(choosing.top_k, 1))
        values, places = searched.best()
        if choosing.draws:
            least = owner.operations.least_kept(self._whole(logits), choices) if choosing.filters else None
            values, places = owner.operations.draw(logits, least, choices, vocab_range[0])
        found = [best_of_shards(values, places.long(), mesh, vocab_range)[:, None]]
        if choosing.top_k:
            found.append(top_tokens(searched, choosing.top_k, mesh, vocab_range))
        return torch.cat(found, dim=1).int()

    def _whole(self, logits: torch.Tensor) -> torch.Tensor:
        """The shards' slices side by side, filled up with -inf. [R, >= V]"""
        mesh, size = self.owner.mesh, self.owner.spec.vocab_size
        if mesh.tp == 1:
            return logits
        widest = max(stop - start for start, stop in (split(size, shard, mesh.tp) for shard in range(mesh.tp)))
        padded = torch.nn.functional.pad(logits, (0, widest - logits.shape[1]), value=-torch.inf)
        return torch.cat(mesh.all_gather(padded), dim=1)

    def _hidden(self) -> torch.Tensor:
        """[T, D] before the final norm."""
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
