"""What people see on standard error while a batch runs: a bar at a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any, Self

EVERY_S = 30.0


class Progress:
    """A line now and then. Use it as a context; all but `note` is for one thread."""

    def __init__(self) -> None:
        self._started_s = self._said_s = time.monotonic()

    def show(self, counts: str, done: float | None, skipped: float) -> None:
        """`counts` in words; which part of the input is done, if its size is known; and which part cost no time."""
        now_s = time.monotonic()
        if now_s - self._said_s < EVERY_S:
            return
        self._said_s = now_s
        rest = ""
        if done is not None and done > skipped:
            left_s = (now_s - self._started_s) * (1 - done) / (done - skipped)
            rest = f", {done:.0%}, about {clock(left_s)} to go"
        self.note(f"{counts} after {clock(now_s - self._started_s)}{rest}")

    def note(self, text: str) -> None:
        """Say something besides."""
        with suppress(OSError, ValueError):  # nobody listens: no reason to end
            print(f"outrider: {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Bar(Progress):
    """A bar, which is gone in the end. Without a known size, it only moves."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        super().__init__()
        columns: tuple[Any, ...] = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=None)

    def show(self, counts: str, done: float | None, skipped: float) -> None:
        total = None if done is None else 1.0
        self._progress.update(self._task, description=counts, completed=done or 0.0, total=total)

    def note(self, text: str) -> None:
        self._progress.console.print(f"outrider: {text}", markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def make_progress() -> Progress:
    """What standard error is good for."""
    return Bar() if sys.stderr is not None and sys.stderr.isatty() else Progress()


def clock(seconds: float) -> str:
    """H:MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
