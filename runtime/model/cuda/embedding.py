"""Token vectors of this rank's slice of the vocabulary."""

from __future__ import annotations

import torch

from runtime.model.cuda.jit import jit, tl

BLOCK = 1024


def embed(tokens: torch.Tensor, table: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """int32 tokens [T] -> [T, D]: rows of `table` [>= count, D], which holds tokens start .. start + count - 1; zeros
    for all others."""
    size = table.shape[1]
    out = table.new_empty(len(tokens), size)
    grid = (len(tokens), -(-size // BLOCK))
    _embed[grid](tokens, table, start, count, out, SIZE=size, BLOCK=BLOCK, num_warps=4)
    return out


@jit
def _embed(
    tokens: tl.tensor,
    table: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    out: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < SIZE
    token = tl.load(tokens + row) - start
    is_ours = (token >= 0) & (token < count)
    vector = tl.load(table + token.to(tl.int64) * SIZE + column, mask=real & is_ours, other=0.0)
    tl.store(out + row.to(tl.int64) * SIZE + column, vector, mask=real)


def embed_eager(tokens: torch.Tensor, table: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """`embed` in torch."""
    local = tokens.long() - start
    outside = (local < 0) | (local >= count)
    return table[local.masked_fill(outside, 0)].masked_fill(outside[:, None], 0)
