"""NativeDecoder: one tensor-parallel rank's share of a decoder, run by kernels.cpp. The structs here mirror its own."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterable, Sequence
from ctypes import Structure, c_double, c_int64, c_void_p

import numpy as np
import torch

from runtime import core
from runtime.mesh.mesh import Mesh
from runtime.model.attention import RowBatch, Segment
from runtime.model.kv_cache import CacheMaker, KVCache
from runtime.model.layers import LayerWeights, VocabParallelEmbedding
from runtime.model.native.build import available, library
from runtime.model.native.drawing import draw
from runtime.model.rotary import Rotary
from runtime.model.sampler import Logits, Logprobs, Sampled, TokenChooser
from runtime.model.shard import HeadShard
from runtime.model.spec import ModelSpec
from runtime.retention import Ints
from runtime.step import Int32

LANES, PANEL = 16, 32
BLOCK = PANEL
"""Columns of keys: see rule 1 in kernels.cpp."""

WORDS_PER_THREAD = 2**17
"""A further thread joins in for so many words of a layer's weights, times rows: below, waiting for it costs more."""


class _Matrix(Structure):
    _fields_ = [("words", c_void_p), ("bias", c_void_p), ("panels", c_int64), ("depth", c_int64)]


class _Layer(Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "head_norm")),
    ]


class _Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("is_bfloat16", "hidden", "num_heads", "num_kv_heads", "head_dim", "vocabulary")),
        ("eps", c_double),
        ("layers", ctypes.POINTER(_Layer)),
        ("norm", c_void_p),
        ("head", _Matrix),
    ]


class _Segment(Structure):
    _fields_ = [
        ("start", c_int64),
        ("count", c_int64),
        ("slot", c_void_p),
        *((name, c_int64) for name in ("layer_stride", "side_stride", "head_stride", "num_stored", "num_anchors")),
        *((name, c_void_p) for name in ("anchor_turns", "columns", "tails")),
        *((name, c_int64) for name in ("num_columns", "num_tail", "first_in_tails")),
        ("sees", c_void_p),
    ]


class _Place(Structure):
    _fields_ = [("segments", ctypes.POINTER(_Segment)), ("index", c_int64)]


class _Step(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("num_rows", "num_segments", "num_threads")),
        ("places", ctypes.POINTER(_Place)),
        *((name, c_void_p) for name in ("query_turns", "key_turns", "residual", "partial", "scratch")),
    ]


def obstacle(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why NativeDecoder cannot run this model here; None: it can. May compile the kernels."""
    if device.type != "cpu":
        return f"native kernels run on the CPU, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"native kernels compute in float32 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if spec.beyond_llama:
        return f"native kernels do not have {spec.beyond_llama}"
    if spec.activation not in ("silu", "swish"):
        return f"native kernels have the activation silu, not {spec.activation}"
    if spec.o_bias or spec.mlp_bias:
        return "native kernels have no bias behind attention and in the MLP"
    works, reason = available()
    return None if works else reason


class NativeDecoder(CacheMaker, TokenChooser):
    """Does what runtime.model.decoder.Decoder does, with the same surface.

    A row's result is the same, bit for bit, whatever other rows are in the step, however many threads there are, and
    whether its ancestors are in the cache or in the step.
    """

    def __init__(
        self,
        spec: ModelSpec,
        mesh: Mesh,
        dtype: torch.dtype,
        heads: HeadShard,
        vocab_range: tuple[int, int],
        embedding: VocabParallelEmbedding,
        layers: Iterable[LayerWeights],
        norm: torch.Tensor,
        head: torch.Tensor,
        rotary: Rotary,
    ) -> None:
        """`norm` [D], `head` [V_local, D]. Raises BuildError where there are no kernels (`obstacle` tells)."""
        self.spec, self.mesh, self.dtype = spec, mesh, dtype
        self.heads, self.vocab_range = heads, vocab_range
        self.embedding, self.rotary = embedding, rotary
        self._kernels = library()
        self._alive: list[torch.Tensor] = []
        """What the model's pointers point to."""
        packed = [self._layer(weights) for weights in layers]
        self._layers = (_Layer * len(packed))(*packed)
        first = self._layers[0]
        matrices = first.qkv, first.output, first.gate_up, first.down
        self._words_per_layer = sum(matrix.panels * matrix.depth for matrix in matrices) * PANEL
        self._width = -(-spec.hidden_size // PANEL) * PANEL
        """D, padded."""
        self._model = _Model(
            is_bfloat16=dtype == torch.bfloat16,
            hidden=spec.hidden_size,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=spec.head_dim,
            vocabulary=vocab_range[1] - vocab_range[0],
            eps=spec.rms_eps,
            layers=self._layers,
            norm=self._vector(norm),
            head=self._matrix(head),
        )
        self._model_address = ctypes.addressof(self._model)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @torch.inference_mode()
    def forward(self, batch: RowBatch, caches: Sequence[KVCache]) -> torch.Tensor:
        """Run the rows and stage their keys and values. Returns float32 [T, D] before the final norm.

        `caches`: one per group of layers, as `make_caches` gives them.
        """
        num_rows = batch.num_rows
        residual = self._embedded(batch.tokens)
        partial = torch.zeros_like(residual)
        query_turns, key_turns = self._turned(batch.positions, batch.rope_lengths)
        places = _Places(self, batch, caches)
        size = self._kernels.outrider_scratch(self._model_address, num_rows)
        if size > len(self._scratch):
            self._scratch = torch.empty(size, dtype=torch.uint8)
        step = _Step(
            num_rows,
            len(batch.segments),
            self._num_threads(num_rows),
            places.array,
            *(tensor.data_ptr() for tensor in (query_turns, key_turns, residual, partial, self._scratch)),
        )
        num_halves = 2 * len(self._layers)
        at_once = num_halves if self.mesh.tp == 1 else 1  # between half layers the ranks' parts are added up
        for half in range(0, num_halves, at_once):
            self._kernels.outrider_forward(self._model_address, ctypes.byref(step), half, half + at_once)
            if self.mesh.tp > 1:
                self.mesh.all_reduce(partial)
        return residual.add_(partial)[:, : self.spec.hidden_size]

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Vectors of these tokens, zeros behind them. float32 [T, D padded]"""
        residual = torch.empty(len(tokens), self._width)
        table, first, count = self.embedding.table, self.embedding.start, self.embedding.count
        self._kernels.outrider_embed(
            self._model_address, table.data_ptr(), first, count, tokens.data_ptr(), len(tokens), residual.data_ptr()
        )
        return self.mesh.all_reduce(residual) if self.mesh.tp > 1 else residual

    def _turned(self, positions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotation factors of queries, the scores' scale included, and of keys, float32 [T, d] each."""
        rope, scale = self.rotary.rope, self.spec.head_dim**-0.5
        if rope.dynamic is not None:
            turns = self.rotary.turns(positions, lengths)
            return _factors(turns * scale), _factors(turns)
        factors = torch.empty(2, len(positions), self.spec.head_dim)
        frequencies = self.rotary.inv_freq
        given = frequencies.data_ptr(), len(frequencies), rope.attention_scaling, scale, positions.data_ptr()
        self._kernels.outrider_turns(*given, len(positions), factors.data_ptr())
        query_turns, key_turns = factors
        return query_turns, key_turns

    def choose(
        self,
        hidden: torch.Tensor,
        wanted: Ints,
        top_k: int,
        sampled: Sampled | None = None,
        logprobs: Logprobs | None = None,
    ) -> Int32:
        """As TokenChooser.choose."""
        if sampled is not None or logprobs is not None or self.mesh.tp > 1:
            return super().choose(hidden, wanted, top_k, sampled, logprobs)
        results = np.empty((len(wanted), 1 + top_k), np.int32)
        given = len(wanted), hidden.data_ptr(), hidden.stride(0), wanted.ctypes.data, top_k, results.ctypes.data
        self._kernels.outrider_choose(self._model_address, *given, self._num_threads(len(wanted)))
        return results

    def draw(
        self, logits: torch.Tensor, sampled: Sampled, mesh: Mesh, vocab_range: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As TokenChooser.draw."""
        return draw(self._kernels, logits, sampled, mesh, vocab_range, torch.get_num_threads())

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows [R, D] of what `forward` returned -> float32 [R, V_local], token ids as `vocab_range` says."""
        return self.search(hidden, 0, keep_all=True).values

    @torch.inference_mode()
    def search(self, hidden: torch.Tensor, k: int, keep_all: bool) -> Logits:
        """The same, searched for the k largest. `keep_all`: the others are wanted, too."""
        num_rows, head = len(hidden), self._model.head
        rows = torch.zeros(num_rows, self._width)
        rows[:, : self.spec.hidden_size] = hidden
        logits = torch.empty(num_rows if keep_all else 0, head.panels * PANEL)
        largest = torch.empty(num_rows, head.panels + LANES)
        model = self._model_address
        scratch = torch.empty(self._kernels.outrider_head_scratch(model, num_rows), dtype=torch.uint8)
        values, wholes = torch.empty(num_rows, k), torch.empty(num_rows)
        places = torch.empty(num_rows, k, dtype=torch.int64)
        given = (rows.data_ptr(), scratch.data_ptr(), logits.data_ptr() if keep_all else None, largest.data_ptr())
        results = (tensor.data_ptr() for tensor in (values, places, wholes))
        self._kernels.outrider_search(model, num_rows, *given, k, *results, self._num_threads(num_rows))
        return NativeLogits(logits[:, : self._model.vocabulary], values, places, wholes)

    def _num_threads(self, num_rows: int) -> int:
        return min(torch.get_num_threads(), 1 + self._words_per_layer * num_rows // WORDS_PER_THREAD)

    def _layer(self, weights: LayerWeights) -> _Layer:
        assert weights.attention_norm is not None and weights.mlp_norm is not None, "see `obstacle`"
        gate, up = (_padded(half, LANES).unflatten(0, (-1, LANES)) for half in weights.gate_up.chunk(2))
        head_norm = None if weights.head_norm is None else self._kept(weights.head_norm.float())
        return _Layer(
            qkv=self._matrix(weights.qkv, weights.qkv_bias),
            output=self._matrix(weights.output),
            gate_up=self._matrix(torch.stack([gate, up], dim=1).flatten(0, 2)),
            down=self._matrix(weights.down),
            attention_norm=self._vector(weights.attention_norm.weight),
            mlp_norm=self._vector(weights.mlp_norm.weight),
            head_norm=head_norm,
        )

    def _matrix(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> _Matrix:
        """Pack [out, in] into panels [panels, depth, 32 outputs, features of a word]."""
        per_word = 4 // weight.itemsize
        even = _padded(_padded(weight, PANEL).T, per_word).T
        words = even.unflatten(0, (-1, PANEL)).unflatten(2, (-1, per_word)).transpose(1, 2)
        panels, depth = words.shape[:2]
        return _Matrix(self._kept_in_huge_pages(words), None if bias is None else self._vector(bias), panels, depth)

    def _vector(self, values: torch.Tensor) -> int:
        return self._kept(_padded(values.float(), PANEL))

    def _kept(self, tensor: torch.Tensor) -> int:
        """The address of a contiguous copy that lives as long as this decoder."""
        self._alive.append(tensor.contiguous())
        return self._alive[-1].data_ptr()

    def _kept_in_huge_pages(self, tensor: torch.Tensor) -> int:
        """The same, in pages of 2 MiB where the system gives them: a step reads all weights, and looking up the
        place of every 4 KiB of them costs some 4 % of it."""
        size = tensor.numel() * tensor.itemsize
        memory = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        kept = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
        return self._kept(kept.copy_(tensor))


class NativeLogits(Logits):
    """Logits that have been searched. `values` is empty unless all were to be kept."""

    def __init__(self, values: torch.Tensor, top: torch.Tensor, places: torch.Tensor, wholes: torch.Tensor) -> None:
        """`values` [R, V_local]; `top` and `places` [R, k] and `wholes` [R] are what `Logits.top` gives."""
        super().__init__(values)
        self._top = top, places, wholes

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        values, places, _ = self._top
        return values[:, 0], places[:, 0]

    def top(self, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert k == self._top[0].shape[1], "the step's k is told to `search`"
        return self._top


class _Places:
    """The C arrays that say where the layers of one step find their keys. They live as long as this object."""

    def __init__(self, decoder: NativeDecoder, batch: RowBatch, caches: Sequence[KVCache]) -> None:
        self.decoder, self.batch = decoder, batch
        self.alive: list[object] = []
        """What the arrays' pointers point to."""
        windows = decoder.spec.sliding_windows
        self.array = (_Place * len(windows))()
        for cache in caches:
            kinds = {window: self._segments(cache, window) for window in {windows[layer] for layer in cache.layers}}
            for index, layer in enumerate(cache.layers):
                self.array[layer] = _Place(kinds[windows[layer]], index)

    def _segments(self, cache: KVCache, window: int | None) -> ctypes.Array[_Segment]:
        segments = [self._segment(segment, cache, window) for segment in self.batch.segments]
        self.alive.append(array := (_Segment * len(segments))(*segments))
        return array

    def _segment(self, segment: Segment, cache: KVCache, window: int | None) -> _Segment:
        count, retained = segment.stop - segment.start, cache.retained[segment.slot]
        assert count <= cache.max_staged, f"{count} rows staged, room for {cache.max_staged}"
        slot_stride, layer_stride, side_stride, head_stride, *_ = cache.buffer.stride()
        found = _Segment(
            start=segment.start,
            count=count,
            slot=cache.buffer.data_ptr() + segment.slot * slot_stride * cache.buffer.itemsize,
            layer_stride=layer_stride,
            side_stride=side_stride,
            head_stride=head_stride,
            num_stored=retained.num_stored,
            num_anchors=retained.num_slot_anchors,
        )
        if found.num_anchors:
            slots = torch.from_numpy(retained.slots(segment.positions))
            lengths = self.batch.rope_lengths[segment.start : segment.stop]
            factors, _ = self.decoder._turned(slots, lengths)
            self.alive.append(factors)
            found.anchor_turns = factors.data_ptr()
        keys = core.Keys(retained, segment.positions, segment.tokens, segment.parents, window, BLOCK)
        self.alive.append(keys)
        found.columns, found.tails, found.sees = keys.addresses()
        found.num_columns, found.num_tail, found.first_in_tails = keys.num_columns, keys.num_tail, keys.num_shared
        return found


def _factors(turns: torch.Tensor) -> torch.Tensor:
    """Complex [t, d / 2] -> float32 [t, d]."""
    return torch.view_as_real(turns.to(torch.complex64)).flatten(1).contiguous()


def _padded(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """Zeros behind the first dimension, up to a multiple."""
    missing = -len(tensor) % multiple
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor
