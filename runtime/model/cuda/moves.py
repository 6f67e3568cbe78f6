"""Keys and values that change their places: accepted rows that a tree's branch had, and anchors."""

from __future__ import annotations

import torch

from runtime.model.cuda.jit import jit, power_of_two, tl

MAX_PROGRAMS = 16
"""Programs per plane; each takes every so manieth move."""


def move(pool: torch.Tensor, header: torch.Tensor, lists: torch.Tensor) -> None:
    """Copy places of all layers, keys and values. No move's source is another's destination.

    Args:
        pool: [layers, 2, K, places, d].
        header: [2] int32: where in `lists` the moves start, and how many they are: sources first, then destinations.
        lists: [P] int32.
    """
    planes = pool.shape[0] * pool.shape[1] * pool.shape[2]
    head_dim = pool.shape[4]
    _move[(planes, MAX_PROGRAMS)](
        pool, pool.stride(2), header, lists, HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim), num_warps=1
    )


@jit
def _move(
    pool: tl.tensor,
    plane_stride: tl.tensor,
    header: tl.tensor,
    lists: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    column = tl.arange(0, BLOCK_D)
    plane = pool + tl.program_id(0).to(tl.int64) * plane_stride
    start, count = tl.load(header), tl.load(header + 1)
    for index in range(tl.program_id(1), count, tl.num_programs(1)):
        source = tl.load(lists + start + index).to(tl.int64)
        destination = tl.load(lists + start + count + index).to(tl.int64)
        row = tl.load(plane + source * HEAD_DIM + column, mask=column < HEAD_DIM)
        tl.store(plane + destination * HEAD_DIM + column, row, mask=column < HEAD_DIM)


def move_eager(pool: torch.Tensor, header: torch.Tensor, lists: torch.Tensor) -> None:
    """`move` in torch, on the CPU."""
    start, count = header.tolist()
    sources, destinations = lists[start : start + 2 * count].long().view(2, count)
    pool[..., destinations, :] = pool[..., sources, :]
