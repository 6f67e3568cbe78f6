"""The lp x tp mesh of worker ranks and the collectives it needs; at size 1 they do nothing.

Ranks: the coordinator is rank 0 of the control plane and stands outside the mesh; worker w is
control rank w + 1, with w = replica * tp + shard.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from runtime.mesh import LOOPBACK, control, shared_memory
from runtime.mesh.control import Control
from runtime.mesh.group import Group
from runtime.mesh.shared_memory import SharedMemory
from runtime.step import WireLayout


@dataclass(frozen=True)
class Mesh:
    """One worker's place in the mesh, with its process groups."""

    lp: int = 1
    tp: int = 1
    replica: int = 0
    """0 .. lp-1: which copy of the model this rank belongs to."""
    shard: int = 0
    """0 .. tp-1: which slice of the model this rank holds."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tp_group: Group | None = None
    lp_group: Group | None = None
    """The ranks with this shard index in every replica; their group ranks are the replica numbers."""
    shared_memory: SharedMemory | None = None
    """The TP group's ranks, where all are on the CPUs of one machine."""
    replicas_memory: SharedMemory | None = None
    """The same of the LP group's."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the TP group, in place."""
        if self.shared_memory is not None:
            return self.shared_memory.all_reduce(tensor)
        return tensor if self.tp_group is None else self.tp_group.all_reduce(tensor)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every shard's tensor, in shard order. All shards give the same shape and dtype."""
        if self.shared_memory is not None:
            return self.shared_memory.all_gather(tensor)
        return [tensor] if self.tp_group is None else self.tp_group.all_gather(tensor)

    def broadcast_from_replica(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Overwrite `tensor` with the copy of replica `source`, over the LP group, in place."""
        if self.replicas_memory is not None:
            return self.replicas_memory.broadcast(tensor, source)
        return tensor if self.lp_group is None else self.lp_group.broadcast(tensor, source)

    def close(self) -> None:
        """Leave the groups. Idempotent."""
        _close(self.tp_group, self.lp_group)


def join(
    rank: int, lp: int, tp: int, device: torch.device, store: dist.Store, layout: WireLayout
) -> tuple[Control, Mesh | None]:
    """Join the control plane as `rank`, meeting at `store`, and build this rank's groups, in one order on all ranks.

    The mesh uses NCCL on CUDA devices, else gloo, or shared memory within one machine. Where the store is on the
    loopback, so are gloo's connections, whatever the host's name resolves to.
    Returns the mesh too, except on the coordinator (rank 0).
    """
    address = LOOPBACK if isinstance(store, dist.TCPStore) and store.host == LOOPBACK else None

    def group(name: str, ranks: list[int], on: torch.device) -> Group | None:
        if rank not in ranks or len(ranks) == 1:
            return None
        backend: Literal["gloo", "nccl"] = "nccl" if on.type == "cuda" else "gloo"
        return Group(store, name, ranks.index(rank), len(ranks), backend, address)

    if device.type == "cuda":
        torch.cuda.set_device(device)
    cpu = torch.device("cpu")
    plan_group = group("plan", list(range(1 + lp * tp)), cpu)
    assert plan_group is not None
    result_group = group("result", [0] + [1 + r * tp for r in range(lp)], cpu)
    plane = control.join(store, plan_group, result_group, lp, tp, layout.length, layout.result_length)
    if rank == 0:
        return plane, None
    replica, shard = divmod(rank - 1, tp)
    tp_group = group(f"tp/{replica}", [1 + replica * tp + s for s in range(tp)], device)
    lp_group = group(f"lp/{shard}", [1 + r * tp + shard for r in range(lp)], device)
    memory = replicas_memory = None
    if tp_group is not None and device.type == "cpu":
        memory = shared_memory.join(store, f"shared-memory/{replica}", tp_group)
    if lp_group is not None and device.type == "cpu":
        replicas_memory = shared_memory.join(store, f"shared-memory/replicas/{shard}", lp_group)
    return plane, Mesh(lp, tp, replica, shard, device, tp_group, lp_group, memory, replicas_memory)


def _close(*groups: Group | None) -> None:
    for group in groups:
        if group is not None:
            group.close()
