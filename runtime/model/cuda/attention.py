"""Attention of a step's rows over paged caches: rows of trees, any number of sequences, any policy, in two launches.

`_dense` takes what rows of a sequence share: it packs the G query heads of a KV head with neighbouring rows, and adds
up chunks of positions and anchors, chunk c in part c mod Z. `_tail` takes the rest row by row, and then merges the
row's parts in order. What a row sees, and why it is cut so, stands in arrays.py.

Nothing but sizes is fixed in a launch: how many rows, which sequences, how long and where they stand is read from
arrays, so a CUDA graph of one row count serves every step.

Queries come scaled by log2(e) / sqrt(d), so that powers of two do for exponentials. Legend: runtime/model/attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.model.cuda.arrays import ANCHOR_BIT, CHUNK, PAGE, CacheArrays, RowArrays
from runtime.model.cuda.jit import jit, power_of_two, tl

LOG2_E = 1.4426950408889634
MAX_PROGRAMS = 1024
"""Launched for the dense part: enough to fill any GPU. Each takes every so manieth piece of work."""
WANTED_PIECES = 256
MAX_PARTS = 64


@dataclass(frozen=True)
class Tiling:
    """How the work of a row count is cut. Two steps that are to agree in the last bit have the same."""

    block: int
    """(row, query head) pairs that meet a chunk together."""
    num_parts: int
    """Z"""

    @classmethod
    def of(cls, num_rows: int, num_kv: int, group: int, head_dim: int) -> Tiling:
        most = 64 if head_dim <= 128 else 32
        block = min(max(16, power_of_two(num_rows * group)), most)
        pieces = num_kv * -(-num_rows * group // block)
        return cls(max(block, power_of_two(group)), min(power_of_two(-(-WANTED_PIECES // pieces)), MAX_PARTS))

    def rows_per_tile(self, group: int) -> int:
        return self.block // group


@dataclass(frozen=True)
class Parts:
    """Scratch memory for the parts of every row, float32."""

    mixed: torch.Tensor
    """[T, H, Z, d] weighted sums of values."""
    sums: torch.Tensor
    """[2, T, H, Z] the largest score, and the sum of the weights relative to it; 0: nothing was seen."""

    @classmethod
    def empty(cls, num_rows: int, num_heads: int, head_dim: int, num_parts: int, device: torch.device) -> Parts:
        mixed = torch.empty(num_rows, num_heads, num_parts, head_dim, device=device)
        return cls(mixed, torch.empty(2, num_rows, num_heads, num_parts, device=device))


def attend(
    queries: torch.Tensor,
    slot_queries: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: RowArrays,
    cached: CacheArrays,
    window: int | None,
    has_anchors: bool,
    tiling: Tiling,
    parts: Parts,
    out: torch.Tensor,
) -> None:
    """Fill `out` [T, H, d]; rows behind num_rows with zeros.

    Args:
        queries: [T, H, d], rotated at the rows' positions.
        slot_queries: the same rotated at the rows' slots, for the anchors; None: anchors have distances of the text.
        keys: of one layer, [K, places, d], those of this step written already.
        values: likewise.
        window: the layer's own sliding window.
        has_anchors: whether any row may see one.
        parts: of as many rows and parts as `tiling` has.
    """
    num_rows, num_heads, head_dim = queries.shape
    num_kv = len(keys)
    sizes = {
        "NUM_ROWS": num_rows,
        "NUM_KV": num_kv,
        "GROUP": num_heads // num_kv,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(power_of_two(head_dim), 16),
        "PARTS": tiling.num_parts,
        "CHUNK": CHUNK,
        "PAGE": PAGE,
        "WINDOW": window or 0,
    }
    num_tiles = -(-num_rows // tiling.rows_per_tile(num_heads // num_kv))
    pieces = max(num_tiles, min(num_rows, 64)) * num_kv * tiling.num_parts  # a tile has rows of one sequence only
    wide = keys.dtype.itemsize * head_dim > 256
    _dense[(min(pieces, MAX_PROGRAMS),)](
        queries,
        queries if slot_queries is None else slot_queries,
        keys,
        values,
        keys.stride(0),
        rows.counts,
        rows.tiles,
        rows.positions,
        rows.dense_stop,
        rows.lists,
        cached.tables,
        cached.anchor_tables,
        cached.lowest,
        cached.anchors_from,
        cached.anchors_to,
        parts.mixed,
        parts.sums,
        **sizes,
        HAS_ANCHORS=has_anchors,
        BLOCK_M=tiling.block,
        num_warps=8 if (tiling.block, sizes["BLOCK_D"]) in ((16, 128), (32, 256)) else 4,  # with 4 registers spill
        num_stages=2 if wide or tiling.block == 16 else 3,
    )
    _tail[(num_rows * num_kv,)](
        queries,
        keys,
        values,
        keys.stride(0),
        rows.counts,
        rows.positions,
        rows.dense_stop,
        rows.diverged,
        rows.path_start,
        rows.lists,
        cached.tables,
        cached.lowest,
        parts.mixed,
        parts.sums,
        out,
        **sizes,
        BLOCK_G=max(16, power_of_two(num_heads // num_kv)),
        FLAG=ANCHOR_BIT,
        num_warps=4,
        num_stages=2,
    )


@jit
def _fold(scores: tl.tensor, values: tl.tensor, best: tl.tensor, total: tl.tensor, mixed: tl.tensor) -> tl.tensor:
    """One more block of an online softmax in base 2. Where a row sees none of it, nothing changes, to the last bit."""
    higher = tl.maximum(best, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(best - base)
    total = total * shrink + tl.sum(weights, 1)
    mixed = mixed * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return higher, total, mixed


@jit
def _dense(
    queries: tl.tensor,
    slot_queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    head_stride: tl.tensor,
    counts: tl.tensor,
    tiles: tl.tensor,
    positions: tl.tensor,
    dense_stop: tl.tensor,
    lists: tl.tensor,
    tables: tl.tensor,
    anchor_tables: tl.tensor,
    lowest: tl.tensor,
    anchors_from: tl.tensor,
    anchors_to: tl.tensor,
    parts_mixed: tl.tensor,
    parts_sums: tl.tensor,
    NUM_ROWS: tl.constexpr,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_ANCHORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """A piece of work is (tile, KV head, part)."""
    column = tl.arange(0, BLOCK_D)
    in_head = column < HEAD_DIM
    offset = tl.arange(0, CHUNK)
    pair = tl.arange(0, BLOCK_M)
    num_pieces = tl.load(counts + 1) * NUM_KV * PARTS
    for piece in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        part = piece % PARTS
        kv_head = piece // PARTS % NUM_KV
        tile = piece // (PARTS * NUM_KV)
        first = tl.load(tiles + tile)
        row = first + pair // GROUP
        is_row = row < tl.load(tiles + NUM_ROWS + tile)
        head = row * (NUM_KV * GROUP) + kv_head * GROUP + pair % GROUP
        here = head[:, None] * HEAD_DIM + column[None, :]
        is_query = is_row[:, None] & in_head[None, :]
        stop = tl.load(dense_stop + row, mask=is_row, other=0)
        low = tl.load(lowest + row, mask=is_row, other=2147483647)
        if WINDOW > 0:
            low = tl.maximum(low, tl.load(positions + row, mask=is_row, other=0) - (WINDOW - 1))
        key_head = keys + kv_head.to(tl.int64) * head_stride
        value_head = values + kv_head.to(tl.int64) * head_stride

        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

        query = tl.load(queries + here, mask=is_query, other=0.0)
        table = tl.load(tables + first)
        from_chunk = tl.maximum(tl.min(low), 0) // CHUNK
        from_chunk += (part - from_chunk % PARTS + PARTS) % PARTS
        for chunk in range(from_chunk, tl.max(stop) // CHUNK, PARTS):
            position = chunk * CHUNK + offset
            page = tl.load(lists + table + chunk * CHUNK // PAGE).to(tl.int64)
            at = (page * PAGE + position % PAGE)[:, None] * HEAD_DIM + column[None, :]
            key = tl.load(key_head + at, mask=in_head[None, :], other=0.0)
            value = tl.load(value_head + at, mask=in_head[None, :], other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
            sees = (position[None, :] >= low[:, None]) & (position[None, :] < stop[:, None])
            best, total, mixed = _fold(tl.where(sees, scores, float("-inf")), value, best, total, mixed)

        if HAS_ANCHORS:
            query = tl.load(slot_queries + here, mask=is_query, other=0.0)
            table = tl.load(anchor_tables + first)
            stop = tl.load(anchors_to + row, mask=is_row, other=0)
            low = tl.zeros([BLOCK_M], tl.int32)
            if WINDOW > 0:
                low = tl.load(anchors_from + row, mask=is_row, other=0)
            last = tl.max(stop)
            for chunk in range(part, tl.cdiv(last, CHUNK), PARTS):
                number = chunk * CHUNK + offset
                page = tl.load(lists + table + chunk * CHUNK // PAGE).to(tl.int64)
                at = (page * PAGE + number % PAGE)[:, None] * HEAD_DIM + column[None, :]
                there = (number < last)[:, None] & in_head[None, :]
                key = tl.load(key_head + at, mask=there, other=0.0)
                value = tl.load(value_head + at, mask=there, other=0.0)
                scores = tl.dot(query, tl.trans(key), input_precision="ieee")
                sees = (number[None, :] >= low[:, None]) & (number[None, :] < stop[:, None])
                best, total, mixed = _fold(tl.where(sees, scores, float("-inf")), value, best, total, mixed)

        place = head * PARTS + part
        tl.store(parts_sums + place, best, mask=is_row)
        tl.store(parts_sums + NUM_ROWS * NUM_KV * GROUP * PARTS + place, total, mask=is_row)
        at = place.to(tl.int64)[:, None] * HEAD_DIM + column[None, :]
        tl.store(parts_mixed + at, mixed, mask=is_query & (total != 0)[:, None])


@jit
def _tail(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    head_stride: tl.tensor,
    counts: tl.tensor,
    positions: tl.tensor,
    dense_stop: tl.tensor,
    diverged: tl.tensor,
    path_start: tl.tensor,
    lists: tl.tensor,
    tables: tl.tensor,
    lowest: tl.tensor,
    parts_mixed: tl.tensor,
    parts_sums: tl.tensor,
    out: tl.tensor,
    NUM_ROWS: tl.constexpr,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_G: tl.constexpr,
    FLAG: tl.constexpr,
) -> None:
    """One row and KV head per program."""
    row = tl.program_id(0) // NUM_KV
    kv_head = tl.program_id(0) % NUM_KV
    column = tl.arange(0, BLOCK_D)
    member = tl.arange(0, BLOCK_G)
    head = row * (NUM_KV * GROUP) + kv_head * GROUP + member
    is_query = (member < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
    here = head[:, None] * HEAD_DIM + column[None, :]
    if row >= tl.load(counts):
        tl.store(out + here, tl.zeros([BLOCK_G, BLOCK_D], tl.float32).to(out.dtype.element_ty), mask=is_query)
        return
    own = tl.load(positions + row)
    start = tl.load(dense_stop + row)
    leaves = tl.load(diverged + row)
    path = tl.load(path_start + row) - leaves
    table = tl.load(tables + row)
    low = tl.load(lowest + row)
    near = 0
    if WINDOW > 0:
        near = own - (WINDOW - 1)
        low = tl.maximum(low, near)
    key_head = keys + kv_head.to(tl.int64) * head_stride
    value_head = values + kv_head.to(tl.int64) * head_stride

    query = tl.load(queries + here, mask=is_query, other=0.0)
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    mixed = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for from_position in range(start, own + 1, CHUNK):
        position = from_position + tl.arange(0, CHUNK)
        is_paged = (position < leaves) & (position >= low)
        page = tl.load(lists + table + position // PAGE, mask=is_paged, other=0)
        on_path = (position >= leaves) & (position <= own)
        entry = tl.load(lists + path + position, mask=on_path, other=0)
        sees_path = on_path & ((position >= low) | ((entry >= FLAG) & (position >= near)))
        sees = is_paged | sees_path
        place = tl.where(is_paged, page * PAGE + position % PAGE, entry % FLAG).to(tl.int64)
        at = place[:, None] * HEAD_DIM + column[None, :]
        there = sees[:, None] & (column < HEAD_DIM)[None, :]
        key = tl.load(key_head + at, mask=there, other=0.0)
        value = tl.load(value_head + at, mask=there, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        best, total, mixed = _fold(tl.where(sees[None, :], scores, float("-inf")), value, best, total, mixed)

    place = head * PARTS
    bests = tl.load(
        parts_sums + place[:, None] + tl.arange(0, PARTS)[None, :],
        mask=(member < GROUP)[:, None],
        other=float("-inf"),
    )
    highest = tl.maximum(best, tl.max(bests, 1))
    sum_of_weights = tl.zeros([BLOCK_G], tl.float32)
    merged = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for part in range(PARTS):
        part_best = tl.load(parts_sums + place + part, mask=member < GROUP, other=float("-inf"))
        part_total = tl.load(
            parts_sums + NUM_ROWS * NUM_KV * GROUP * PARTS + place + part, mask=member < GROUP, other=0.0
        )
        at = (place + part).to(tl.int64)[:, None] * HEAD_DIM + column[None, :]
        part_mixed = tl.load(parts_mixed + at, mask=is_query & (part_total != 0)[:, None], other=0.0)
        weight = tl.exp2(part_best - highest)
        sum_of_weights += part_total * weight
        merged += part_mixed * weight[:, None]
    weight = tl.exp2(best - highest)
    sum_of_weights += total * weight
    merged += mixed * weight[:, None]
    result = merged / tl.where(member < GROUP, sum_of_weights, 1.0)[:, None]
    tl.store(out + here, result.to(out.dtype.element_ty), mask=is_query)


def attend_eager(
    queries: torch.Tensor,
    slot_queries: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: RowArrays,
    cached: CacheArrays,
    window: int | None,
    has_anchors: bool,
    tiling: Tiling,
    parts: Parts,
    out: torch.Tensor,
) -> None:
    """`attend` in torch, row by row: what it means. In any type, float64 too; on the CPU."""
    num_kv, _, head_dim = keys.shape
    out.zero_()
    for row in range(int(rows.counts[0])):
        anchors, run = places_seen(rows, cached, row, window)
        query = queries[row].view(num_kv, -1, head_dim)
        scores = query @ keys[:, run].mT
        if len(anchors):
            if slot_queries is not None:
                query = slot_queries[row].view(num_kv, -1, head_dim)
            scores = torch.cat([query @ keys[:, anchors].mT, scores], dim=2)
        weights = torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)) / LOG2_E, dim=2)
        mixed = weights.to(values.dtype) @ values[:, torch.cat([anchors, run])]
        out[row] = mixed.view(-1, head_dim)


def places_seen(
    rows: RowArrays, cached: CacheArrays, row: int, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the anchors and of the other tokens that a row sees, itself included, in the order of their positions.
    int64 [a], [n]"""
    position, diverged = int(rows.positions[row]), int(rows.diverged[row])
    near = position - window + 1 if window else 0
    low = max(int(cached.lowest[row]), near)

    def paged(table: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        numbers = torch.arange(start, max(start, stop))
        return rows.lists[int(table[row]) + numbers // PAGE].long() * PAGE + numbers % PAGE

    on_path = torch.arange(diverged, position + 1)
    entries = rows.lists[int(rows.path_start[row]) + on_path - diverged]
    sees = (on_path >= low) | (entries >= ANCHOR_BIT) & (on_path >= near)
    run = torch.cat([paged(cached.tables, max(low, 0), diverged), entries[sees].long() % ANCHOR_BIT])
    first_anchor = int(cached.anchors_from[row]) if window else 0
    return paged(cached.anchor_tables, first_anchor, int(cached.anchors_to[row])), run
