"""Ranks that talk with each other, apart from torch.distributed's groups, which belong to the whole process.

torch.distributed has one default group per process, and its other groups are parts of that. A program may have made
it for itself, and several engines may share a process. So a group here is a backend of torch's (gloo or NCCL) made
directly: it lives and ends with the object, and nobody else sees it.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

COLLECTIVE_TIMEOUT_S = 1800.0
"""Longest wait in a collective, loading the model included. A peer that dies is noticed at once, by its
closed connections or its file lock; an idle coordinator sends a heartbeat well within this time."""


class Group:
    """The collectives of `size` ranks. Every rank makes the same calls in the same order.

    All raise RuntimeError if another rank has gone, or does not come within COLLECTIVE_TIMEOUT_S.
    """

    def __init__(
        self,
        store: dist.Store,
        name: str,
        rank: int,
        size: int,
        backend: Literal["gloo", "nccl"] = "gloo",
        address: str | None = None,
    ) -> None:
        """Meet the others at `store`, under this name. Gloo listens at `address`, one of this machine; None: at that
        of GLOO_SOCKET_IFNAME, or of the host's name."""
        self.rank, self.size = rank, size
        timeout, place = timedelta(seconds=COLLECTIVE_TIMEOUT_S), dist.PrefixStore(name, store)
        self._backend: Any
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._backend = dist.ProcessGroupNCCL(place, rank, size, options)
        elif address is not None:
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = timeout
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
            self._backend = dist.ProcessGroupGloo(place, rank, size, options)
        else:
            self._backend = dist.ProcessGroupGloo(place, rank, size, timeout)
        _open_groups.add(self)

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Overwrite `tensor` with that of rank `source`, in place."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        _finish(self._backend.broadcast, [tensor], options)
        return tensor

    def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """Combine the ranks' tensors, in place; by default their sum."""
        options = dist.AllreduceOptions()
        options.reduceOp = op
        _finish(self._backend.allreduce, [tensor], options)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, in their order; all give one shape and dtype."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        _finish(self._backend.allgather, [parts], [tensor.contiguous()], AllgatherOptions())
        return parts

    def gather(self, tensor: torch.Tensor, parts: Sequence[torch.Tensor] = (), target: int = 0) -> None:
        """Rank `target` gets the ranks' tensors into `parts`, which the others leave out."""
        options = dist.GatherOptions()
        options.rootRank = target
        _finish(self._backend.gather, [list(parts)] if parts else [], [tensor], options)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        _finish(self._backend.barrier, dist.BarrierOptions())

    def close(self) -> None:
        """Leave: the connections end, so a rank that waits for this one learns at once that it has gone. Idempotent."""
        backend, self._backend = self._backend, None
        if hasattr(backend, "shutdown"):
            backend.shutdown()


_open_groups: weakref.WeakSet[Group] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked process: never end the groups that came with it. Their threads did not, and would be waited for."""
    for group in _open_groups:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group._backend))
        group._backend = None


os.register_at_fork(after_in_child=_leave_to_parent)


def _finish(collective: Any, *arguments: Any) -> None:
    """Start a collective as torch.distributed's own blocking calls do, and wait; on a GPU, its stream does."""
    options = arguments[-1]
    if hasattr(options, "asyncOp"):
        options.asyncOp = False
    work = collective(*arguments)
    if work is not None:
        work.wait()
