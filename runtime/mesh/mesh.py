"""The lp x tp mesh of worker ranks and the collectives it needs; at size 1 they do nothing.

Ranks: the coordinator is rank 0 of the control plane and stands outside the mesh; worker w is
control rank w + 1, with w = replica * tp + shard.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from runtime.errors import PeerError
from runtime.mesh import LOOPBACK, control, shared_memory, symmetric
from runtime.mesh.control import Control
from runtime.mesh.group import COLLECTIVE_TIMEOUT_S, Group, HostedGroup, add_in_order
from runtime.mesh.shared_memory import SharedMemory
from runtime.mesh.symmetric import SmallSums
from runtime.step import WireLayout

STEP_PATIENCE_S = 60.0
"""How long a rank waits for another within a step, where it cannot see that it has gone."""


@dataclass(eq=False)
class Mesh:
    """One worker's place in the mesh, with its process groups. A mesh that is formed anew is the same object."""

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
    ordered: bool = False
    """Sums are added up rank by rank, as shared memory does it in any case: no element's bits depend on its place."""

    shares_device: bool = False
    """Another rank has the same GPU."""
    small_sums: SmallSums | None = None
    """Which sums the TP group's GPUs do through memory that they share, in rank order."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the TP group, which is returned; on CPUs, and where it is large, in place."""
        if self.shared_memory is not None:
            return self.shared_memory.all_reduce(tensor)
        if self.tp_group is None:
            return tensor
        if self.small_sums is not None and self.small_sums.takes(tensor):
            return self.small_sums.all_reduce(tensor)
        if self.ordered and self.tp > 2:  # a sum of two has one order
            return add_in_order(self.tp_group.all_gather(tensor), tensor)
        return self.tp_group.all_reduce(tensor)

    @property
    def can_record(self) -> bool:
        """Whether a CUDA graph can hold the TP group's collectives."""
        return self.tp == 1 or not (self.shares_device or isinstance(self.tp_group, HostedGroup))

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

    def meet_shards(self) -> None:
        """Wait until every shard of this replica is here."""
        if self.shared_memory is not None:
            self.shared_memory.meet()
        elif self.tp_group is not None:
            self.tp_group.barrier()

    def leave(self) -> None:
        """Leave the groups; who waits for this rank learns of it. Idempotent."""
        for member in (self.tp_group, self.lp_group, self.shared_memory, self.replicas_memory):
            if member is not None:
                member.close()
        self.tp_group = self.lp_group = self.shared_memory = self.replicas_memory = self.small_sums = None


def join(
    rank: int,
    lp: int,
    tp: int,
    host: str,
    store: dist.Store,
    name: str,
    layout: WireLayout,
    mesh: Mesh | None = None,
) -> Control:
    """Join the control plane as `rank`, and build this rank's groups, in one order on all ranks; for a worker, into
    `mesh`, whose device, shard and number of shards are known.

    They meet at `store`, whose host is `host`, under a name that no other mesh has there. Where it is the loopback, so
    are gloo's connections, whatever the host's name resolves to. The mesh uses NCCL on CUDA devices, with symmetric
    memory for small sums where that is faster; gloo by way of the host where ranks share a device; on CPUs gloo, or
    shared memory within one machine. Raises PeerError where ranks do not come.
    """
    try:
        return _join(rank, lp, tp, host, dist.PrefixStore(name, store), name, layout, mesh)
    except (
        dist.DistStoreError,
        dist.DistNetworkError,
    ) as error:  # the store's own patience, or the store, is at an end
        raise PeerError(f"the ranks of mesh {name} have not met ({error})") from error


def _join(
    rank: int, lp: int, tp: int, host: str, store: dist.Store, name: str, layout: WireLayout, mesh: Mesh | None
) -> Control:
    address = LOOPBACK if host == LOOPBACK else None
    device = mesh.device if mesh is not None else torch.device("cpu")

    def group(name: str, ranks: list[int], on: torch.device, patience_s: float = STEP_PATIENCE_S) -> Group | None:
        if rank not in ranks or len(ranks) == 1:
            return None
        place = store, name, ranks.index(rank), len(ranks)
        if on.type == "cuda" and share_a_device(store, ranks):
            return HostedGroup(*place, "gloo", address, patience_s)
        return Group(*place, "nccl" if on.type == "cuda" else "gloo", address, patience_s)

    if device.type == "cuda":
        torch.cuda.set_device(device)
        store.set(device_key(rank), f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}")
    cpu = torch.device("cpu")
    plan_group = group("plan", list(range(1 + lp * tp)), cpu, COLLECTIVE_TIMEOUT_S)
    assert plan_group is not None
    result_group = group("result", [0] + [1 + r * tp for r in range(lp)], cpu, COLLECTIVE_TIMEOUT_S)
    words = layout.usual_length, layout.length, layout.result_length
    plane = control.join(store, plan_group, result_group, lp, tp, *words)
    if mesh is None:
        return plane
    replica, shard = divmod(rank - 1, tp)
    assert (shard, tp) == (mesh.shard, mesh.tp), "a rank holds one shard for life"
    tp_group = group(f"tp/{replica}", [1 + replica * tp + s for s in range(tp)], device)
    lp_group = group(f"lp/{shard}", [1 + r * tp + shard for r in range(lp)], device)
    memory = replicas_memory = small_sums = None
    if tp_group is not None and device.type == "cuda" and not isinstance(tp_group, HostedGroup):
        small_sums = symmetric.join(store, f"symmetric/{name}/{replica}", tp_group, device)
    if tp_group is not None and device.type == "cpu":
        memory = shared_memory.join(store, f"shared-memory/{replica}", tp_group, plane.check)
    if lp_group is not None and device.type == "cpu":
        replicas_memory = shared_memory.join(store, f"shared-memory/replicas/{shard}", lp_group, plane.check)
    mesh.lp, mesh.replica = lp, replica
    mesh.tp_group, mesh.lp_group, mesh.small_sums = tp_group, lp_group, small_sums
    mesh.shared_memory, mesh.replicas_memory = memory, replicas_memory
    return plane


def device_key(rank: int) -> str:
    """The store key under which a rank says which GPU it has."""
    return f"device/{rank}"


def share_a_device(store: dist.Store, ranks: Sequence[int]) -> bool:
    """Whether two of these ranks have the same GPU, which NCCL does not allow."""
    devices = [store.get(device_key(rank)) for rank in ranks]
    return len(set(devices)) < len(devices)
