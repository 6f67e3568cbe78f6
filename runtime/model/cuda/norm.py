"""RMSNorm together with the addition to the residual stream before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.model.cuda.jit import jit, power_of_two, tl
from runtime.model.layers import RMSNorm


@dataclass(frozen=True)
class Norm:
    """An RMSNorm's numbers, as kernels take them."""

    module: RMSNorm
    weight: torch.Tensor
    floor: float
    """D * eps"""
    root: float
    """sqrt(D); 1 where the weight has it in it."""

    @classmethod
    def of(cls, module: RMSNorm) -> Norm:
        return cls(module, module.weight, float(module.floor), module.root if module.narrow else 1.0)


def add_norm(hidden: torch.Tensor, added: torch.Tensor | None, norm: Norm) -> torch.Tensor:
    """Add `added` to `hidden` [T, D] in place, and return the norm of the sum, [T, D]."""
    out = torch.empty_like(hidden)
    num_rows, size = hidden.shape
    block = power_of_two(size)
    _add_norm[(num_rows,)](
        hidden,
        hidden if added is None else added,
        norm.weight,
        norm.floor,
        norm.root,
        out,
        SIZE=size,
        BLOCK=block,
        HAS_ADDED=added is not None,
        num_warps=min(max(block // 512, 1), 16),
    )
    return out


@jit
def _add_norm(
    hidden: tl.tensor,
    added: tl.tensor,
    weight: tl.tensor,
    floor: tl.tensor,
    root: tl.tensor,
    out: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ADDED: tl.constexpr,
) -> None:
    """One row per program."""
    column = tl.arange(0, BLOCK)
    real = column < SIZE
    here = tl.program_id(0).to(tl.int64) * SIZE + column
    dtype = hidden.dtype.element_ty
    x = tl.load(hidden + here, mask=real, other=0.0).to(tl.float32)
    if HAS_ADDED:
        total = (x + tl.load(added + here, mask=real, other=0.0).to(tl.float32)).to(dtype)
        tl.store(hidden + here, total, mask=real)
        x = total.to(tl.float32)
    normed = (x * (tl.rsqrt(tl.sum(x * x) + floor) * root)).to(dtype)
    tl.store(out + here, normed * tl.load(weight + column, mask=real, other=0.0), mask=real)


def add_norm_eager(hidden: torch.Tensor, added: torch.Tensor | None, norm: Norm) -> torch.Tensor:
    """`add_norm` in torch."""
    return norm.module(hidden if added is None else hidden.add_(added))
