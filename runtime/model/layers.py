"""Linear layers and embeddings, split over the tensor-parallel ranks, and the norm between them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from runtime.mesh.mesh import Mesh

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")  # oneDNN makes kernels per shape, and keeps 1024

PACKING_HINT = 16
"""Rows for which oneDNN lays out a reordered weight; the layout serves every number of rows."""


class Linear:
    """x @ weight.T + bias for a weight [out, in] that never changes.

    On a CPU the weight is reordered once into oneDNN's blocked layout: faster, and in float32 a row's
    result does not depend on how many rows are computed with it. That is what keeps a token decoded
    alone and the same token verified among candidates equal to the last bit. A single row would take
    another kernel, so it is computed as two.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.bias = bias
        self.packed = can_pack(weight)
        self.weight = weight
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKING_HINT)
            self.product = torch.ops.mkldnn._linear_pointwise.default  # bound here: looking it up costs 3 us a call

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        if x.shape[0] == 1:  # len() is a Python function of torch's
            return self.product(x.repeat(2, 1), self.weight, self.bias, "none", [], "")[:1]
        return self.product(x, self.weight, self.bias, "none", [], "")


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this machine's oneDNN has the reordered kernel for the weight's dtype and device."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn or weight.numel() == 0:
        return False
    match weight.dtype:
        case torch.float32:
            return True
        case torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        case torch.float16:
            return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False


class RowParallelLinear:
    """A linear layer whose input features are split over the ranks: each adds its share of the sum."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, mesh: Mesh) -> None:
        """`weight` [out, in_local]; `bias` [out], whole on every rank, is added once, after the sum."""
        self.linear = Linear(weight)
        self.bias = bias
        self.mesh = mesh

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in_local] -> [T, out], the same on every rank."""
        y = self.mesh.all_reduce(self.linear(x))
        return y if self.bias is None else y.add_(self.bias)


class VocabParallelEmbedding:
    """Token vectors, the vocabulary split over the ranks; a rank contributes zeros for others' tokens."""

    def __init__(self, weight: torch.Tensor, start: int, mesh: Mesh, scale: float | None = None) -> None:
        """`weight` [V_local, D] holds the tokens from `start` on. `scale`: what vectors are multiplied by, rounded to
        the weights' type."""
        self.start, self.count = start, len(weight)
        self.scale = None if scale is None else torch.tensor(scale, dtype=weight.dtype, device=weight.device)
        self.table = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
        self.mesh = mesh

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [T] -> [T, D]."""
        local = tokens - self.start
        outside = (local < 0) | (local >= self.count)
        vectors = self.mesh.all_reduce(F.embedding(local.masked_fill_(outside, self.count), self.table))
        return vectors if self.scale is None else vectors.mul_(self.scale)


class RMSNorm:
    """x / rms(x) * weight over the last dimension, computed in float32 at least.

    Six small operations: on a CPU that is several times faster than torch's composite rms_norm. All but
    the sum, which runs along a row, are rounded correctly, so rows have no influence on each other.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        """`weight` [D], or [heads, d] where every head has its own. In float32 for rows of a half type, the product is
        rounded once, behind it."""
        size = weight.shape[-1]
        self.narrow = weight.dtype.itemsize < 4
        # x / sqrt(sum(x^2) / D + eps) = x / sqrt(sum(x^2) + D * eps) * sqrt(D)
        self.floor = torch.tensor(size * eps, dtype=at_least_float32(weight.dtype), device=weight.device)
        self.root = math.sqrt(size)
        self.weight = weight if self.narrow else weight * self.root

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] or [T, heads, d], same shape back."""
        wide = x.to(self.floor.dtype)
        scale = (wide * wide).sum(-1, keepdim=True).add_(self.floor).rsqrt_()
        if self.narrow:  # round where Hugging Face does
            return (wide * scale.mul_(self.root)).to(x.dtype).mul_(self.weight)
        return (wide * scale).mul_(self.weight).to(x.dtype)


class LayerNorm:
    """(x - mean(x)) / std(x) * weight + bias over the last dimension, each row by itself."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        """`weight` and `bias` [D]."""
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D], same shape back."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class WholeHeadNorm:
    """RMS norms over all query heads together and over all key heads together, which are split over the ranks."""

    def __init__(
        self,
        weight: torch.Tensor,
        eps: float,
        num_heads: int,
        counted: torch.Tensor,
        sizes: tuple[int, int],
        mesh: Mesh,
    ) -> None:
        """`weight` [H + K, d] of this rank's heads, H = `num_heads`; `counted` [K] whether it is this rank that adds a
        key head to the sum, of those that hold it; `sizes`: features of all ranks' query heads, and of their key heads.
        """
        self.weight, self.eps, self.num_heads, self.mesh = weight, eps, num_heads, mesh
        self.wide = at_least_float32(weight.dtype)
        self.counted = counted.to(self.wide)[:, None]
        self.sizes = torch.tensor(sizes, dtype=self.wide, device=weight.device)
        kinds = [0] * num_heads + [1] * len(counted)
        self.kinds = torch.tensor(kinds, device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H + K, d], same shape back."""
        wide = x.to(self.wide)
        squares = wide * wide
        queries, keys = squares[:, : self.num_heads], squares[:, self.num_heads :] * self.counted
        sums = torch.stack([queries.flatten(1).sum(-1), keys.flatten(1).sum(-1)], dim=1)
        scale = (self.mesh.all_reduce(sums) / self.sizes).add_(self.eps).rsqrt_()  # [T, 2]
        return (wide * scale[:, self.kinds, None] * self.weight).to(x.dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in where half precision is too narrow."""
    return torch.promote_types(dtype, torch.float32)


class GatedMLP:
    """down(act(gate(x)) * up(x)), gate and up in one product; the inner features are split over the ranks."""

    def __init__(self, gate_up: Linear, down: RowParallelLinear, activation: str) -> None:
        self.gate_up = gate_up
        self.down = down
        self.activation = activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(activate(gate, self.activation).mul_(up))


class PlainMLP:
    """down(act(up(x))); the inner features are split over the ranks."""

    def __init__(self, up: Linear, down: RowParallelLinear, activation: str) -> None:
        self.up = up
        self.down = down
        self.activation = activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(activate(self.up(x), self.activation))


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """The activation a Hugging Face config calls `name` (one of spec.ACTIVATIONS), as a new tensor."""
    if name in ("silu", "swish"):
        return F.silu(x)
    return F.gelu(x, approximate="none" if name == "gelu" else "tanh")


class NormWeights(NamedTuple):
    """[D] each; a bias for layer norms only."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class LayerWeights:
    """One rank's share of a layer's tensors, those that are multiplied together fused."""

    attention_norm: NormWeights | None
    qkv: torch.Tensor
    """[(H + 2K) * d, D], as DecoderLayer.qkv."""
    qkv_bias: torch.Tensor | None
    head_norm: torch.Tensor | None
    """[H + K, d]"""
    output: torch.Tensor
    output_bias: torch.Tensor | None
    mlp_norm: NormWeights | None
    gate_up: torch.Tensor
    """Gate first, then up; or up alone."""
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    window: int | None
    output_norm: NormWeights | None = None
    """Behind attention."""
    down_norm: NormWeights | None = None
    """Behind the MLP."""
