"""Staged rows enter the cache exactly when and where they are accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import psutil
import pytest
import torch

from runtime.errors import ConfigError
from runtime.model.kv_cache import KVCache
from runtime.model.rotary import Rotary
from runtime.model.spec import RopeSpec
from runtime.retention import LayerGroup, Retention, Sliding

LAYERS, HEADS, DIM = 3, 2, 4


def make_cache(
    num_slots: int = 2,
    capacity: int = 10,
    max_staged: int = 6,
    retention: Callable[[], Retention] | None = None,
    num_layers: int = LAYERS,
    heads: int = HEADS,
    dim: int = DIM,
) -> KVCache:
    group = LayerGroup(tuple(range(num_layers)), retention or (lambda: Sliding(None, capacity, slot=False)))
    rotary = Rotary(RopeSpec(tuple(1e4 ** (-i / dim) for i in range(0, dim, 2))), torch.device("cpu"))
    return KVCache(group, num_slots, heads, dim, max_staged, rotary, torch.float32, torch.device("cpu"))


def stage_all(cache: KVCache, slot: int, rows: torch.Tensor) -> None:
    """rows [T, LAYERS, 2, HEADS, DIM]"""
    stage = cache.stage(slot, len(rows))
    for layer in range(LAYERS):
        stage.rows[layer].copy_(rows[:, layer].permute(1, 2, 0, 3))


def commit(cache: KVCache, slot: int, staged: Sequence[int]) -> None:
    """Token ids mean nothing to the full policy."""
    cache.commit(slot, staged, [7] * len(staged))


def committed(cache: KVCache, slot: int) -> torch.Tensor:
    """[length, LAYERS, 2, HEADS, DIM]"""
    return cache.buffer[slot, ..., : cache.retained[slot].num_stored, :].permute(3, 0, 1, 2, 4)


def random_rows(count: int) -> torch.Tensor:
    return torch.randn(count, LAYERS, 2, HEADS, DIM)


def test_stage_shows_committed_then_staged_rows() -> None:
    torch.manual_seed(0)
    cache = make_cache()
    first, second = random_rows(3), random_rows(2)
    stage_all(cache, 1, first)
    commit(cache, 1, range(3))
    stage_all(cache, 1, second)
    stage = cache.stage(1, 2)
    both = torch.cat([first, second])
    for layer in range(LAYERS):
        assert torch.equal(stage.keys[layer], both[:, layer, 0].permute(1, 2, 0))
        assert torch.equal(stage.values[layer], both[:, layer, 1].transpose(0, 1))
    assert [retained.length for retained in cache.retained] == [0, 3]


@pytest.mark.parametrize("accepted", [[], [0], [0, 1, 2], [4], [0, 2, 3], [1, 2, 5], [0, 1, 5]])
def test_commit_keeps_accepted_rows_in_order(accepted: list[int]) -> None:
    torch.manual_seed(0)
    cache = make_cache()
    prefix, other, staged = random_rows(2), random_rows(4), random_rows(6)
    for slot, rows in ((0, prefix), (1, other)):
        stage_all(cache, slot, rows)
        commit(cache, slot, range(len(rows)))
    stage_all(cache, 0, staged)
    commit(cache, 0, accepted)
    assert torch.equal(committed(cache, 0), torch.cat([prefix, staged[accepted]]))
    assert torch.equal(committed(cache, 1), other)


def test_appended_block_equals_commit_on_the_replica_that_ran_the_rows() -> None:
    torch.manual_seed(0)
    source, peer = make_cache(), make_cache()
    prefix, staged = random_rows(2), random_rows(5)
    for cache in (source, peer):
        stage_all(cache, 0, prefix)
        commit(cache, 0, [0, 1])
    stage_all(source, 0, staged)
    stage_all(peer, 0, random_rows(3))  # rows of its own, all rejected
    block = source.read_staged(0, [1, 2, 4])
    received = peer.empty_block(3)
    assert received.shape == block.shape and block.is_contiguous() and received.is_contiguous()
    received.copy_(block)
    commit(source, 0, [1, 2, 4])
    peer.append(0, received, [7, 7, 7])
    assert torch.equal(committed(source, 0), committed(peer, 0))
    assert peer.retained[0].length == 5


def test_full_cache_still_has_room_to_stage() -> None:
    torch.manual_seed(0)
    cache = make_cache(num_slots=1, capacity=4, max_staged=3)
    rows = random_rows(3)
    stage_all(cache, 0, rows)
    commit(cache, 0, range(3))
    stage_all(cache, 0, rows)
    commit(cache, 0, [2])
    stage_all(cache, 0, rows)
    assert torch.equal(committed(cache, 0), torch.cat([rows, rows[2:]]))
    with pytest.raises(AssertionError, match="capacity"):
        commit(cache, 0, [0])


def test_reset_empties_one_slot() -> None:
    cache = make_cache()
    for slot in range(2):
        stage_all(cache, slot, random_rows(2))
        commit(cache, slot, range(2))
    cache.reset(0)
    assert [retained.length for retained in cache.retained] == [0, 2]
    rows = random_rows(1)
    stage_all(cache, 0, rows)
    assert torch.equal(cache.stage(0, 1).values[0], rows[:, 0, 1].transpose(0, 1))


def test_capacity_costs_no_memory_before_it_is_used() -> None:
    before = psutil.Process().memory_info().rss
    cache = make_cache(8, 8192, 512, num_layers=30, heads=3, dim=64)  # 3.2 GB of addresses
    for rows in cache.stage(0, 4).rows:
        rows.fill_(1)
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_impossible_capacity_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"cache.capacity = 1000000000: .* GiB") as caught:
        make_cache(8, 10**9, 512, num_layers=30, heads=3, dim=64)
    assert "scheduler.max_sequences" in caught.value.remedy
