"""Which replicas are made of the workers that are there."""

from __future__ import annotations

import pytest

from runtime.workers.roster import Member, assemble


def members(*kinds: tuple[int, int | None]) -> dict[int, Member]:
    """Workers 1, 2 ... of these shards and steps."""
    return {number: Member(*kind) for number, kind in enumerate(kinds, start=1)}


@pytest.mark.parametrize(
    ("kinds", "tp", "replicas", "num_sound"),
    [
        ([(0, 7), (0, 7), (0, None)], 1, [[1], [2], [3]], 2),
        ([(0, 7), (0, 8)], 1, [[1], [2]], 2),  # one is a step ahead: both have what they need
        ([(0, 7), (1, 7), (0, 7), (1, None)], 2, [[1, 2], [3, 4]], 1),
        ([(1, 7), (0, 7)], 2, [[2, 1]], 1),  # of two replicas each half
        ([(0, 7), (1, 8)], 2, [[1, 2]], 0),  # halves at different steps do not fit
        ([(0, 7), (1, 8), (0, 8)], 2, [[3, 2]], 1),
        ([(0, 7), (0, 7)], 2, [], 0),
        ([(0, None), (1, None)], 2, [[1, 2]], 0),
        ([], 1, [], 0),
    ],
)
def test_whole_replicas_are_made_and_those_with_caches_come_first(kinds, tp, replicas, num_sound) -> None:
    assert assemble(members(*kinds), tp) == (replicas, num_sound)
