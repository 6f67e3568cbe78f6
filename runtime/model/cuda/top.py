"""The largest logits of each row, and the log-sum-exp of all, in two stages: blocks of the vocabulary, then rows.

The k largest of a row stand in the k blocks with the largest maxima. Of equals the first counts, and a row in which
one logit is NaN has NaN for its largest, as in runtime/model/sampler.py.
"""

from __future__ import annotations

import torch

from runtime.model.cuda.jit import jit, power_of_two, tl
from runtime.model.sampler import BLOCK, Logits


class DeviceLogits(Logits):
    """Logits whose largest are found by two kernels, once for all questions."""

    def __init__(self, values: torch.Tensor, k: int) -> None:
        """`values` [R, V_local], contiguous; `k`, the most that `top` will be asked for."""
        super().__init__(values)
        self.found = top(values, k)

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        values, places, _ = self.found
        return values[:, 0], places[:, 0].long()

    def top(self, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As Logits.top, but that the log-sum-exp is that of all logits."""
        values, places, whole = self.found
        assert k <= values.shape[1], f"{k} likeliest tokens, {values.shape[1]} searched for"
        return values[:, :k], places[:, :k].long(), whole


def top(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float32 [R, V] -> values [R, k], descending, their places int32 [R, k], log-sum-exp [R].

    Where V < k the rest is -inf at place 0.
    """
    num_rows, size = logits.shape
    num_blocks = -(-size // BLOCK)
    blocks = logits.new_empty(2, num_rows, num_blocks)
    values, whole = logits.new_empty(num_rows, k), logits.new_empty(num_rows)
    places = torch.empty(num_rows, k, dtype=torch.int32, device=logits.device)
    _blocks[(num_rows, -(-num_blocks // 16))](
        logits, blocks, num_rows, size, num_blocks, BLOCK=BLOCK, TOGETHER=16, num_warps=4
    )
    _rows[(num_rows,)](
        logits,
        blocks,
        values,
        places,
        whole,
        num_rows,
        size,
        num_blocks,
        k,
        BLOCK=BLOCK,
        ALL_BLOCKS=power_of_two(num_blocks),
        KEPT=power_of_two(k),
        num_warps=4,
    )
    return values, places, whole


@jit
def _blocks(
    logits: tl.tensor,
    blocks: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    num_blocks: tl.tensor,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
) -> None:
    """Of each block the largest logit, NaN where there is one, and the sum of exponentials relative to it."""
    row = tl.program_id(0)
    block = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits + row.to(tl.int64) * size + column, mask=column < size, other=float("-inf"))
    largest = tl.max(x, 1)
    is_nan = tl.max((x != x).to(tl.int32), 1) > 0
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(x - base[:, None]), 1)
    to = blocks + row * num_blocks + block
    tl.store(to, tl.where(is_nan, float("nan"), largest), mask=block < num_blocks)
    tl.store(to + num_rows * num_blocks, total, mask=block < num_blocks)


@jit
def _rows(
    logits: tl.tensor,
    blocks: tl.tensor,
    values: tl.tensor,
    places: tl.tensor,
    whole: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    num_blocks: tl.tensor,
    k: tl.tensor,
    BLOCK: tl.constexpr,
    ALL_BLOCKS: tl.constexpr,
    KEPT: tl.constexpr,
) -> None:
    """One row: its k best blocks, then the k best logits in them."""
    row = tl.program_id(0)
    block = tl.arange(0, ALL_BLOCKS)
    kept = tl.arange(0, KEPT)
    largest = tl.load(blocks + row * num_blocks + block, mask=block < num_blocks, other=float("-inf"))
    totals = tl.load(blocks + (num_rows + row) * num_blocks + block, mask=block < num_blocks, other=0.0)
    is_nan = tl.max((largest != largest).to(tl.int32), 0) > 0
    highest = tl.max(largest, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(whole + row, base + tl.log(tl.sum(totals * tl.exp(largest - base), 0)))

    chosen = tl.zeros([KEPT], tl.int32) + num_blocks
    for index in range(k):
        best = tl.argmax(largest, 0)
        is_there = index < num_blocks
        chosen = tl.where((kept == index) & is_there, best, chosen)
        largest = tl.where(block == best, float("-inf"), largest)
    column = chosen[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits + row.to(tl.int64) * size + column, mask=column < size, other=float("-inf"))
    for index in range(k):
        value = tl.max(tl.max(x, 1), 0)
        place = tl.min(tl.min(tl.where((x == value) & (column < size), column, 2147483647), 1), 0)
        tl.store(values + row * k + index, tl.where(is_nan, float("nan"), value))
        tl.store(places + row * k + index, tl.where((place < size) & (value > float("-inf")), place, 0))
        x = tl.where(column == place, float("-inf"), x)
