"""Ranks of one machine add up through shared memory: the same bits on all; the dead are noticed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from runtime.compiler import BuildError
from runtime.errors import PeerError
from runtime.mesh import shared_memory
from runtime.mesh.group import Group

pytestmark = pytest.mark.system

RANKS = 3
SHAPES = [(1, 1), (7, 576), (3, shared_memory.AREA // 8)]  # the last takes several pieces

try:
    shared_memory.library()
except BuildError:
    pytest.skip("C++ does not compile here", allow_module_level=True)


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).mul(10).to(dtype)


def run_rank(rank: int, folder: Path, name: str) -> None:
    store = dist.FileStore(str(folder / "store"), RANKS)
    ranks = shared_memory.join(store, name, Group(store, "group", rank, RANKS))
    assert ranks is not None
    found = []
    for turn in range(20):
        shape = SHAPES[turn % len(SHAPES)]
        for dtype in (torch.float32, torch.bfloat16):
            found.append(ranks.all_reduce(part(rank + turn, shape, dtype)))
        found += ranks.all_gather(torch.tensor([rank, turn]))
        found.append(ranks.broadcast(part(rank, SHAPES[turn % 3], torch.float32).mT, turn % RANKS))
    (folder / f"found-{rank}.pkl").write_bytes(pickle.dumps(found))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(PeerError, match=r"rank \d of 3 .* has gone"):
        ranks.all_reduce(torch.ones(4))
    assert time.monotonic() - started < 10
    os._exit(0)  # gloo would wait for the dead one


def test_all_ranks_get_the_sum_and_notice_who_dies(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    before = {path.name for path in Path("/dev/shm").glob("outrider-*")}
    processes = [context.Process(target=run_rank, args=(rank, tmp_path, "here")) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL, 0]
    found = [pickle.loads((tmp_path / f"found-{rank}.pkl").read_bytes()) for rank in range(RANKS)]
    expected = []
    for turn in range(20):
        shape = SHAPES[turn % len(SHAPES)]
        for dtype in (torch.float32, torch.bfloat16):
            parts = [part(rank + turn, shape, dtype) for rank in range(RANKS)]
            expected.append(parts[0] + parts[1] + parts[2] if dtype == torch.float32 else torch.stack(parts).sum(0))
        expected += [torch.tensor([rank, turn]) for rank in range(RANKS)]
        expected.append(part(turn % RANKS, SHAPES[turn % 3], torch.float32).mT)
    for given in found:
        assert len(given) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))
    assert {path.name for path in Path("/dev/shm").glob("outrider-*")} == before  # nothing is left behind


def refuse(*_: object, **__: object) -> None:
    raise OSError("no space")


@pytest.mark.parametrize(
    ("module", "name"), [(shared_memory.tempfile, "mkstemp"), (shared_memory.os, "posix_fallocate")]
)
def test_ranks_without_a_common_memory_keep_to_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: ModuleType, name: str
) -> None:
    """The others cannot open what the first one has made: here, because its folder refuses it, or has no room."""
    before = {path.name for path in Path("/dev/shm").glob("outrider-*")}
    store = dist.FileStore(str(tmp_path / "store"), 1)
    group = Group(store, "group", 0, 1)
    monkeypatch.setattr(module, name, refuse)
    assert shared_memory.join(store, "refused", group) is None
    assert {path.name for path in Path("/dev/shm").glob("outrider-*")} == before  # nothing is left behind


HOLDS = """
import fcntl, sys, time
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX, 1, 1)
print("held", flush=True)
time.sleep(60)
"""


def test_a_rank_that_does_not_come_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "COLLECTIVE_TIMEOUT_S", 0.3)
    path = tmp_path / "memory"
    path.write_bytes(bytes(shared_memory.size(2)))
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    try:
        other.stdout.readline()
        ranks = shared_memory.SharedMemory(os.open(path, os.O_RDWR), 0, 2)
        with pytest.raises(PeerError, match="has not come"):
            ranks.all_reduce(torch.ones(3))
    finally:
        other.kill()
        other.wait()
