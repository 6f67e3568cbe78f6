"""The lp x tp mesh of worker ranks and the collectives it needs; at size 1 they do nothing.

Ranks: the coordinator is rank 0 of the control group and stands outside the mesh; worker w is
control rank w + 1, with w = replica * tp + shard.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime.mesh import shared_memory
from runtime.mesh.shared_memory import COLLECTIVE_TIMEOUT_S, SharedMemory


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
    tp_group: dist.ProcessGroup | None = None
    lp_group: dist.ProcessGroup | None = None
    """The ranks with this shard index in every replica; their group ranks are the replica numbers."""
    shared_memory: SharedMemory | None = None
    """The TP group's ranks, where all are on the CPUs of one machine."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the TP group, in place."""
        if self.shared_memory is not None:
            return self.shared_memory.all_reduce(tensor)
        if self.tp > 1:
            dist.all_reduce(tensor, group=self.tp_group)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every shard's tensor, in shard order. All shards give the same shape and dtype."""
        if self.tp == 1:
            return [tensor]
        if self.shared_memory is not None:
            return self.shared_memory.all_gather(tensor)
        parts = [torch.empty_like(tensor) for _ in range(self.tp)]
        dist.all_gather(parts, tensor.contiguous(), group=self.tp_group)
        return parts

    def broadcast_from_replica(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Overwrite `tensor` with the copy of replica `source`, over the LP group, in place."""
        if self.lp > 1:
            dist.broadcast(tensor, group=self.lp_group, group_src=source)
        return tensor


@dataclass(frozen=True)
class ControlGroup:
    """Coordinator and workers: the plan goes out to all, results come back from shard 0 of each replica."""

    plan_group: dist.ProcessGroup
    result_group: dist.ProcessGroup | None
    """Coordinator and the first shard of each replica; None on the other ranks."""


def join(rank: int, lp: int, tp: int, device: torch.device, store: dist.Store) -> tuple[ControlGroup, Mesh | None]:
    """Join the control group as `rank`, meeting at `store`, and build every group, in the same order on all ranks.

    Control collectives use gloo on CPU tensors; the mesh uses NCCL on CUDA devices, else gloo, or shared memory within
    one machine.
    Returns the mesh too, except on the coordinator (rank 0).
    """
    world = 1 + lp * tp
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    mesh_backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    replica, shard = divmod(rank - 1, tp)

    def mesh_group(ranks: list[int]) -> dist.ProcessGroup | None:
        if len(ranks) == 1:
            return None
        group = dist.new_group(ranks, backend=mesh_backend, timeout=timeout)
        return group if rank in ranks else None

    tp_groups = [mesh_group([1 + r * tp + s for s in range(tp)]) for r in range(lp)]
    lp_groups = [mesh_group([1 + r * tp + s for r in range(lp)]) for s in range(tp)]
    heads = [0] + [1 + r * tp for r in range(lp)]
    result_group = dist.new_group(heads, backend="gloo", timeout=timeout)
    assert dist.group.WORLD is not None
    control = ControlGroup(dist.group.WORLD, result_group if rank in heads else None)
    if rank == 0:
        return control, None
    tp_group, memory = tp_groups[replica], None
    if tp_group is not None and device.type == "cpu":
        memory = shared_memory.join(store, f"shared-memory/{replica}", tp_group, shard, tp)
    return control, Mesh(lp, tp, replica, shard, device, tp_group, lp_groups[shard], memory)
