"""Small sums over the GPUs of one machine through memory that they share: each reads all parts, and adds them up in the
order of ranks.

torch's symmetric memory, an alpha in every release: whatever it raises means that it cannot be had, and then NCCL does
all sums. Where both can be had, the faster one does, size by size, by measurement when the mesh is formed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from runtime.mesh.group import Group
from runtime.progress import tell

MOST_BYTES = 1 << 18
"""Of a sum. Larger ones are bound by the links, and a ring moves less."""
LEAST_BYTES = 1 << 10
ROUNDS, REPEATS = 5, 20
DTYPES = (torch.bfloat16, torch.float32)
"""What the one-shot kernel adds up."""

Reduce = Callable[[torch.Tensor], torch.Tensor]


class OneShot:
    """The ranks' shared memory, and the sum through it. Calls of a group stand in one order, on streams in turn."""

    def __init__(self, store: dist.Store, name: str, rank: int, size: int, device: torch.device) -> None:
        """This rank's part. `name`: the same on all ranks, and no other group's. Raises what torch raises."""
        from torch._C._distributed_c10d import _SymmetricMemory

        self.name = name
        _SymmetricMemory.set_group_info(name, rank, size, dist.PrefixStore(name, store))
        self.buffer = _SymmetricMemory.empty_strided_p2p((MOST_BYTES,), (1,), torch.uint8, device, name)
        self._rendezvous = _SymmetricMemory.rendezvous

    def meet(self) -> None:
        """Map the others' parts, once all ranks have theirs. Raises what torch raises."""
        self._handle = self._rendezvous(self.buffer)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, a new tensor."""
        place = self.buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(place, tensor, "sum", self.name)


class SmallSums:
    """Which sums are better done in one shot than by the group, by their size."""

    def __init__(self, one_shot: Reduce, most_bytes: int) -> None:
        """`most_bytes`: sums of so many are."""
        self.one_shot, self.most_bytes = one_shot, most_bytes

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether this is such a sum."""
        size = tensor.nbytes
        return 0 < size <= self.most_bytes and size % 16 == 0 and tensor.dtype in DTYPES and tensor.is_contiguous()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.one_shot(tensor)


class Agreeing(Protocol):
    """What of a Group is needed to come to one mind."""

    def all_reduce(self, tensor: torch.Tensor, op: object = ...) -> torch.Tensor: ...


def join(store: dist.Store, key: str, group: Group, device: torch.device) -> SmallSums | None:
    """Meet the group's ranks in symmetric memory and see what it is good for; None, on all ranks, where one cannot have
    it, or where it is never the faster way. `key`: the group's own in the store."""
    if group.rank == 0:
        store.set(key, f"outrider-{uuid.uuid4().hex}")
    name = store.get(key).decode()
    one_shot, reason = None, ""
    try:
        one_shot = OneShot(store, name, group.rank, group.size, device)
    except Exception as error:  # an alpha: whatever it is, there is another way
        reason = f"{type(error).__name__}: {error}"
    can = agreed(group, one_shot is not None, device)
    if can and one_shot is not None:
        try:
            one_shot.meet()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        can = agreed(group, not reason, device)
    if not can or one_shot is None:
        tell(f"symmetric memory cannot be had ({reason or 'on another rank'}); NCCL adds up")
        return None
    ways: Mapping[str, Reduce] = {"one shot": one_shot, "group": lambda tensor: group.all_reduce(tensor)}
    most = largest_faster(ways, group, device, _timed)
    return SmallSums(one_shot, most) if most else None


def agreed(group: Agreeing, mine: bool, device: torch.device) -> bool:
    """Whether it is so on every rank."""
    return bool(group.all_reduce(torch.tensor([int(mine)], device=device), dist.ReduceOp.MIN).item())


def sizes() -> Sequence[int]:
    """Bytes at which the ways are compared."""
    return [1 << bit for bit in range(LEAST_BYTES.bit_length() - 1, MOST_BYTES.bit_length())]


def largest_faster(
    ways: Mapping[str, Reduce], group: Agreeing, device: torch.device, timed: Callable[[Reduce, torch.Tensor], float]
) -> int:
    """The largest size in bytes up to which "one shot" is no slower than "group"; 0: it never is. All ranks find the
    same, since the slowest one counts."""
    found = []
    for size in sizes():
        tensor = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        found.append([timed(ways[name], tensor) for name in ("one shot", "group")])
    slowest = group.all_reduce(torch.tensor(found, dtype=torch.float64, device=device), dist.ReduceOp.MAX).tolist()
    largest = 0
    for size, (one_shot, other) in zip(sizes(), slowest, strict=True):
        if one_shot > other:
            break
        largest = size
    return largest


def _timed(reduce: Reduce, tensor: torch.Tensor) -> float:
    """Seconds of one sum within a CUDA graph, the best of some rounds."""
    for _ in range(3):  # connections, kernels
        reduce(tensor)
    torch.cuda.synchronize(tensor.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(REPEATS):
            reduce(tensor)
    best = float("inf")
    for _ in range(ROUNDS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / 1000 / REPEATS)
    return best
