"""The control plane, through sockets and through memory: plans reach all ranks, results come back, deaths are seen."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from runtime.errors import PeerError
from runtime.mesh import control
from runtime.mesh.control import Control, MemoryControl, SocketControl
from runtime.mesh.group import Group

pytestmark = pytest.mark.system

LP, TP = 2, 2
RANKS = 1 + LP * TP
USUAL_WORDS, WORDS, RESULT_WORDS = 20, 100, 50
STEPS = 400
LAST_WORDS_S = 2.0


def joined(rank: int, folder: Path, through_memory: bool) -> Control:
    if not through_memory:
        control.shared_file = lambda *_: None  # type: ignore[assignment]
    store = dist.FileStore(str(folder / "store"), RANKS)
    plan_group = Group(store, "plan", rank, RANKS)
    answering = [0, *(1 + replica * TP for replica in range(LP))]
    result_group = Group(store, "result", answering.index(rank), len(answering)) if rank in answering else None
    return control.join(store, plan_group, result_group, LP, TP, USUAL_WORDS, WORDS, RESULT_WORDS)


def work(rank: int, folder: Path, through_memory: bool) -> None:
    """Reply with the plan's words, of which the first says how many they are, times the rank, until the second says 0.
    Slow ranks see every plan, too."""
    plane = joined(rank, folder, through_memory)
    seen = []
    while (plan := plane.receive())[1]:
        count = int(plan[0])
        if rank == 4 and plan[1] % 50 == 0:
            time.sleep(0.01)
        seen.append(int(plan[1]))
        if plan[1] == STEPS and rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if plane.answers:
            plane.reply(plan[:count] * np.int32(rank))
    (folder / f"seen-{rank}").write_text(" ".join(map(str, seen)))
    os._exit(0)


def start_ranks(folder: Path, through_memory: bool) -> list[BaseProcess]:
    """All ranks but the coordinator."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    processes = [context.Process(target=work, args=(rank, folder, through_memory)) for rank in range(1, RANKS)]
    for process in processes:
        process.start()
    return processes


@pytest.mark.parametrize("through_memory", [True, False], ids=["memory", "sockets"])
def test_every_rank_sees_every_plan_and_a_dead_one_is_noticed(tmp_path, monkeypatch, through_memory) -> None:
    monkeypatch.setattr(control, "shared_file", control.shared_file)  # put back afterwards
    before = set(Path("/dev/shm").glob("outrider-*"))
    processes = start_ranks(tmp_path, through_memory)
    plane = joined(0, tmp_path, through_memory)
    assert isinstance(plane, MemoryControl if through_memory else SocketControl) and not plane.answers
    for step in range(1, STEPS):
        count = 2 + step % (RESULT_WORDS - 2)
        plan = plane.outgoing()
        plan[:count] = np.arange(step, step + count)
        plan[:2] = count, step
        plane.send()
        sent = plan[:count].copy()
        results = plane.collect(count)
        assert len(results) == LP
        for replica, result in enumerate(results):
            assert np.array_equal(result, sent * (1 + replica * TP))
    plan = plane.outgoing()
    plan[:2] = 2, STEPS
    plane.send()
    started = time.monotonic()
    if through_memory:
        plane.collect(2)  # rank 2 answers to nobody, so this step is done
    with pytest.raises(PeerError):
        plan = plane.outgoing()
        plan[:2] = 2, STEPS + 1
        plane.send()
        processes[1].join()
        plane.outgoing()
        plane.collect(2)
    assert time.monotonic() - started < LAST_WORDS_S
    plane.close()
    plane.close()
    assert processes[1].exitcode == -signal.SIGKILL
    for process in processes:
        process.join(timeout=10)
        process.kill()
    assert set(Path("/dev/shm").glob("outrider-*")) == before


def test_all_plans_arrive_in_order_and_the_last_one_ends_the_ranks(tmp_path) -> None:
    processes = start_ranks(tmp_path, through_memory=True)
    plane = joined(0, tmp_path, True)
    for step in range(1, 200):
        plane.outgoing()[:2] = 2, step
        plane.send()
        if step % 3:  # a coordinator may go on without results
            assert [int(result[1]) for result in plane.collect(2)] == [step, 3 * step]
    plane.outgoing()[:2] = 2, 0
    plane.send()
    plane.close()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * len(processes)
    expected = " ".join(map(str, range(1, 200)))
    assert all((tmp_path / f"seen-{rank}").read_text() == expected for rank in range(1, RANKS))


def test_workers_notice_that_the_coordinator_has_gone(tmp_path) -> None:
    processes = start_ranks(tmp_path, through_memory=True)
    plane = joined(0, tmp_path, True)
    started = time.monotonic()
    plane.close()
    for process in processes:
        process.join(timeout=60)
    assert time.monotonic() - started < LAST_WORDS_S + 5  # ends with an error, and says it
    assert all(process.exitcode == 1 for process in processes)
