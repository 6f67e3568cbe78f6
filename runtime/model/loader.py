"""From a model's directory to this rank's decoder: each rank reads only its own slice of each tensor."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch

from runtime.errors import ConfigError
from runtime.mesh.mesh import Mesh
from runtime.model.decoder import Decoder, DecoderLayer, Rowwise, unchanged
from runtime.model.layers import (
    GatedMLP,
    LayerNorm,
    LayerWeights,
    Linear,
    NormWeights,
    PlainMLP,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    WholeHeadNorm,
    at_least_float32,
)
from runtime.model.native.decoder import NativeDecoder, obstacle
from runtime.model.rotary import Rotary, pairs_adjacent
from runtime.model.shard import HeadShard, split
from runtime.model.spec import ModelSpec
from runtime.model.weights import HEAD, Checkpoint

log = logging.getLogger(__name__)


def load_decoder(
    directory: Path,
    spec: ModelSpec,
    mesh: Mesh,
    dtype: torch.dtype,
    kernels: Literal["auto", "native", "torch"] = "auto",
) -> Decoder | NativeDecoder:
    """This rank's shard, on mesh.device.

    `kernels`: auto takes the native ones where they can be had (runtime/model/native).

    Raises ConfigError for missing or ill-shaped tensors, too large a tp, or native kernels that cannot be had.
    """
    spec.check_tp(mesh.tp)
    is_native = kernels != "torch" and _has_native(spec, dtype, mesh.device, required=kernels == "native")
    heads = HeadShard.of(spec.num_heads, spec.num_kv_heads, mesh.shard, mesh.tp)
    vocab_range = split(spec.vocab_size, mesh.shard, mesh.tp)
    with torch.no_grad(), Checkpoint(directory, spec, dtype, mesh.device) as checkpoint:
        table = checkpoint.rows(checkpoint.table_name, *vocab_range)
        head = checkpoint.rows(HEAD, *vocab_range) if checkpoint.has_head else table
        if spec.tie_embeddings and torch.equal(head, table):
            head = table  # once in memory; else it is a head of its own, as in transformers, whatever the config says
        norm = _norm_weights(checkpoint, spec, "model.norm")
        scale = spec.hidden_size**0.5 if spec.embedding_scaled else None
        embedding = VocabParallelEmbedding(table, vocab_range[0], mesh, scale)
        rotary = Rotary(spec.rope, mesh.device)
        reader = _LayerReader(checkpoint, spec, heads, mesh)
        layers = (reader.layer(index) for index in range(spec.num_layers))  # read when their turn comes: memory
        if is_native:
            return NativeDecoder(spec, mesh, dtype, heads, vocab_range, embedding, layers, norm.weight, head, rotary)
        return Decoder(
            spec=spec,
            mesh=mesh,
            dtype=dtype,
            heads=heads,
            vocab_range=vocab_range,
            embedding=embedding,
            layers=tuple(_torch_layer(weights, spec, heads, mesh) for weights in layers),
            norm=_norm(norm, spec),
            head=Linear(head),
            rotary=rotary,
            local_rotary=None if spec.local_rope is None else Rotary(spec.local_rope, mesh.device),
        )


def _has_native(spec: ModelSpec, dtype: torch.dtype, device: torch.device, required: bool) -> bool:
    problem = obstacle(spec, dtype, device)
    if problem and required:
        raise ConfigError("model.kernels", "native", problem, "Set model.kernels to auto or torch.")
    if problem:
        log.info("torch kernels are used: %s", problem)
    return problem is None


def _norm(weights: NormWeights | None, spec: ModelSpec) -> Rowwise:
    if weights is None:
        return unchanged
    if weights.bias is not None:
        return LayerNorm(weights.weight, weights.bias, spec.rms_eps)
    return RMSNorm(weights.weight, spec.rms_eps)


def _head_norm(weights: LayerWeights, spec: ModelSpec, heads: HeadShard, mesh: Mesh) -> RMSNorm | WholeHeadNorm | None:
    if weights.head_norm is None:
        return None
    if not spec.qk_norm_whole:
        return RMSNorm(weights.head_norm, spec.rms_eps)
    per_kv = spec.num_heads // spec.num_kv_heads
    # Of the ranks that hold a key head, the one with its first query head
    counted = [heads.query_start <= head * per_kv < heads.query_stop for head in range(heads.kv_start, heads.kv_stop)]
    sizes = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    mask = torch.tensor(counted, device=weights.head_norm.device)
    return WholeHeadNorm(weights.head_norm, spec.rms_eps, heads.num_heads, mask, sizes, mesh)


def _torch_layer(weights: LayerWeights, spec: ModelSpec, heads: HeadShard, mesh: Mesh) -> DecoderLayer:
    up = Linear(weights.gate_up, weights.gate_up_bias)
    down = RowParallelLinear(weights.down, weights.down_bias, mesh)
    return DecoderLayer(
        attention_norm=_norm(weights.attention_norm, spec),
        qkv=Linear(weights.qkv, weights.qkv_bias),
        head_norm=_head_norm(weights, spec, heads, mesh),
        output=RowParallelLinear(weights.output, weights.output_bias, mesh),
        mlp_norm=_norm(weights.mlp_norm, spec),
        mlp=(GatedMLP if spec.gated else PlainMLP)(up, down, spec.activation),
        window=weights.window,
        output_norm=_norm(weights.output_norm, spec),
        down_norm=_norm(weights.down_norm, spec),
        parallel=spec.parallel,
    )


def _norm_weights(checkpoint: Checkpoint, spec: ModelSpec, name: str) -> NormWeights:
    bias = checkpoint.rows(f"{name}.bias") if spec.norm == "layer" else None
    return NormWeights(_offset(checkpoint.rows(f"{name}.weight"), spec), bias)


def _offset(weight: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """A norm's weight; one that is stored less 1 in float32 at least, where the sum is not rounded."""
    return weight.to(at_least_float32(weight.dtype)) + 1 if spec.norm_offset else weight


class _LayerReader:
    """Cuts this rank's share out of each layer's tensors and fuses what is multiplied together."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, heads: HeadShard, mesh: Mesh) -> None:
        self.checkpoint, self.spec, self.heads, self.mesh = checkpoint, spec, heads, mesh

    def layer(self, index: int) -> LayerWeights:
        spec, prefix = self.spec, f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        start, stop = split(spec.intermediate_size, self.mesh.shard, self.mesh.tp)
        attention_norm, output_norm, mlp_norm, down_norm = (
            None if name is None else _norm_weights(self.checkpoint, spec, f"{prefix}.{name}")
            for name in spec.norm_names
        )
        return LayerWeights(
            attention_norm=attention_norm,
            qkv=self._qkv(attention, "weight"),
            qkv_bias=self._qkv(attention, "bias") if spec.qkv_bias else None,
            head_norm=self._head_norm(attention) if spec.qk_norm or spec.qk_norm_whole else None,
            output=self._output(attention),
            output_bias=self.checkpoint.rows(f"{attention}.o_proj.bias") if spec.o_bias else None,
            mlp_norm=mlp_norm,
            gate_up=self._gate_up(mlp, "weight"),
            gate_up_bias=self._gate_up(mlp, "bias") if spec.mlp_bias else None,
            down=self.checkpoint.columns(f"{mlp}.down_proj.weight", start, stop),
            down_bias=self.checkpoint.rows(f"{mlp}.down_proj.bias") if spec.mlp_bias else None,
            window=spec.sliding_windows[index],
            output_norm=output_norm,
            down_norm=down_norm,
        )

    def _qkv(self, name: str, kind: str) -> torch.Tensor:
        heads, dim = self.heads, self.spec.head_dim
        ranges = (
            ("q_proj", heads.query_start, heads.query_stop),
            ("k_proj", heads.kv_start, heads.kv_stop),
            ("v_proj", heads.kv_start, heads.kv_stop),
        )
        query, key, value = (
            self.checkpoint.rows(f"{name}.{part}.{kind}", start * dim, stop * dim) for part, start, stop in ranges
        )
        return torch.cat([self._padded(self._paired(query), axis=0), self._paired(key), value])

    def _output(self, name: str) -> torch.Tensor:
        heads, dim = self.heads, self.spec.head_dim
        weight = self.checkpoint.columns(f"{name}.o_proj.weight", heads.query_start * dim, heads.query_stop * dim)
        return self._padded(weight, axis=1)

    def _paired(self, tensor: torch.Tensor) -> torch.Tensor:
        """Whole heads along the first axis, their features in the order that rotation wants."""
        features = torch.arange(len(tensor), device=tensor.device).view(-1, self.spec.head_dim)
        return tensor[pairs_adjacent(features, self.spec.rope.num_rotated).flatten()]

    def _padded(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Spread the heads along `axis` over the rectangle of HeadShard, zeros between them."""
        if self.heads.num_heads == len(self.heads.slots):
            return tensor
        apart = tensor.unflatten(axis, (len(self.heads.slots), self.spec.head_dim))
        shape = list(apart.shape)
        shape[axis] = self.heads.num_heads
        places = torch.tensor(self.heads.slots, device=tensor.device)
        return apart.new_zeros(shape).index_copy_(axis, places, apart).flatten(axis, axis + 1)

    def _head_norm(self, name: str) -> torch.Tensor:
        heads, dim, rotated = self.heads, self.spec.head_dim, self.spec.rope.num_rotated
        if self.spec.qk_norm_whole:
            query = self.checkpoint.rows(f"{name}.q_norm.weight", heads.query_start * dim, heads.query_stop * dim)
            key = self.checkpoint.rows(f"{name}.k_norm.weight", heads.kv_start * dim, heads.kv_stop * dim)
            weight = torch.cat([self._padded(query, axis=0), key]).view(-1, dim)
            return pairs_adjacent(weight, rotated)
        query = _offset(self.checkpoint.rows(f"{name}.q_norm.weight"), self.spec) * self.spec.query_factor
        key = _offset(self.checkpoint.rows(f"{name}.k_norm.weight"), self.spec)
        weight = torch.cat([query.expand(heads.num_heads, -1), key.expand(heads.num_kv_heads, -1)])
        return pairs_adjacent(weight, rotated)

    def _gate_up(self, name: str, kind: str) -> torch.Tensor:
        start, stop = split(self.spec.intermediate_size, self.mesh.shard, self.mesh.tp)
        parts = ("gate_proj", "up_proj") if self.spec.gated else ("up_proj",)
        return torch.cat([self.checkpoint.rows(f"{name}.{part}.{kind}", start, stop) for part in parts])
