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

from runtime.errors import PeerError

COLLECTIVE_TIMEOUT_S = 1800.0
"""Longest wait for a plan. A peer that dies is noticed at once, by its closed connections or its file lock; an idle
coordinator sends a heartbeat well within this time."""
JOIN_TIMEOUT_S = 30.0
"""Longest wait for another rank that has been called to the same group."""


class Group:
    """The collectives of `size` ranks. Every rank makes the same calls in the same order.

    All raise PeerError if another rank has gone, or does not come within `patience_s` seconds.
    """

    def __init__(
        self,
        store: dist.Store,
        name: str,
        rank: int,
        size: int,
        backend: Literal["gloo", "nccl"] = "gloo",
        address: str | None = None,
        patience_s: float = COLLECTIVE_TIMEOUT_S,
    ) -> None:
        """Meet the others at `store`, under this name. Gloo listens at `address`, one of this machine; None: at that
        of GLOO_SOCKET_IFNAME, or of the host's name. Raises PeerError if they do not come."""
        self.rank, self.size = rank, size
        self._patience = timedelta(seconds=patience_s)
        try:
            self._backend = self._meet(store, name, backend, address)
        except RuntimeError as error:
            raise PeerError(f"the ranks of group {name} have not met ({_brief(error)})") from error
        _open_groups.add(self)

    def _meet(self, store: dist.Store, name: str, backend: str, address: str | None) -> Any:
        rank, size = self.rank, self.size
        timeout, place = timedelta(seconds=JOIN_TIMEOUT_S), dist.PrefixStore(name, store)
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = max(timeout, self._patience)
            return dist.ProcessGroupNCCL(place, rank, size, options)
        if address is not None:
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = timeout
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
            return dist.ProcessGroupGloo(place, rank, size, options)
        return dist.ProcessGroupGloo(place, rank, size, timeout)

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Overwrite `tensor` with that of rank `source`, in place."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        self._finish(self._backend.broadcast, [tensor], options)
        return tensor

    def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """Combine the ranks' tensors, in place; by default their sum."""
        options = dist.AllreduceOptions()
        options.reduceOp = op
        self._finish(self._backend.allreduce, [tensor], options)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, in their order; all give one shape and dtype."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._finish(self._backend.allgather, [parts], [tensor.contiguous()], AllgatherOptions())
        return parts

    def gather(
        self,
        tensor: torch.Tensor,
        parts: Sequence[torch.Tensor] = (),
        target: int = 0,
        patience_s: float | None = None,
    ) -> None:
        """Rank `target` gets the ranks' tensors into `parts`, which the others leave out; within so many seconds, where
        the group's are not to be waited for."""
        options = dist.GatherOptions()
        options.rootRank = target
        if patience_s is not None:
            options.timeout = timedelta(seconds=patience_s)
        self._finish(self._backend.gather, [list(parts)] if parts else [], [tensor], options)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._finish(self._backend.barrier, dist.BarrierOptions())

    def _finish(self, collective: Any, *arguments: Any) -> None:
        """Start a collective as torch.distributed's own blocking calls do, and wait; on a GPU, its stream does."""
        options = arguments[-1]
        if options.timeout < timedelta(0):
            options.timeout = self._patience
        if hasattr(options, "asyncOp"):
            options.asyncOp = False
        try:
            work = collective(*arguments)
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise PeerError(f"another rank has gone ({_brief(error)})") from error

    def close(self) -> None:
        """Leave: the connections end, so a rank that waits for this one learns at once that it has gone. Idempotent."""
        backend, self._backend = self._backend, None
        if hasattr(backend, "shutdown"):
            backend.shutdown()


class HostedGroup(Group):
    """Ranks whose tensors are on GPUs and go through the host's memory: slow, and for ranks that share a GPU, which
    NCCL refuses. Sums are added up in rank order. No CUDA graph can hold its collectives."""

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        host = super().broadcast(_bytes(tensor), source)
        return tensor.copy_(host.view(tensor.dtype).view(tensor.shape))

    def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        if op == dist.ReduceOp.SUM:
            return add_in_order(self.all_gather(tensor), tensor)
        return tensor.copy_(super().all_reduce(tensor.cpu(), op))

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = super().all_gather(_bytes(tensor))
        return [part.view(tensor.dtype).view(tensor.shape).to(tensor.device) for part in parts]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory; gloo does not know every type."""
    return tensor.contiguous().view(-1).view(torch.uint8).to("cpu", copy=True)


def add_in_order(parts: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """`out` becomes the sum of the ranks' parts, added up in their order, in float32 at least. Returns it."""
    total = parts[0].to(torch.promote_types(out.dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    return out.copy_(total)


_open_groups: weakref.WeakSet[Group] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked process: never end the groups that came with it. Their threads did not, and would be waited for."""
    for group in _open_groups:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group._backend))
        group._backend = None


os.register_at_fork(after_in_child=_leave_to_parent)


def _brief(error: Exception) -> str:
    """Its first line: gloo's and NCCL's go on with a trace of C++."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
