"""The wire layout carries every plan unchanged."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.step import Bias, Commit, Reuse, Row, Seq, StepPlan, WireLayout


def random_plan(generator: np.random.Generator, num_rows: int, num_sequences: int) -> StepPlan:
    def table(length: int, width: int) -> np.ndarray:
        return generator.integers(-(2**31), 2**31, (length, width), dtype=np.int32)

    return StepPlan(
        rows=table(num_rows, len(Row)),
        sequences=table(num_sequences, len(Seq)),
        commits=table(num_rows // 2, len(Commit)),
        resets=table(num_sequences, 1).ravel(),
        reuses=table(num_sequences, len(Reuse)),
        biases=table(num_rows // 3, len(Bias)),
        masks=table(max(num_sequences // 2, 1), 9),
        masked=table(num_rows // 2, 2),
        top_k=num_sequences,
        num_logprobs=(None, 0, 5)[num_rows % 3],
        stop=bool(generator.integers(2)),
    )


@pytest.mark.parametrize(("num_rows", "num_sequences"), [(0, 0), (1, 1), (37, 3), (64, 4)])
def test_plan_survives_the_wire(num_rows, num_sequences):
    layout = WireLayout(max_rows=64, max_sequences=4)
    buffer = np.full(layout.length, 77, np.int32)
    plan = random_plan(np.random.default_rng(num_rows), num_rows, num_sequences)
    layout.encode(plan, buffer)
    decoded = layout.decode(buffer)
    for name in ("rows", "sequences", "commits", "resets", "reuses", "biases", "masks", "masked"):
        np.testing.assert_array_equal(getattr(decoded, name), getattr(plan, name))
    for name in ("top_k", "num_logprobs", "stop"):
        assert getattr(decoded, name) == getattr(plan, name)
    assert layout.usual_length <= buffer[0] <= layout.length
    assert (buffer[buffer[0] :] == 77).all()
    buffer[:] = 0  # the decoded plan keeps its own copy
    np.testing.assert_array_equal(decoded.rows, plan.rows)


def test_a_plan_too_large_for_the_wire_is_refused():
    layout = WireLayout(max_rows=8, max_sequences=2)
    plan = random_plan(np.random.default_rng(0), 9, 1)
    with pytest.raises(AssertionError):
        layout.encode(plan, np.zeros(layout.length, np.int32))


def test_local_rows_follow_the_replica_bits():
    plan = StepPlan.empty()
    plan.rows = np.zeros((4, len(Row)), np.int32)
    plan.rows[:, Row.REPLICAS] = [0b11, 0b01, 0b10, 0b11]
    assert plan.local_rows(0).tolist() == [0, 1, 3]
    assert plan.local_rows(1).tolist() == [0, 2, 3]
