"""A mesh's groups are its own: torch.distributed's default group, and other meshes, are not touched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.errors import PeerError
from runtime.mesh import LOOPBACK
from runtime.mesh.group import Group, add_in_order
from runtime.mesh.mesh import Mesh

RANKS = 3


def on_all_ranks(store: dist.Store, name: str, work: Callable[[Group], Any]) -> list[Any]:
    """What each rank's work gives; the ranks are threads."""

    def run(rank: int) -> Any:
        group = Group(store, name, rank, RANKS, address=LOOPBACK)
        try:
            return work(group)
        finally:
            group.close()
            group.close()

    with ThreadPoolExecutor(RANKS) as threads:
        return list(threads.map(run, range(RANKS)))


def collectives(group: Group) -> list[Any]:
    own = torch.tensor([group.rank, 10])
    parts = [torch.zeros_like(own) for _ in range(group.size)] if group.rank == 0 else []
    group.gather(own, parts)
    group.barrier()
    return [
        [part.tolist() for part in parts],
        [part.tolist() for part in group.all_gather(own)],
        group.broadcast(own.clone(), source=2).tolist(),
        group.all_reduce(own.clone()).tolist(),
        group.all_reduce(own.clone(), dist.ReduceOp.MIN).tolist(),
    ]


def test_collectives(tmp_path: Path) -> None:
    found = on_all_ranks(dist.FileStore(str(tmp_path / "store"), RANKS), "group", collectives)
    every = [[0, 10], [1, 10], [2, 10]]
    for rank, given in enumerate(found):
        assert given == [every if rank == 0 else [], every, [2, 10], [3, 30], [0, 10]]


def test_the_default_group_is_left_to_the_program(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), RANKS)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "own"), 1), rank=0, world_size=1)
    try:
        with ThreadPoolExecutor(2) as threads:  # two groups at the same time, in one store
            names = [threads.submit(on_all_ranks, store, name, collectives) for name in ("one", "two")]
            assert names[0].result() == names[1].result()
        assert dist.is_initialized() and dist.all_reduce(torch.ones(1)) is None
        started, ended = threading.Barrier(RANKS + 1), threading.Barrier(RANKS + 1)

        def work(group: Group) -> Any:
            started.wait(30)
            ended.wait(30)
            return collectives(group)

        with ThreadPoolExecutor(1) as threads:
            found = threads.submit(on_all_ranks, store, "three", work)
            started.wait(30)
            dist.destroy_process_group()
            ended.wait(30)
            assert found.result()[1][3] == [3, 30]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_rank_that_has_left_is_noticed(tmp_path: Path) -> None:
    def work(group: Group) -> None:
        group.barrier()
        if group.rank == 1:
            return
        with pytest.raises(PeerError):
            group.all_reduce(torch.ones(1))

    on_all_ranks(dist.FileStore(str(tmp_path / "store"), RANKS), "group", work)


def test_sums_in_rank_order_do_not_depend_on_an_elements_place() -> None:
    """Three numbers of which the order of additions shows, at every place of a tensor of every size."""
    numbers = torch.tensor([1e8, 1.0, -1e8])
    for size in (1, 7, 64, 1000):
        mesh = Mesh(tp=3, tp_group=Reading(numbers[:, None].expand(3, size)), ordered=True)  # type: ignore[arg-type]
        assert (mesh.all_reduce(torch.full((size,), 1e8)) == (numbers[0] + numbers[1]) + numbers[2]).all()
    half = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert add_in_order(list(half), torch.empty(1, dtype=torch.bfloat16)) == 258  # one rounding, at the end


class Reading:
    """A group that gathers what it is told."""

    def __init__(self, parts: torch.Tensor) -> None:
        self.parts = parts

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return list(self.parts)
