"""A decoding step's latency on a GPU, projected from stated constants; nothing is run.

Every constant stands in a frozen dataclass with its unit and where it comes from: a data sheet, a published
measurement, one of ours, or an assumption, which is then called one. `python -m benchmarks.roofline` prints what they
give beside published figures (benchmarks/published.py), mismatches included.

Model of a step: the matrices of a layer take the longer of reading their weights and multiplying; attention likewise,
for the bytes that its kernels move; kernels add a fixed time each; tensor parallelism adds two all-reduces per layer;
the host adds what `benchmarks.overhead` measured (host.py), where that is given; a mesh that was not measured there
adds the plan's broadcast and the results' gather as assumed here; replicas copy accepted keys and values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from benchmarks.costs import Shape, Shard
from benchmarks.roofline.host import HostPath
from runtime.model.cuda.arrays import CHUNK, DEPTH
from runtime.model.cuda.attention import Tiling


@dataclass(frozen=True)
class Device:
    """One GPU, the SXM variant, NVSwitch between all eight of a node."""

    name: str
    peak_flops: float
    """Dense bf16 matrix operations per second, without sparsity. Source: NVIDIA's data sheets (A100: 312 TFLOPS, H100
    SXM and H200: 989 TFLOPS). float32 through TF32 is half of it on both generations."""
    memory_bandwidth: float
    """Bytes per second. Source: data sheets (A100 80 GB 2,039 GB/s; H100 SXM 3.35 TB/s; H200 4.8 TB/s)."""
    memory_bytes: float
    """Capacity. Source: data sheets (80, 80 and 141 GB)."""
    link_bandwidth: float
    """NVLink bytes per second in one direction. Source: half of the data sheets' 600 and 900 GB/s."""
    memory_fraction: float = 0.83
    """Of `memory_bandwidth`, what a long read reaches. Source: gpt-fast's README observes a peak of about 1,700 GB/s on
    an A100 of 2,039 GB/s. Assumption: the same share on Hopper."""
    flops_fraction: float = 0.6
    """Of `peak_flops`, what products of tens to hundreds of rows reach. Assumption; large square products reach
    0.7 to 0.8."""
    link_fraction: float = 0.8
    """Of `link_bandwidth`, what a collective reaches. Source: NVIDIA/nccl issue 1455 reports a bus bandwidth of 365 to
    370 GB/s of 450 on eight H100 with the ring algorithm."""
    cache_fraction: float = 2.0
    """Times `memory_bandwidth`, what reads out of the second-level cache reach. Assumption."""
    usable_memory: float = 0.9
    """Share of `memory_bytes` for weights and caches. Assumption; the rest is activations, NCCL and fragments."""

    def flops(self, item_bytes: int) -> float:
        """Reached operations per second for elements of 2 (bf16) or 4 bytes (TF32)."""
        if item_bytes not in (2, 4):
            raise ValueError(f"item_bytes={item_bytes}: only 2 (bf16, fp16) and 4 (TF32) have a rate here")
        return self.peak_flops * self.flops_fraction * 2 / item_bytes

    @property
    def bandwidth(self) -> float:
        """Reached bytes per second."""
        return self.memory_bandwidth * self.memory_fraction


DEVICES = {
    "a100": Device("a100", 312e12, 2.039e12, 80e9, 300e9),
    "h100": Device("h100", 989e12, 3.35e12, 80e9, 450e9),
    "h200": Device("h200", 989e12, 4.8e12, 141e9, 450e9),
}

MODELS = {
    "llama-2-7b": Shape("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000),
    "llama-3-8b": Shape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
    "llama-2-13b": Shape("llama-2-13b", 40, 5120, 40, 40, 128, 13824, 32000),
    "llama-2-70b": Shape("llama-2-70b", 80, 8192, 64, 8, 128, 28672, 32000),
}
"""Source: the published checkpoints' config.json."""


@dataclass(frozen=True)
class Software:
    """How the kernels of a step get onto the device."""

    name: str
    kernels_per_layer: int
    """Launches of one decoder layer. Fused: two norms, qkv, rotation with cache write, attention and its
    reduction, output, gate and up, activation, down (10). Eager transformers: about 33, counted from its Llama."""
    kernel_s: float
    """Seconds per kernel on the device that are neither reading nor multiplying: gap, ramp and tail. Assumption: 4 us
    within a CUDA graph (gaps are 1 to 2 us, a small kernel runs 2 to 3), the same in eager mode. Rounded, not fitted,
    but chosen with gpt-fast's figures in view: at the bandwidth assumed, its one A100 spends 5 us per kernel."""
    launch_s: float
    """Seconds the host needs per kernel; a step cannot be faster than the host. Assumption: none for a captured graph,
    20 us for eager transformers (PyTorch's dispatch and launch about 10 us, Python around it as much again)."""


GRAPH = Software("captured graph", 10, 4e-6, 0.0)
EAGER = Software("eager transformers", 33, 4e-6, 20e-6)


@dataclass(frozen=True)
class Transport:
    """What messages cost."""

    reduce_s: float = 6e-6
    """Latency of a small all-reduce between two GPUs, seconds. Source: NVIDIA/nccl issue 1259, 6 us for two H100 within
    a CUDA graph. Assumption: the same on an A100."""
    reduce_peer_s: float = 1e-6
    """Added per further GPU. Assumption; that issue's subject is that latency grows with their number."""
    control_hop_s: float = 115e-6
    """One hop of a gloo message between processes, seconds. Source: ours: broadcast plus gather with
    one worker took 0.23 ms over loopback on a busy two-core machine. A GPU node's cores should do better."""
    control_bandwidth: float = 1e9
    """Bytes per second of such a message. Assumption, pessimistic for loopback and for 10 Gbit/s Ethernet alike."""

    def all_reduce(self, payload: float, tp: int, device: Device) -> float:
        """Seconds to sum `payload` bytes over `tp` GPUs: latency, and the ring's 2 (tp-1) / tp of the payload."""
        if tp == 1:
            return 0.0
        moved = 2 * (tp - 1) / tp * payload
        return self.reduce_s + self.reduce_peer_s * (tp - 2) + moved / (device.link_bandwidth * device.link_fraction)

    def broadcast(self, payload: float, num_workers: int) -> float:
        """Seconds until the last of `num_workers` has a plan, sent along a binary tree; 0 for one, in-process."""
        if num_workers == 1:
            return 0.0
        return math.ceil(math.log2(1 + num_workers)) * (self.control_hop_s + payload / self.control_bandwidth)

    def gather(self, payload: float, lp: int, num_workers: int) -> float:
        """Seconds until `lp` results of `payload` bytes have arrived at the coordinator; 0 in-process."""
        return 0.0 if num_workers == 1 else self.control_hop_s + lp * payload / self.control_bandwidth


TRANSPORT = Transport()


@dataclass(frozen=True)
class StepTime:
    """Where a projected step goes, seconds."""

    linear: float = 0.0
    """Matrices of all layers: the longer of reading weights and multiplying."""
    attention: float = 0.0
    """The longer of moving the kernels' bytes and multiplying with keys and values."""
    head: float = 0.0
    """LM head, matrix as above."""
    kernels: float = 0.0
    """Kernels' fixed time, and what the host lags behind the device in eager mode."""
    all_reduce: float = 0.0
    """Tensor parallelism's sums, and the meeting of the vocabulary's parts."""
    broadcast: float = 0.0
    """The plan, coordinator to workers."""
    gather: float = 0.0
    """The results, replicas to coordinator."""
    commit: float = 0.0
    """Accepted keys and values, copied between replicas."""
    host: float = 0.0
    """Planning, transport where it was measured, the caches' accounts, verifying: as measured elsewhere and given."""

    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def total(self) -> float:
        return sum(self.parts().values())


def step_seconds(
    device: Device,
    model: Shape,
    rows_per_replica: float,
    context: float,
    tp: int = 1,
    lp: int = 1,
    item_bytes: int = 2,
    *,
    head_rows: float | None = None,
    commit_rows: float = 0.0,
    plan_bytes: float = 4096.0,
    result_bytes: float = 1024.0,
    host: HostPath | None = None,
    rows: float | None = None,
    software: Software = GRAPH,
    transport: Transport = TRANSPORT,
) -> StepTime:
    """Project one step.

    Args:
        rows_per_replica: rows of the largest replica, which sets the pace.
        context: cached tokens that every row attends to.
        head_rows: rows that reach the LM head; None: all.
        commit_rows: accepted rows per step whose keys and values the other replicas copy.
        plan_bytes, result_bytes: the plan's buffer, one replica's result.
        host: the host's part as measured; None: not counted.
        rows: of the whole mesh, which the host's part goes by; None: lp times the largest replica's.
    """
    shard = model.shard(tp)
    flops, bandwidth, layers = device.flops(item_bytes), device.bandwidth, model.num_layers

    def matrix(weights: float, rows: float) -> float:
        return max(weights * item_bytes / bandwidth, 2 * weights * rows / flops)

    from_memory, from_cache = attention_bytes(shard, rows_per_replica, context, item_bytes)
    moves = from_memory / bandwidth + from_cache / (device.memory_bandwidth * device.cache_fraction)
    multiplies = shard.attention_flops(rows_per_replica, context) / flops
    num_kernels = layers * software.kernels_per_layer
    linear = layers * matrix(shard.layer_weights, rows_per_replica)
    attention = max(moves, multiplies)
    head = matrix(shard.head_weights, rows_per_replica if head_rows is None else head_rows)
    fixed = num_kernels * software.kernel_s
    lag = max(num_kernels * software.launch_s - (linear + attention + head + fixed), 0.0)
    payload = rows_per_replica * model.hidden_size * item_bytes
    sums = (2 * layers + 1) * transport.all_reduce(payload, tp, device)  # two per layer, and the embedding
    chosen = transport.all_reduce(16 * rows_per_replica, tp, device)  # the vocabulary's parts meet: (value, id) per row
    copied = commit_rows * shard.kv_read_bytes(1, item_bytes)
    host_s, is_measured = 0.0, False
    if host is not None:
        is_measured = host.has(lp, tp)  # with its transport
        mesh = (lp, tp) if is_measured else (1, 1)
        host_s = host.seconds(lp * rows_per_replica if rows is None else rows, *mesh)
    return StepTime(
        linear=linear,
        attention=attention,
        head=head,
        kernels=fixed + lag,
        all_reduce=sums + chosen,
        broadcast=0.0 if is_measured else transport.broadcast(plan_bytes, lp * tp),
        gather=0.0 if is_measured else transport.gather(result_bytes, lp, lp * tp),
        commit=0.0 if lp == 1 else transport.reduce_s + copied / (device.link_bandwidth * device.link_fraction),
        host=host_s,
    )


def attention_bytes(shard: Shard, rows: float, context: float, item_bytes: int) -> tuple[float, float]:
    """What the attention kernels of all layers move, out of memory and out of the second-level cache.

    The dense part is read once per tile of rows, the tail (runtime/model/cuda/arrays.py) once per row: the first time
    out of memory, then out of the cache, which is taken to hold a layer's keys and values. Partial sums are written
    and read there, too.
    """
    group = math.ceil(shard.num_heads / shard.num_kv_heads)
    num_rows = max(math.ceil(rows), 1)
    tiling = Tiling.of(num_rows, shard.num_kv_heads, group, shard.shape.head_dim)
    num_tiles = math.ceil(num_rows / tiling.rows_per_tile(group))
    tail = min(context, DEPTH + CHUNK / 2)
    again = (num_tiles - 1) * (context - tail) + (num_rows - 1) * tail
    partial = 8 * num_rows * shard.num_heads * tiling.num_parts * (shard.shape.head_dim + 2)
    once = shard.kv_read_bytes(context, item_bytes)
    return once, shard.kv_read_bytes(again, item_bytes) + shard.shape.num_layers * partial * (context > 0)


def fits(device: Device, model: Shape, tp: int, context: float, item_bytes: int = 2) -> bool:
    """Whether a tensor-parallel share and one sequence's cache fit the device's memory."""
    shard = model.shard(tp)
    needed = shard.num_parameters * item_bytes + shard.kv_read_bytes(context, item_bytes)
    return needed <= device.memory_bytes * device.usable_memory
