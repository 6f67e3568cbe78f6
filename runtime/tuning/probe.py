"""Steps that no request asked for: what the engine runs to learn about the mesh and the model."""

from __future__ import annotations

import numpy as np

from runtime.core import SequenceRows, assemble
from runtime.step import Seq, StepPlan


def probe(rows: SequenceRows, rope_length: int, num_replicas: int, top_k: int) -> StepPlan:
    """A step of these rows alone, greedy, in slot 0, divided among so many replicas."""
    sequence = np.zeros((1, len(Seq)), np.int32)
    sequence[0, Seq.ROPE_LENGTH], sequence[0, Seq.TOP_P] = rope_length, np.float32(1).view(np.int32)
    return StepPlan(assemble([(rows, 0)], num_replicas), sequence, top_k=top_k)
