"""The step's bookkeeping in C++ equals its definition, written out in Python, on random steps."""

from __future__ import annotations

import random

import numpy as np
import pytest

from runtime import core
from runtime.config import Config
from runtime.core import Compacting, Keys, SequenceRows, Share, Sliding
from runtime.model.attention import Segment
from runtime.retention import layer_groups
from runtime.step import NOT_A_NUMBER, Choose, Commit, Row, Seq, StepPlan
from tests.oracles import POLICIES, SEPARATORS

BLOCK = 32


def random_rows(rng: random.Random, first: int, chain: int, count: int) -> SequenceRows:
    """A chain, and guesses that hang on its end."""
    rows = SequenceRows(first)
    rows.add_chain([rng.randrange(50) for _ in range(chain)], reaches_end=True)
    for _ in range(count - chain):
        parent = rng.randrange(chain - 1, len(rows))
        rows.add(rng.randrange(50), parent, rng.choice(list(Choose)))
    return rows


def random_step(rng: random.Random, num_replicas: int) -> tuple[StepPlan, list[tuple[SequenceRows, int]]]:
    slots = rng.sample(range(8), rng.randrange(1, 5))
    parts = []
    for slot in slots:
        chain = rng.randrange(1, 6)
        parts.append((random_rows(rng, rng.randrange(40), chain, rng.randrange(chain, 20)), slot))
    sequences = np.zeros((len(slots), len(Seq)), np.int32)
    for line, slot in zip(sequences, rng.sample(slots, len(slots)), strict=True):
        temperature = np.float32(rng.choice([0.0, 1e-6, 0.7])).view(np.int32)
        line[[Seq.SLOT, Seq.ROPE_LENGTH, Seq.TEMPERATURE]] = slot, 100 + slot, temperature
        line[Seq.NUM_COMING] = rng.choice([0, 5])
    return StepPlan(core.assemble(parts, num_replicas), sequences), parts


def test_assembling_puts_one_sequence_behind_the_other() -> None:
    rng = random.Random(1)
    for _ in range(50):
        plan, parts = random_step(rng, num_replicas := rng.randrange(1, 4))
        start = 0
        for rows, slot in parts:
            block = plan.rows[start : start + len(rows)]
            assert block[:, Row.TOKEN].tolist() == rows.tokens and (block[:, Row.SLOT] == slot).all()
            assert block[:, Row.POSITION].tolist() == rows.positions and block[:, Row.CHOOSE].tolist() == rows.choose
            assert block[:, Row.PARENT].tolist() == [parent + start if parent >= 0 else -1 for parent in rows.parents]
            start += len(rows)
        owners, replicas = core.partition(plan.rows[:, Row.PARENT], num_replicas)
        assert np.array_equal(plan.rows[:, Row.OWNER], owners)
        assert np.array_equal(plan.rows[:, Row.REPLICAS], replicas)


def test_a_share_has_the_rows_of_its_replica_as_its_decoder_wants_them() -> None:
    rng = random.Random(2)
    for _ in range(100):
        num_replicas = rng.randrange(1, 4)
        plan, _ = random_step(rng, num_replicas)
        line_of = {int(line[Seq.SLOT]): line for line in plan.sequences}
        results = []
        for replica in range(num_replicas):
            share = Share(plan.rows, plan.sequences, replica)
            local = plan.local_rows(replica)
            mine = plan.rows[local]
            assert share.num_rows == len(local) and np.array_equal(share.local, local)
            lengths = [line_of[slot][Seq.ROPE_LENGTH] for slot in mine[:, Row.SLOT].tolist()]
            assert np.array_equal(share.columns, np.stack([mine[:, Row.TOKEN], mine[:, Row.POSITION], lengths]))
            covered = []
            for slot, start, stop in share.runs:
                covered += range(start, stop)
                assert (mine[start:stop, Row.SLOT] == slot).all()
                for row in range(start, stop):
                    parent = mine[row, Row.PARENT]
                    expected = list(local).index(parent) - start if parent >= 0 else -1
                    assert share.parents[row] == expected
            assert covered == list(range(len(local)))
            wanted = (mine[:, Row.CHOOSE] != Choose.NOTHING) & (mine[:, Row.OWNER] == replica)
            assert np.array_equal(share.wanted, np.flatnonzero(wanted))
            for index, row in enumerate(share.wanted):
                line = line_of[int(mine[row, Row.SLOT])]
                assert np.array_equal(plan.sequences[share.sequence_of[index]], line)
                hot = mine[row, Row.CHOOSE] == Choose.SAMPLE and line[Seq.TEMPERATURE] == np.float32(0.7).view(np.int32)
                assert (index in share.sampled) == hot
            assert share.turns == [(line[Seq.SLOT], 5) for line in plan.sequences if line[Seq.NUM_COMING]]
            found = np.array([[rng.randrange(90), 7, 8] for _ in share.wanted], np.int32).reshape(-1, 3)
            if len(found):
                found[0, 0] = NOT_A_NUMBER
            chosen, without = share.spread(found)
            expected = np.zeros((len(local), 3), np.int32)
            expected[:, 0] = -1
            expected[share.wanted] = found
            expected[expected[:, 0] == NOT_A_NUMBER, 1:] = 0
            assert np.array_equal(chosen, expected)
            assert without == mine[chosen[:, 0] == NOT_A_NUMBER, Row.SLOT].tolist()
            results.append(chosen)
        merged = core.merge(plan.rows, results, 3)
        for row in range(plan.num_rows):
            owner = plan.rows[row, Row.OWNER]
            assert np.array_equal(merged[row], results[owner][list(plan.local_rows(owner)).index(row)])


def test_too_few_rows_are_repeated() -> None:
    rows = SequenceRows(9)
    rows.add_chain([4], reaches_end=True)
    sequences = np.zeros((1, len(Seq)), np.int32)
    share = Share(core.assemble([(rows, 0)], 1), sequences, min_rows=2)
    assert share.columns.tolist() == [[4, 4], [9, 9], [0, 0]] and share.parents.tolist() == [-1, -1]
    assert share.num_rows == 1 and share.runs == [(0, 0, 2)] and share.wanted.tolist() == [0]


def test_what_cannot_be_is_refused() -> None:
    rows = SequenceRows(0)
    rows.add_chain([1], reaches_end=True)
    sequences = np.zeros((1, len(Seq)), np.int32)
    with pytest.raises(ValueError, match="slot has no sequence"):
        Share(core.assemble([(rows, 3)], 1), sequences)
    sequences = np.zeros((2, len(Seq)), np.int32)
    sequences[1, Seq.SLOT] = 1
    with pytest.raises(ValueError, match="must stand together"):
        Share(core.assemble([(rows, 0), (rows, 1), (rows, 0)], 1), sequences)
    with pytest.raises(ValueError, match="one result per wanted row"):
        Share(core.assemble([(rows, 0)], 1), sequences).spread(np.zeros((2, 1), np.int32))
    with pytest.raises(ValueError, match="end is a token"):
        SequenceRows(0).add_chain([], reaches_end=True)
    with pytest.raises(ValueError, match="out of order"):
        core.pull_rows(0, 1, 8, 1, 0, [2, 1])


def test_commits_name_what_each_replica_has_staged() -> None:
    rng = random.Random(3)
    for _ in range(50):
        num_replicas = rng.randrange(1, 4)
        plan, parts = random_step(rng, num_replicas)
        start, lines = 0, []
        accepted_of = {}
        for rows, slot in parts:
            row, accepted = len(rows) - 1, []
            while row >= 0:  # the path to the last row
                accepted.insert(0, row)
                row = rows.parents[row]
            lines.append(core.commit_lines(plan.rows, start, accepted, num_replicas))
            everywhere = (plan.rows[[start + a for a in accepted], Row.REPLICAS] == (1 << num_replicas) - 1).all()
            source = -1 if everywhere else plan.rows[start + accepted[-1], Row.OWNER]
            assert lines[-1][:, Commit.ROW].tolist() == [start + a for a in accepted]
            assert (lines[-1][:, Commit.SOURCE] == source).all()
            accepted_of[slot] = [start + a for a in accepted]
            start += len(rows)
        for replica in range(num_replicas):
            share, local = Share(plan.rows, plan.sequences, replica), list(plan.local_rows(replica))
            for slot, source, staged, tokens in share.commits(np.concatenate(lines)):
                assert tokens == plan.rows[accepted_of[slot], Row.TOKEN].tolist()
                if source in (-1, replica):
                    first = next(i for i, row in enumerate(local) if plan.rows[row, Row.SLOT] == slot)
                    assert staged == [local.index(row) - first for row in accepted_of[slot]]


def keys_by_definition(segment: Segment, retained, window: int | None) -> list[list[int]]:
    """Per row, the keys that it sees, in the order of their positions."""
    sees = segment.sees(retained, window)
    positions = np.concatenate([retained.positions, segment.positions])
    every = np.ones((len(segment.positions), len(positions)), bool) if sees is None else sees
    return [sorted(np.flatnonzero(row).tolist(), key=lambda key: positions[key]) for row in every]


@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_keys_stand_where_the_kernels_look_for_them(policy: str, window: int | None) -> None:
    rng = random.Random(policy)
    (group,) = layer_groups(Config.from_dict({"cache": POLICIES[policy]}).cache, 1, 512)
    for _ in range(60):
        retained = group.new()
        retained.begin_turn(rng.randrange(1, 8))
        while retained.length < (length := rng.randrange(70)):
            room = min(length, retained.horizon) - retained.length
            retained.commit([rng.choice([50, *SEPARATORS]) for _ in range(min(room, rng.randrange(1, 9)))])
            if isinstance(retained, Compacting) and retained.num_stored + 12 > retained.max_stored:
                break
        chain = rng.randrange(1, 5)
        rows = random_rows(rng, retained.length, chain, rng.randrange(chain, 12))
        parents, tokens = np.array(rows.parents, np.int32), np.array(rows.tokens)
        segment = Segment(0, 0, len(rows), tokens, np.array(rows.positions), parents)
        cut = None if retained.slot else window  # ModelSpec.check_cache
        keys = Keys(retained, segment.positions, segment.tokens, parents, window, BLOCK)
        assert keys.num_columns == len(keys.columns) and keys.num_columns % BLOCK == 0 == keys.num_tail % BLOCK
        positions = np.concatenate([retained.positions, segment.positions])
        for column, key in enumerate(keys.columns):
            assert key < 0 or positions[key] % BLOCK == column % BLOCK
        tails = keys.tails.reshape(len(rows), keys.num_tail)
        visible = keys.visible.reshape(-1, keys.num_columns) if len(keys.visible) else None
        for row, expected in enumerate(keys_by_definition(segment, retained, cut)):
            shared = [key for key in keys.columns.tolist() if key >= 0]
            if visible is not None:
                shared = [key for column, key in enumerate(keys.columns.tolist()) if visible[row, column]]
            found = [key for key in shared if visible is not None or key <= retained.num_stored + row]
            assert all(key < keys.num_shared for key in found)
            own = [key for key in (tails[row].tolist() if keys.num_tail else []) if key >= 0]
            assert all(key >= keys.num_shared for key in own)
            assert found + own == expected


def test_pulling_rows_moves_them_in_every_block() -> None:
    buffer = np.arange(3 * 10 * 4, dtype=np.float32).reshape(3, 10, 4)
    expected = buffer.copy()
    expected[:, 5:8] = buffer[:, [5, 7, 9]]
    core.pull_rows(buffer.ctypes.data, 3, 10 * 4 * 4, 4 * 4, 5, [0, 2, 4])
    assert np.array_equal(buffer, expected)


def test_a_window_of_everything_forgets_nothing() -> None:
    everything = Sliding(None, 100, slot=False)
    for token in range(50):
        assert everything.commit([token]) is None
    assert everything.positions.tolist() == list(range(50)) and everything.horizon == 2**62
