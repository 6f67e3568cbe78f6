"""Dividing a step's rows among the LP replicas: each gets subtrees, with the ancestors they need."""

from __future__ import annotations

from collections.abc import Sequence


def partition(parents: Sequence[int], num_replicas: int) -> tuple[list[int], list[int]]:
    """Divide a forest of rows into `num_replicas` parts of nearly equal size, each closed under ancestors.

    The leaves, in depth-first order, are cut into contiguous runs, so that neighbours share their
    ancestors; the cut makes the largest part as small as such a cut can.

    Args:
        parents: per row its parent's index, lower than its own, or -1. [T]
    Returns:
        owner [T], the first replica that has the row, and replicas [T], the bit set of all that have it.
    """
    num_rows = len(parents)
    if num_replicas == 1 or num_rows == 0:
        return [0] * num_rows, [1] * num_rows
    leaves = _leaves_depth_first(parents)
    low, high = -(-num_rows // num_replicas), num_rows
    parts = None
    while low < high:
        size = (low + high) // 2
        attempt = _cut(parents, leaves, num_replicas, size)
        if attempt is None:
            low = size + 1
        else:
            parts, high = attempt, size
    replicas = parts if parts is not None else _cut(parents, leaves, num_replicas, low)
    assert replicas is not None
    return [(mask & -mask).bit_length() - 1 for mask in replicas], replicas


def _leaves_depth_first(parents: Sequence[int]) -> list[int]:
    children: list[list[int]] = [[] for _ in range(len(parents) + 1)]  # the last list holds the roots
    for row, parent in enumerate(parents):
        children[parent].append(row)
    leaves = []
    stack = children[-1][::-1]
    while stack:
        row = stack.pop()
        if children[row]:
            stack.extend(reversed(children[row]))
        else:
            leaves.append(row)
    return leaves


def _cut(parents: Sequence[int], leaves: Sequence[int], num_replicas: int, size: int) -> list[int] | None:
    """Bit sets of a greedy cut into parts of at most `size` rows, or None if that takes too many parts."""
    replicas = [0] * len(parents)
    bit, used = 1, 0
    for leaf in leaves:
        while True:
            path = []
            row = leaf
            while row >= 0 and not replicas[row] & bit:
                path.append(row)
                row = parents[row]
            if used + len(path) <= size:
                break
            if used == 0 or bit >> (num_replicas - 1):  # too long for any part, or no part is left
                return None
            bit, used = bit << 1, 0
        for row in path:
            replicas[row] |= bit
        used += len(path)
    return replicas
