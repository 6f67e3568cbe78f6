"""One thread at a time, each in its turn."""

from __future__ import annotations

import threading


class Turn:
    """A lock that a thread may take again while it has it. Whoever waits comes before whoever has just had it, which a
    plain lock does not promise: a thread that steps in a loop would keep all others out."""

    def __init__(self) -> None:
        self._lock, self._next = threading.Lock(), threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._owner != threading.get_ident():
            with self._next:  # held while waiting, so that the owner cannot overtake
                self._lock.acquire()
            self._owner = threading.get_ident()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()
