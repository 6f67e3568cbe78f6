"""What a decoding step costs by its shapes alone: operations, bytes read, bytes sent. No torch, no clock.

T rows run on one replica; a row is one token with its position. Multiply-adds count as two operations. Norms,
rotations and activations are left out: they are below a percent of the operations, and their time is the kernels'
(roofline.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder's sizes."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool = False
    """Input and output embeddings are one matrix."""

    @classmethod
    def of(cls, name: str, spec: Any) -> Shape:
        """Read from a `runtime.model.spec.ModelSpec`."""
        names = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
        sizes = {field: getattr(spec, field) for field in names}
        return cls(name=name, vocab_size=spec.vocab_size, tied=spec.tie_embeddings, **sizes)

    @property
    def layer_weights(self) -> int:
        """Parameters of one layer's matrices."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def head_weights(self) -> int:
        """Parameters of the LM head."""
        return self.hidden_size * self.vocab_size

    @property
    def num_parameters(self) -> int:
        """All matrices, embeddings included."""
        return self.num_layers * self.layer_weights + self.head_weights * (1 if self.tied else 2)

    def kv_bytes(self, item_bytes: int) -> int:
        """Keys and values of one token, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * item_bytes

    def shard(self, tp: int) -> Shard:
        """The largest tensor-parallel share: it sets the pace. Any tp up to the number of query heads."""
        if not 1 <= tp <= self.num_heads:
            raise ValueError(f"tp={tp}: {self.name} has {self.num_heads} query heads, and every rank needs one")
        per_kv = self.num_heads // self.num_kv_heads
        edges = [self.num_heads * rank // tp for rank in range(tp + 1)]
        kv_heads = [
            (stop - 1) // per_kv - start // per_kv + 1 for start, stop in zip(edges[:-1], edges[1:], strict=True)
        ]
        return Shard(
            self,
            num_heads=max(stop - start for start, stop in zip(edges[:-1], edges[1:], strict=True)),
            num_kv_heads=max(kv_heads),
            intermediate_size=math.ceil(self.intermediate_size / tp),
            vocab_size=math.ceil(self.vocab_size / tp),
        )


@dataclass(frozen=True)
class Shard:
    """What the busiest rank of a tensor-parallel group holds."""

    shape: Shape
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int

    @property
    def layer_weights(self) -> int:
        """Parameters of one layer's matrices on this rank."""
        shape = self.shape
        attention = shape.hidden_size * shape.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + 3 * shape.hidden_size * self.intermediate_size

    @property
    def head_weights(self) -> int:
        return self.shape.hidden_size * self.vocab_size

    @property
    def num_parameters(self) -> int:
        """Everything this rank keeps in memory."""
        return self.shape.num_layers * self.layer_weights + self.head_weights * (1 if self.shape.tied else 2)

    def attention_flops(self, rows: float, context: float) -> float:
        """Scores and weighted sums of all layers over `context` cached tokens."""
        return 4 * self.shape.num_layers * self.num_heads * self.shape.head_dim * rows * context

    def kv_read_bytes(self, context: float, item_bytes: int) -> float:
        """The cache read once per layer, whatever the rows: they share one pass over it."""
        return 2 * self.shape.num_layers * self.num_kv_heads * self.shape.head_dim * context * item_bytes


@dataclass(frozen=True)
class StepCost:
    """One step of the whole mesh."""

    flops: float
    """Operations, summed over all workers: rows that several replicas run count for each."""
    bytes_moved: float
    """Bytes of weights and keys and values read, summed over all workers."""
    plan_bytes: float
    """The plan's broadcast: its buffer times the workers that receive it."""
    result_bytes: float
    """The results' gather."""
    all_reduce_bytes: float
    """Payload of the tensor-parallel sums, all replicas: 2 per layer and 1 for the embedding, rows x hidden each."""
    commit_bytes: float
    """Keys and values of accepted rows sent to the other replicas."""

    @property
    def communication_bytes(self) -> float:
        return self.plan_bytes + self.result_bytes + self.all_reduce_bytes + self.commit_bytes


def step_cost(
    shape: Shape,
    replica_rows: Sequence[float],
    context: float,
    tp: int = 1,
    item_bytes: int = 4,
    *,
    commit_rows: float = 0.0,
    plan_bytes: float = 0.0,
    result_bytes: float = 0.0,
) -> StepCost:
    """The cost of a step whose LP replicas run `replica_rows` rows each, over `context` cached tokens.

    Args:
        commit_rows: accepted rows per step whose keys and values other replicas copy.
        plan_bytes, result_bytes: length of a plan's buffer, and of one replica's result.
    """
    lp, rows = len(replica_rows), sum(replica_rows)
    alone = lp * tp == 1  # one worker lives in the engine's process: nothing is sent
    weights = shape.num_layers * shape.layer_weights + shape.head_weights
    whole = shape.shard(1)
    return StepCost(
        flops=2 * weights * rows + whole.attention_flops(rows, context),
        bytes_moved=lp * (weights * item_bytes + whole.kv_read_bytes(context, item_bytes)),
        plan_bytes=0 if alone else plan_bytes * lp * tp,
        result_bytes=0 if alone else result_bytes * lp,
        all_reduce_bytes=(2 * shape.num_layers + 1) * rows * shape.hidden_size * item_bytes if tp > 1 else 0,
        commit_bytes=commit_rows * shape.kv_bytes(item_bytes) * (lp - 1),
    )


def splits(num_workers: int, num_heads: int) -> list[tuple[int, int]]:
    """All (lp, tp) of `num_workers`, tp at most the model's query heads."""
    sizes = [tp for tp in range(1, min(num_workers, num_heads) + 1) if num_workers % tp == 0]
    return [(num_workers // tp, tp) for tp in sizes]
