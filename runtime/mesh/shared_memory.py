"""Collectives of ranks on one machine's CPUs, through memory that they share.

A gloo all-reduce goes through sockets and takes most of a millisecond; a tensor-parallel step has two per layer. Here
every rank writes its part into memory that all have mapped, they meet, and each adds up all parts, in the order of
ranks, so that all get the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.compiler import BuildError, shared_library
from runtime.errors import PeerError
from runtime.mesh.group import COLLECTIVE_TIMEOUT_S, Group, add_in_order

SOURCE = Path(__file__).with_name("meeting.cpp")
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off")

AREA = 1 << 20
"""Bytes of a rank's part; what is larger goes piece by piece."""

HEADER = 4096
"""Bytes where they meet: how many have arrived, and the number of the meeting."""

PATIENCE_US = 100_000
"""How long a rank waits before it looks whether the others are still alive."""


class SharedMemory:
    """The ranks of one group, all on this machine. Every rank makes the same calls in the same order.

    Collectives raise PeerError if another rank has gone."""

    def __init__(self, file: int, rank: int, num_ranks: int, check: Callable[[], None] = lambda: None) -> None:
        """`file` is open for all ranks, `size(num_ranks)` bytes, zeros where they meet. It stays open: it holds this
        rank's lock. `check` raises where there is no use in waiting."""
        self.rank, self.num_ranks, self._check = rank, num_ranks, check
        self._file = file
        self._meeting = library()
        self._memory = mmap.mmap(file, size(num_ranks))
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._num_meetings = 0
        fcntl.lockf(file, fcntl.LOCK_EX, 1, rank)  # ends with the process, however it ends

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            return add_in_order(self.all_gather(tensor), tensor)
        for piece in tensor.view(-1).split(AREA // 4):
            areas = self._exchange(piece)
            self._meeting.meeting_sum(areas, self.num_ranks, AREA, piece.data_ptr(), piece.numel())
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, in their order; all give one shape and dtype."""
        own = tensor.contiguous()
        found = [torch.empty_like(own) for _ in range(self.num_ranks)]
        views = [part.view(-1).view(torch.uint8) for part in found]
        for start in range(0, own.nbytes, AREA):
            piece = own.view(-1).view(torch.uint8)[start : start + AREA]
            areas = self._exchange(piece)
            for rank, view in enumerate(views):
                ctypes.memmove(view.data_ptr() + start, areas + rank * AREA, piece.nbytes)
        return found

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Overwrite `tensor` with that of rank `source`, in place."""
        own = tensor.contiguous()
        view = own.view(-1).view(torch.uint8)
        for start in range(0, own.nbytes, AREA):
            piece = view[start : start + AREA]
            areas = self._exchange(piece if self.rank == source else piece[:0])
            if self.rank != source:
                ctypes.memmove(piece.data_ptr(), areas + source * AREA, piece.nbytes)
        return tensor if own is tensor else tensor.copy_(own)

    def _exchange(self, piece: torch.Tensor) -> int:
        """Meet with what each rank gives in its area; returns where the first area is.

        The areas of the last meeting but one may be written over: who has come to the last one has read those.
        """
        areas = self._address + HEADER + self._num_meetings % 2 * self.num_ranks * AREA
        ctypes.memmove(areas + self.rank * AREA, piece.data_ptr(), piece.nbytes)
        self._meeting.meeting_arrive(self._address, self.num_ranks)
        deadline = time.monotonic() + COLLECTIVE_TIMEOUT_S
        while not self._meeting.meeting_is_over(self._address, self._num_meetings, PATIENCE_US):
            self._check_others()
            if time.monotonic() > deadline:
                raise PeerError(f"another rank has not come within {COLLECTIVE_TIMEOUT_S:.0f} s")
        self._num_meetings += 1
        return areas

    def meet(self) -> None:
        """Wait until every rank is here."""
        self._exchange(torch.empty(0, dtype=torch.uint8))

    def close(self) -> None:
        """Leave; who waits for this rank learns of it. Idempotent."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def _check_others(self) -> None:
        self._check()
        for rank in range(self.num_ranks):
            if rank != self.rank and not is_alive(self._file, rank):
                raise PeerError(f"rank {rank} of {self.num_ranks} that share memory has gone")


def is_alive(file: int, rank: int) -> bool:
    """Whether the process that is this rank holds its lock. Not for one's own rank."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
    except OSError:
        return True
    fcntl.lockf(file, fcntl.LOCK_UN, 1, rank)
    return False


@functools.cache
def library() -> ctypes.CDLL:
    """meeting.cpp, compiled. Raises BuildError."""
    path = shared_library("the shared memory's meeting point", SOURCE, FLAGS)
    try:
        meeting = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path}, compiled, cannot be loaded ({error})") from error
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    meeting.meeting_arrive.argtypes, meeting.meeting_arrive.restype = [pointer, count], None
    meeting.meeting_is_over.argtypes, meeting.meeting_is_over.restype = [pointer, count, count], count
    meeting.meeting_sum.argtypes, meeting.meeting_sum.restype = [pointer, count, count, pointer, count], None
    word = ctypes.c_uint32
    meeting.word_set.argtypes, meeting.word_set.restype = [pointer, word], None
    meeting.word_wait.argtypes, meeting.word_wait.restype = [pointer, word, count, count], count
    return meeting


def size(num_ranks: int) -> int:
    """Bytes of the shared memory."""
    return HEADER + 2 * num_ranks * AREA


def join(store: dist.Store, name: str, group: Group, check: Callable[[], None] = lambda: None) -> SharedMemory | None:
    """Meet the group's ranks in shared memory, if they are all on this machine and can compile; on all or none.

    `name` is the group's own in the store; `check` raises where there is no use in waiting.
    """
    file = shared_file(store, name, group, size(group.size))
    memory = SharedMemory(file, group.rank, group.size, check) if file is not None else None
    group.barrier()  # nobody looks for a dead one before all are there
    return memory


def shared_file(store: dist.Store, name: str, group: Group, num_bytes: int) -> int | None:
    """A file in memory, of so many bytes, all zeros but the one before HEADER, open on all ranks of the group; None on
    all of them where one cannot have it, or cannot compile."""
    path, file = "", -1
    if group.rank == 0:
        folder = Path("/dev/shm")
        with contextlib.suppress(OSError):
            file, path = tempfile.mkstemp(prefix="outrider-", dir=folder if folder.is_dir() else None)
            os.posix_fallocate(file, 0, num_bytes)
            os.pwrite(file, b"\1", HEADER - 1)  # all is there; who opens another file of this name does not find it
        store.set(name, path)
    else:
        with contextlib.suppress(OSError):
            file = os.open(store.get(name).decode(), os.O_RDWR)
    found = False
    with contextlib.suppress(BuildError, OSError):
        library()
        found = os.fstat(file).st_size == num_bytes and os.pread(file, 1, HEADER - 1) == b"\1"
    agreed = torch.tensor([int(found)])
    group.all_reduce(agreed, dist.ReduceOp.MIN)
    if path:
        os.unlink(path)
    if not agreed.item() and file >= 0:
        os.close(file)
    return file if agreed.item() else None
