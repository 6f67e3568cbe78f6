"""From a layer's product to its heads: norm them where the model does, rotate, scale, and write keys and values.

Pairs of features stand side by side, as in runtime/model/rotary.py.
"""

from __future__ import annotations

import torch

from runtime.model.cuda.arrays import CacheArrays
from runtime.model.cuda.attention import LOG2_E
from runtime.model.cuda.jit import jit, power_of_two, tl
from runtime.model.cuda.norm import Norm


def rotate_and_store(
    qkv: torch.Tensor,
    turns: torch.Tensor,
    slot_turns: torch.Tensor | None,
    norm: Norm | None,
    cached: CacheArrays,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries: torch.Tensor,
    slot_queries: torch.Tensor | None,
) -> None:
    """Fill `queries` and `slot_queries` [T, H, d], scaled as attention wants; write `keys` and `values` [K, places, d].

    Rows that have no place, which fill up a shape, are left alone.

    Args:
        qkv: [T, (H + 2K) * d].
        turns: [T, d / 2, 2] cosines and sines at the rows' positions, float32 (float64 beside float64 heads).
        slot_turns: the same at the rows' slots, where anchors have distances of their own.
        norm: of query and key heads, weight [H + K, d].
        cached: where keys and values go.
    """
    num_rows, num_heads, head_dim = queries.shape
    _rotate_and_store[(num_rows, num_heads + 2 * len(keys))](
        qkv,
        turns,
        turns if slot_turns is None else slot_turns,
        qkv if norm is None else norm.weight,
        0.0 if norm is None else norm.floor,
        cached.places,
        cached.anchor_places,
        keys,
        values,
        keys.stride(0),
        queries,
        queries if slot_queries is None else slot_queries,
        NUM_HEADS=num_heads,
        NUM_KV=len(keys),
        HEAD_DIM=head_dim,
        HALF=power_of_two(head_dim // 2),
        SCALE=head_dim**-0.5 * LOG2_E,
        ROOT=1.0 if norm is None else norm.root,
        HAS_NORM=norm is not None,
        HAS_SLOTS=slot_turns is not None,
        num_warps=1,
    )


@jit
def _rotate_and_store(
    qkv: tl.tensor,
    turns: tl.tensor,
    slot_turns: tl.tensor,
    norm_weight: tl.tensor,
    norm_floor: tl.tensor,
    places: tl.tensor,
    anchor_places: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    head_stride: tl.tensor,
    queries: tl.tensor,
    slot_queries: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    SCALE: tl.constexpr,
    ROOT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
) -> None:
    """One row and head per program."""
    row, head = tl.program_id(0), tl.program_id(1)
    if tl.load(places + row) < 0:
        return
    pair = tl.arange(0, HALF)
    real = pair < HEAD_DIM // 2
    even, odd = 2 * pair, 2 * pair + 1
    source = qkv + (row * (NUM_HEADS + 2 * NUM_KV) + head) * HEAD_DIM
    x = tl.load(source + even, mask=real, other=0.0).to(tl.float32)
    y = tl.load(source + odd, mask=real, other=0.0).to(tl.float32)
    if head < NUM_HEADS + NUM_KV:
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(x * x) + tl.sum(y * y) + norm_floor) * ROOT
            weight = norm_weight + head * HEAD_DIM
            dtype = qkv.dtype.element_ty
            x = ((x * scale).to(dtype) * tl.load(weight + even, mask=real, other=0.0)).to(tl.float32)
            y = ((y * scale).to(dtype) * tl.load(weight + odd, mask=real, other=0.0)).to(tl.float32)
        here = (row * (HEAD_DIM // 2) + pair) * 2
        cos = tl.load(turns + here, mask=real, other=0.0)
        sin = tl.load(turns + here + 1, mask=real, other=0.0)
        if head < NUM_HEADS:
            to = queries + (row * NUM_HEADS + head) * HEAD_DIM
            dtype = queries.dtype.element_ty
            tl.store(to + even, ((x * cos - y * sin) * SCALE).to(dtype), mask=real)
            tl.store(to + odd, ((x * sin + y * cos) * SCALE).to(dtype), mask=real)
            if HAS_SLOTS:
                cos = tl.load(slot_turns + here, mask=real, other=0.0)
                sin = tl.load(slot_turns + here + 1, mask=real, other=0.0)
                to = slot_queries + (row * NUM_HEADS + head) * HEAD_DIM
                tl.store(to + even, ((x * cos - y * sin) * SCALE).to(dtype), mask=real)
                tl.store(to + odd, ((x * sin + y * cos) * SCALE).to(dtype), mask=real)
        else:
            start = (head - NUM_HEADS).to(tl.int64) * head_stride
            _store(keys + start, x * cos - y * sin, x * sin + y * cos, row, places, anchor_places, real, HEAD_DIM, HALF)
    else:
        start = (head - NUM_HEADS - NUM_KV).to(tl.int64) * head_stride
        _store(values + start, x, y, row, places, anchor_places, real, HEAD_DIM, HALF)


@jit
def _store(
    to: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    row: tl.tensor,
    places: tl.tensor,
    anchor_places: tl.tensor,
    real: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    pair = tl.arange(0, HALF)
    dtype = to.dtype.element_ty
    place = tl.load(places + row).to(tl.int64)
    tl.store(to + place * HEAD_DIM + 2 * pair, x.to(dtype), mask=real)
    tl.store(to + place * HEAD_DIM + 2 * pair + 1, y.to(dtype), mask=real)
    place = tl.load(anchor_places + row).to(tl.int64)
    if place >= 0:
        tl.store(to + place * HEAD_DIM + 2 * pair, x.to(dtype), mask=real)
        tl.store(to + place * HEAD_DIM + 2 * pair + 1, y.to(dtype), mask=real)


def rotate_and_store_eager(
    qkv: torch.Tensor,
    turns: torch.Tensor,
    slot_turns: torch.Tensor | None,
    norm: Norm | None,
    cached: CacheArrays,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries: torch.Tensor,
    slot_queries: torch.Tensor | None,
) -> None:
    """`rotate_and_store` in torch."""
    num_rows, num_heads, head_dim = queries.shape
    heads = qkv.view(num_rows, -1, head_dim)
    to_rotate, new_values = heads.split([num_heads + len(keys), len(keys)], dim=1)
    if norm is not None:
        to_rotate = norm.module(to_rotate)
    pairs = torch.view_as_complex(to_rotate.to(turns.dtype).unflatten(-1, (-1, 2)).contiguous())

    def turned(part: torch.Tensor, by: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return torch.view_as_real(part * (torch.view_as_complex(by)[:, None] * scale)).flatten(-2)

    scale = head_dim**-0.5 * LOG2_E
    queries.copy_(turned(pairs[:, :num_heads], turns, scale))
    if slot_queries is not None and slot_turns is not None:
        slot_queries.copy_(turned(pairs[:, :num_heads], slot_turns, scale))
    new_keys = turned(pairs[:, num_heads:], turns).to(keys.dtype)
    for places in (cached.places, cached.anchor_places):
        (written,) = torch.nonzero(places >= 0, as_tuple=True)
        keys[:, places[written].long()] = new_keys[written].transpose(0, 1)
        values[:, places[written].long()] = new_values[written].transpose(0, 1)
