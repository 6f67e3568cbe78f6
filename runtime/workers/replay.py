"""A step once more, for ranks that were not given what it left behind."""

from __future__ import annotations

import numpy as np

from runtime.step import Choose, Commit, Int32, Row, Seq, StepPlan


def accepted_again(previous: StepPlan, commits: Int32, num_replicas: int) -> StepPlan:
    """A plan whose rows are those of `previous` that `commits` [C, len(Commit)] names, run by every replica.

    They were accepted, so they are the text's next tokens: of each sequence a chain, in the order of its positions. A
    row sees the same tokens as before, so its keys and values are the same, to the bit where kernels are exact.
    """
    rows = previous.rows[commits[:, Commit.ROW]].copy()
    follows = np.zeros(len(rows), bool)
    follows[1:] = rows[1:, Row.SLOT] == rows[:-1, Row.SLOT]
    rows[:, Row.PARENT] = np.where(follows, np.arange(len(rows)) - 1, -1)
    rows[:, Row.CHOOSE] = Choose.NOTHING
    run_by_all(rows, num_replicas)
    sequences = previous.sequences[np.isin(previous.sequences[:, Seq.SLOT], rows[:, Row.SLOT])].copy()
    sequences[:, Seq.NUM_COMING] = 0  # their turns have begun
    return StepPlan(rows, sequences, number=previous.number)


def commits_of_all(count: int) -> Int32:
    """Commits of all rows, so many, of a plan that every replica has run."""
    lines = np.empty((count, len(Commit)), np.int32)
    lines[:, Commit.ROW], lines[:, Commit.SOURCE] = np.arange(count), -1
    return lines


def run_by_all(rows: Int32, num_replicas: int) -> None:
    """Have every replica run these rows [T, len(Row)], in place."""
    rows[:, Row.OWNER] = 0
    rows[:, Row.REPLICAS] = (1 << num_replicas) - 1
