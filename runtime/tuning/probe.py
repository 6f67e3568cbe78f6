"""Steps that no request asked for: what the engine runs to learn about the mesh and the model."""

from __future__ import annotations

import numpy as np

from runtime.core import SequenceRows, partition
from runtime.step import Row, Seq, StepPlan


def probe(rows: SequenceRows, rope_length: int, num_replicas: int, top_k: int) -> StepPlan:
    """A step of these rows alone, greedy, in slot 0, divided among so many replicas."""
    table = np.zeros((len(rows), len(Row)), np.int32)
    table[:, : Row.SLOT] = rows.as_array()
    table[:, Row.OWNER], table[:, Row.REPLICAS] = partition(table[:, Row.PARENT], num_replicas)
    sequence = np.zeros((1, len(Seq)), np.int32)
    sequence[0, Seq.ROPE_LENGTH], sequence[0, Seq.TOP_P] = rope_length, np.float32(1).view(np.int32)
    return StepPlan(table, sequence, top_k=top_k)
