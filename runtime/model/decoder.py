"""One tensor-parallel rank's share of a decoder. Shape legend: attention.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from runtime.mesh.mesh import Mesh
from runtime.model.attention import RowBatch, StepAttention, Views
from runtime.model.kv_cache import CacheMaker, KVCache
from runtime.model.layers import Linear, RowParallelLinear, VocabParallelEmbedding
from runtime.model.rotary import Rotary
from runtime.model.sampler import Logits, TokenChooser
from runtime.model.shard import HeadShard
from runtime.model.spec import ModelSpec

Rowwise = Any
"""[T, D] -> [T, D], row by row: RMSNorm, LayerNorm, or nothing (`unchanged`). Kernels that want one of them say so
(`ModelSpec.beyond_llama`)."""


def unchanged(x: torch.Tensor) -> torch.Tensor:
    """Where a family has no norm."""
    return x


@dataclass(frozen=True)
class DecoderLayer:
    attention_norm: Rowwise
    qkv: Linear
    """Queries, keys and values of this rank's heads in one product: [(H + 2K) * d, D]."""
    head_norm: Rowwise | None
    """RMSNorm or WholeHeadNorm of query and key heads, [T, H + K, d]."""
    output: RowParallelLinear
    mlp_norm: Rowwise
    mlp: Rowwise
    """GatedMLP or PlainMLP."""
    window: int | None
    output_norm: Rowwise = unchanged
    """Of what attention adds."""
    down_norm: Rowwise = unchanged
    """Of what the MLP adds."""
    parallel: bool = False
    """The MLP has the same input as attention, not what attention has been added to."""


@dataclass(frozen=True)
class Decoder(CacheMaker, TokenChooser):
    """Runs rows against KV caches. Every rank of the TP group calls it with the same batch."""

    spec: ModelSpec
    mesh: Mesh
    dtype: torch.dtype
    heads: HeadShard
    vocab_range: tuple[int, int]
    """Token ids [start, stop) whose logits this rank computes."""
    embedding: VocabParallelEmbedding
    layers: tuple[DecoderLayer, ...]
    norm: Rowwise
    head: Linear
    rotary: Rotary
    local_rotary: Rotary | None = None
    """Of layers with a sliding window, where it is another."""

    @torch.inference_mode()
    def forward(self, batch: RowBatch, caches: Sequence[KVCache]) -> torch.Tensor:
        """Run the rows and stage their keys and values. Returns [T, D] before the final norm.

        `caches`: one per group of layers, as `make_caches` gives them.

        The final norm is part of `logits`, so that rows whose logits nobody wants are spared it.
        """
        return self.run(
            batch.columns, [(cache.layers, [segment.view(cache) for segment in batch.segments]) for cache in caches]
        )

    @torch.inference_mode()
    def run(self, columns: torch.Tensor, views: Views) -> torch.Tensor:
        """What `forward` does, from rows [3, T] as RowBatch has them and the sequences' views of their caches.

        Where the views' shapes and addresses are fixed, it is all work for the device, and a CUDA graph can hold it.
        """
        tokens, positions, rope_lengths = columns.unbind(0)
        hidden = self.embedding(tokens)
        attend = StepAttention(positions, rope_lengths, views, self.rotary_of, self.heads, self.dtype)
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.attention_norm(hidden))
            if layer.head_norm is not None:
                to_rotate = qkv.view(len(qkv), -1, self.spec.head_dim)[:, : -self.num_kv_heads]
                to_rotate.copy_(layer.head_norm(to_rotate))
            attended = layer.output_norm(layer.output(attend(qkv, index, layer.window)))
            if layer.parallel:
                attended += layer.mlp(layer.mlp_norm(hidden))
                hidden += attended
                continue
            hidden += attended
            hidden += layer.down_norm(layer.mlp(layer.mlp_norm(hidden)))
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows [R, D] of what `forward` returned -> float32 [R, V_local], token ids as `vocab_range` says.

        float64 stays float64.
        """
        logits = self.head(self.norm(hidden))
        return logits if self.dtype == torch.float64 else logits.float()

    def search(self, hidden: torch.Tensor, k: int, keep_all: bool) -> Logits:
        """The same as the sampler wants it, to be searched for the k largest. `keep_all`: all are wanted, too."""
        return Logits(self.logits(hidden))
