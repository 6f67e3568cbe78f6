"""Which part of each tensor one tensor-parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass


def split(total: int, shard: int, tp: int) -> tuple[int, int]:
    """Contiguous range [start, stop) of shard `shard` of `tp`; the ranges differ by at most one in length."""
    return total * shard // tp, total * (shard + 1) // tp


@dataclass(frozen=True)
class HeadShard:
    """The query heads of one rank, and the KV heads they need.

    Attention wants a rectangle: `group` query heads for each KV head. Where the range of query heads
    starts or ends inside a group, the rectangle is filled up with heads of zero weights, which add
    nothing to the output: `slots` says which places of the rectangle hold real heads.
    """

    query_start: int
    query_stop: int
    kv_start: int
    kv_stop: int
    group: int
    """Query heads per KV head here, filled-up ones included."""
    slots: tuple[int, ...]
    """For each query head of the range, its place in the row-major rectangle [num_kv_heads, group]."""

    @property
    def num_kv_heads(self) -> int:
        return self.kv_stop - self.kv_start

    @property
    def num_heads(self) -> int:
        """Query heads computed here, filled-up ones included."""
        return self.num_kv_heads * self.group

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, shard: int, tp: int) -> HeadShard:
        """Share of rank `shard`: any tp from 1 to num_heads, dividing or not."""
        assert 1 <= tp <= num_heads and num_heads % num_kv_heads == 0
        per_kv = num_heads // num_kv_heads
        start, stop = split(num_heads, shard, tp)
        kv_start, kv_stop = start // per_kv, (stop - 1) // per_kv + 1
        members = [range(max(start, kv * per_kv), min(stop, (kv + 1) * per_kv)) for kv in range(kv_start, kv_stop)]
        group = max(len(heads) for heads in members)
        slots = tuple(row * group + place for row, heads in enumerate(members) for place in range(len(heads)))
        return cls(start, stop, kv_start, kv_stop, group, slots)
