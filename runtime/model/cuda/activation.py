"""act(gate) * up, of a product that holds both."""

from __future__ import annotations

import torch

from runtime.model.cuda.jit import jit, tl
from runtime.model.layers import activate

KINDS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2}
BLOCK = 1024


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """[T, 2 * inner], gate first -> [T, inner]."""
    num_rows, both = gate_up.shape
    out = gate_up.new_empty(num_rows, both // 2)
    grid = (num_rows, -(-(both // 2) // BLOCK))
    _gated[grid](gate_up, out, INNER=both // 2, KIND=KINDS[activation], BLOCK=BLOCK, num_warps=4)
    return out


@jit
def _gated(gate_up: tl.tensor, out: tl.tensor, INNER: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < INNER
    dtype = out.dtype.element_ty
    x = tl.load(gate_up + row * 2 * INNER + column, mask=real, other=0.0).to(tl.float32)
    if KIND == 0:
        x = x * tl.sigmoid(x)
    elif KIND == 1:
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh y) / 2 = sigmoid(2 y)
    up = tl.load(gate_up + row * 2 * INNER + INNER + column, mask=real, other=0.0)
    tl.store(out + row * INNER + column, x.to(dtype) * up, mask=real)


def gated_eager(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """`gated` in torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(gate, activation).mul_(up)
