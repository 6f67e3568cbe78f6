"""One tensor-parallel rank's share of a Llama-family decoder. Shape legend: attention.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.cache import KVCache
from runtime.mesh import Mesh
from runtime.model.attention import RowBatch, attend
from runtime.model.layers import GatedMLP, Linear, RMSNorm, RowParallelLinear, VocabParallelEmbedding
from runtime.model.rotary import Rotary, Tables, rotate
from runtime.model.shard import HeadShard
from runtime.model.spec import ModelSpec


@dataclass(frozen=True)
class DecoderLayer:
    attention_norm: RMSNorm
    qkv: Linear
    """Queries, keys and values of this rank's heads in one product: [(H + 2K) * d, D]."""
    head_norm: RMSNorm | None
    """Norm of query and key heads, [H + K, d]."""
    output: RowParallelLinear
    mlp_norm: RMSNorm
    mlp: GatedMLP
    window: int | None


@dataclass(frozen=True)
class Decoder:
    """Runs rows against a KV cache. Every rank of the TP group calls it with the same batch."""

    spec: ModelSpec
    mesh: Mesh
    dtype: torch.dtype
    heads: HeadShard
    vocab_range: tuple[int, int]
    """Token ids [start, stop) whose logits this rank computes."""
    embedding: VocabParallelEmbedding
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    head: Linear
    rotary: Rotary

    @property
    def num_kv_heads(self) -> int:
        """K, which this rank's KV cache is made for."""
        return self.heads.num_kv_heads

    @torch.inference_mode()
    def forward(self, batch: RowBatch, cache: KVCache) -> torch.Tensor:
        """Run the rows and stage their keys and values. Returns [T, D] before the final norm.

        The final norm is part of `logits`, so that rows whose logits nobody wants are spared it.
        """
        hidden = self.embedding(batch.tokens)
        tables = self.rotary.tables(batch.positions, batch.rope_lengths)
        for index, layer in enumerate(self.layers):
            hidden += self._attention(layer, index, layer.attention_norm(hidden), tables, batch, cache)
            hidden += layer.mlp(layer.mlp_norm(hidden))
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows [R, D] of what `forward` returned -> float32 [R, V_local], token ids as `vocab_range` says.

        float64 stays float64.
        """
        logits = self.head(self.norm(hidden))
        return logits if self.dtype == torch.float64 else logits.float()

    def _attention(
        self, layer: DecoderLayer, index: int, x: torch.Tensor, tables: Tables, batch: RowBatch, cache: KVCache
    ) -> torch.Tensor:
        num_heads, num_kv = self.heads.num_heads, self.heads.num_kv_heads
        qkv = layer.qkv(x).view(len(x), num_heads + 2 * num_kv, -1)
        to_rotate, values = qkv.split([num_heads + num_kv, num_kv], dim=1)
        if layer.head_norm is not None:
            to_rotate = layer.head_norm(to_rotate)
        queries, keys = rotate(to_rotate, tables).split([num_heads, num_kv], dim=1)
        return layer.output(attend(queries, keys, values, batch, cache, index, layer.window))
