"""The control plane: a step's plan goes out to all ranks, and a result comes back from the first shard of each replica.

Rank 0 is the coordinator, worker w is rank w + 1. Plans and results are int32 words, as runtime/step.py lays them out.
Through sockets (gloo) that takes a good part of a millisecond; where all ranks are on one machine, they share memory.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import time
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from runtime.errors import PeerError
from runtime.mesh.group import COLLECTIVE_TIMEOUT_S, Group
from runtime.mesh.shared_memory import HEADER, is_alive, library, shared_file
from runtime.step import Int32

CELL = 64
"""Bytes between two words that ranks wait for, so that no two share a cache line."""
LOOKS, LOOKS_ALONE = 20, 4000
"""How often a rank looks at a word before it sleeps: where every rank may have a core of its own, for some 100 us."""
FIRST_LOOK_US, LAST_LOOK_US = 10_000, 160_000
"""How long a rank waits before it looks whether the others are alive, first and, where they are, ever longer."""


class Control(Protocol):
    """One rank's end. Every rank takes part in every step; where another has gone, all of this raises PeerError."""

    answers: bool
    """Whether this rank replies to plans."""

    def outgoing(self) -> Int32:
        """The coordinator's buffer for the next plan, to be filled."""

    def send(self) -> None:
        """The plan is written: give it to all ranks."""

    def collect(self, num_words: int, patience_s: float = COLLECTIVE_TIMEOUT_S) -> list[Int32]:
        """So many words of each replica's result, in the order of replicas, within so many seconds."""

    def receive(self) -> Int32:
        """Wait for the next plan; it stays until the next call."""

    def reply(self, result: Int32) -> None:
        """Give the coordinator this replica's result."""

    def check(self) -> None:
        """Raise PeerError where it can be seen that the coordinator has left."""

    def close(self) -> None:
        """Leave; who waits for this rank learns of it. Idempotent."""


class SocketControl:
    """One broadcast and one gather over gloo."""

    def __init__(self, plan_group: Group, result_group: Group | None, usual_words: int, num_words: int) -> None:
        """`result_group`: coordinator and the first shard of each replica; None on the other ranks."""
        self._plan_group, self._result_group = plan_group, result_group
        self._plan = torch.zeros(num_words, dtype=torch.int32)
        self._usual_words = usual_words
        self.answers = result_group is not None and plan_group.rank > 0

    def outgoing(self) -> Int32:
        return self._plan.numpy()

    def send(self) -> None:
        self._broadcast()

    def _broadcast(self) -> torch.Tensor:
        """The usual words, then what only some plans have behind them: a plan's first word says how many it has."""
        usual = self._usual_words
        self._plan_group.broadcast(self._plan[:usual], source=0)
        if (used := int(self._plan[0])) > usual:
            self._plan_group.broadcast(self._plan[usual:used], source=0)
        return self._plan

    def collect(self, num_words: int, patience_s: float = COLLECTIVE_TIMEOUT_S) -> list[Int32]:
        assert self._result_group is not None
        results = [torch.zeros(num_words, dtype=torch.int32) for _ in range(self._result_group.size)]
        self._result_group.gather(results[0], results, patience_s=patience_s)
        return [result.numpy() for result in results[1:]]

    def receive(self) -> Int32:
        return self._broadcast().numpy()

    def reply(self, result: Int32) -> None:
        assert self._result_group is not None
        self._result_group.gather(torch.from_numpy(result))

    def check(self) -> None:
        pass  # a collective that fails says it

    def close(self) -> None:
        self._plan_group.close()
        if self._result_group is not None:
            self._result_group.close()


class MemoryControl:
    """Memory that all ranks have mapped.

    Per rank a word: the coordinator's counts the plans sent, a worker's those that it has taken. Then, per replica, one
    that counts its results; two plans, which take turns; and the replicas' results.
    """

    def __init__(self, file: int, rank: int, lp: int, tp: int, plan_words: int, result_words: int) -> None:
        """`file` is open for all ranks, `size_of(...)` bytes. It stays open: it holds this rank's lock."""
        self._rank, self._num_ranks, self._lp = rank, 1 + lp * tp, lp
        self._file, self._library = file, library()
        self._memory = mmap.mmap(file, size_of(lp, tp, plan_words, result_words))
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        words = np.frombuffer(self._memory, np.int32)
        first = (HEADER + (self._num_ranks + lp) * CELL) // 4
        self._plans = words[first : first + 2 * plan_words].reshape(2, plan_words)
        self._results = words[first + 2 * plan_words :][: lp * result_words].reshape(lp, result_words)
        self._number = 0
        """Of the plan at work, from 1."""
        self._looks = LOOKS_ALONE if (os.cpu_count() or 1) > self._num_ranks else LOOKS
        self.answers = rank > 0 and (rank - 1) % tp == 0
        self._replica = (rank - 1) // tp
        fcntl.lockf(file, fcntl.LOCK_EX, 1, rank)  # ends with the process, however it ends

    def outgoing(self) -> Int32:
        for rank in range(1, self._num_ranks):  # who has taken the last plan is done with the one before it
            self._wait(rank, self._number)
        return self._plans[(self._number + 1) % 2]

    def send(self) -> None:
        self._number += 1
        self._set(0, self._number)

    def collect(self, num_words: int, patience_s: float = COLLECTIVE_TIMEOUT_S) -> list[Int32]:
        assert num_words <= self._results.shape[1], f"{num_words} words of results, room for {self._results.shape[1]}"
        for replica in range(self._lp):
            self._wait(self._num_ranks + replica, self._number, patience_s)
        return list(self._results[:, :num_words].copy())

    def receive(self) -> Int32:
        self._number += 1
        self._wait(0, self._number)
        self._set(self._rank, self._number)
        return self._plans[self._number % 2]

    def reply(self, result: Int32) -> None:
        self._results[self._replica, : len(result)] = result
        self._set(self._num_ranks + self._replica, self._number)

    def check(self) -> None:
        if not is_alive(self._file, 0):
            raise PeerError("the coordinator has left this mesh")

    def close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)  # and with it goes the lock: who waits for this rank learns that it has gone
            if self._rank == 0:
                self._set(0, self._number)  # and looks at once

    def _word(self, cell: int) -> int:
        return self._address + HEADER + cell * CELL

    def _set(self, cell: int, number: int) -> None:
        self._library.word_set(self._word(cell), number & 0xFFFFFFFF)

    def _wait(self, cell: int, number: int, patience_s: float = COLLECTIVE_TIMEOUT_S) -> None:
        """Until the word of this cell has come to `number`, from however far behind; so many seconds at most."""
        wanted, patience_us = number & 0xFFFFFFFF, FIRST_LOOK_US
        deadline = 0.0
        while not self._library.word_wait(self._word(cell), wanted, self._looks, patience_us):
            self._check_others()
            patience_us = min(2 * patience_us, LAST_LOOK_US)
            deadline = deadline or time.monotonic() + patience_s
            if time.monotonic() > deadline:
                raise PeerError(f"a rank has not come within {patience_s:.0f} s")

    def _check_others(self) -> None:
        """A worker waits for the coordinator alone."""
        if self._rank > 0:
            return self.check()
        for rank in range(1, self._num_ranks):
            if not is_alive(self._file, rank):
                raise PeerError(f"rank {rank} has ended")


def size_of(lp: int, tp: int, plan_words: int, result_words: int) -> int:
    """Bytes of a MemoryControl's memory."""
    return HEADER + (1 + lp * tp + lp) * CELL + 4 * (2 * plan_words + lp * result_words)


def join(
    store: dist.Store,
    plan_group: Group,
    result_group: Group | None,
    lp: int,
    tp: int,
    usual_words: int,
    plan_words: int,
    result_words: int,
) -> Control:
    """This rank's end of the control plane: through memory where all ranks are on one machine, else through sockets.

    Args:
        plan_group: all ranks.
        result_group: coordinator and the first shard of each replica; None on the other ranks.
        usual_words: of every plan; its first word says how many it has in all, if they are more.
        plan_words, result_words: the most of a plan and of a replica's result.
    """
    file = shared_file(store, "control", plan_group, size_of(lp, tp, plan_words, result_words))
    control: Control = SocketControl(plan_group, result_group, usual_words, plan_words)
    if file is not None:
        memory = MemoryControl(file, plan_group.rank, lp, tp, plan_words, result_words)
        plan_group.barrier()  # nobody looks for a dead one before all are there
        control.close()
        return memory
    return control
