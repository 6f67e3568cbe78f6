"""Requests that may be what ends the workers: who they are, and which of them it is."""

from __future__ import annotations

from collections.abc import Collection, Sequence

MOST_ENDS = 2
"""How often a step that had one request alone may end the workers before that request is failed."""


class Suspects:
    """After a step that ended every worker with caches, its requests run one by one, each until it has got past the
    place where it stood. A request that ends the workers again, by itself, is not run any more."""

    def __init__(self) -> None:
        self._ends: dict[str, int] = {}
        """By request, the steps it had alone that ended the workers."""

    def __bool__(self) -> bool:
        return bool(self._ends)

    def among(self, running: Collection[str]) -> str | None:
        """The request that is to have the next step alone."""
        for request_id in [each for each in self._ends if each not in running]:
            del self._ends[request_id]
        return next(iter(self._ends), None)

    def accuse(self, request_ids: Sequence[str]) -> str | None:
        """A step with these requests has ended the workers; returns the one that is to be failed."""
        for request_id in request_ids:
            self._ends.setdefault(request_id, 0)
        if len(request_ids) > 1:
            return None
        (alone,) = request_ids
        self._ends[alone] += 1
        if self._ends[alone] < MOST_ENDS:
            return None
        del self._ends[alone]
        return alone

    def acquit(self, request_id: str) -> None:
        """A step in which it went on has done no harm."""
        self._ends.pop(request_id, None)
