"""Small sums go the faster way, the same on every rank; without symmetric memory the group does them all."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.mesh import LOOPBACK, symmetric
from runtime.mesh.group import Group, HostedGroup
from runtime.mesh.mesh import Mesh, device_key, share_a_device
from runtime.mesh.symmetric import MOST_BYTES, SmallSums, largest_faster, sizes

CPU = torch.device("cpu")


class Ranks:
    """The ranks of a group as threads that come to one mind."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.given = size, threading.Barrier(size, timeout=30), [torch.zeros(0)] * size

    def on_all(self, work: Any) -> list[Any]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: work(Ranks.Rank(self, rank)), range(self.size)))

    class Rank:
        def __init__(self, ranks: Ranks, rank: int) -> None:
            self.ranks, self.rank, self.size = ranks, rank, ranks.size

        def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
            self.ranks.given[self.rank] = tensor.clone()
            self.ranks.barrier.wait()
            together = torch.stack(self.ranks.given)
            self.ranks.barrier.wait()
            if op == dist.ReduceOp.SUM:
                return together.sum(0)
            return together.amin(0) if op == dist.ReduceOp.MIN else together.amax(0)


@pytest.mark.parametrize("crossing", [0, 4096, 65536, MOST_BYTES])
def test_the_way_of_each_size_is_what_the_slowest_rank_measured(crossing: int) -> None:
    """One rank finds the one shot faster everywhere; both go by the other."""

    def work(rank: Ranks.Rank) -> int:
        def timed(reduce: Any, tensor: torch.Tensor) -> float:
            if reduce is group:
                return 1.0
            return 0.5 if rank.rank == 0 or tensor.nbytes <= crossing else 1.5

        group = object()
        return largest_faster({"one shot": object(), "group": group}, rank, CPU, timed)  # type: ignore[dict-item]

    assert Ranks(2).on_all(work) == [crossing, crossing]


def test_sums_go_through_shared_memory_only_where_they_can_and_should() -> None:
    sums = SmallSums(lambda tensor: tensor * 10, 4096)
    group = type("Fixed", (), {"all_reduce": lambda self, tensor: tensor * 2})()
    mesh = Mesh(tp=2, tp_group=group, small_sums=sums)
    small, large, half = torch.ones(1024), torch.ones(1025), torch.ones(8, dtype=torch.float16)
    assert mesh.all_reduce(small)[0] == 10
    assert mesh.all_reduce(large)[0] == 2  # too large
    assert mesh.all_reduce(half)[0] == 2  # the kernel does not know the type
    assert mesh.all_reduce(torch.ones(3))[0] == 2  # not whole vectors
    assert mesh.all_reduce(torch.ones(8, 8).mT)[0, 0] == 2
    assert mesh.can_record
    assert sizes()[0] == 1024 and sizes()[-1] == MOST_BYTES


@pytest.mark.parametrize("fault", ["alone", "meeting"])
def test_without_symmetric_memory_on_one_rank_no_rank_uses_it(monkeypatch, fault: str) -> None:
    class Memory:
        def __init__(self, store: Any, name: str, rank: int, size: int, device: Any) -> None:
            self.rank = rank
            names.append(name)
            if fault == "alone" and rank == 1:
                raise RuntimeError("no peer access")

        def meet(self) -> None:
            assert fault == "meeting", "nobody waits for a rank that has not come"
            if self.rank == 1:
                raise RuntimeError("no peer access")

    names: list[str] = []
    monkeypatch.setattr(symmetric, "OneShot", Memory)
    store = dist.HashStore()
    assert Ranks(2).on_all(lambda rank: symmetric.join(store, "tp", rank, CPU)) == [None, None]
    assert len(names) == 2 and len(set(names)) == 1


def test_ranks_that_share_a_gpu_talk_by_way_of_the_host() -> None:
    store = dist.HashStore()
    for rank, device in ((1, "here a"), (2, "here b"), (3, "here a"), (4, "there a")):
        store.set(device_key(rank), device)
    assert share_a_device(store, [1, 3]) and not share_a_device(store, [1, 2, 4])

    def work(rank: int) -> list[Any]:
        group = HostedGroup(store, "hosted", rank, 2, address=LOOPBACK)
        tensor = torch.arange(6).view(2, 3).mT.to(torch.bfloat16) + rank
        gathered = group.all_gather(tensor)
        total = group.all_reduce(tensor.clone())
        largest = group.all_reduce(torch.tensor([rank]), dist.ReduceOp.MAX)
        copied = group.broadcast(tensor.clone(), 1)
        found = [[part.tolist() for part in gathered], total.tolist(), largest.tolist(), copied.tolist()]
        group.close()
        return found

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(work, range(2))
    zero = torch.arange(6).view(2, 3).mT
    assert one == other == [[zero.tolist(), (zero + 1).tolist()], (2 * zero + 1).tolist(), [1], (zero + 1).tolist()]
    assert not Mesh(tp=2, tp_group=HostedGroup.__new__(HostedGroup)).can_record
    assert Mesh(tp=2, tp_group=Group.__new__(Group)).can_record
