"""Telling people on stderr what takes time: at a terminal in a line that counts the seconds, elsewhere in lines."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PATIENCE_S = 1.0
"""What is over by then is not worth a word."""
REPEAT_S = 15.0
"""How often a line says that something is still going on."""


@dataclass(eq=False)
class _Task:
    text: str
    started: float = field(default_factory=time.monotonic)
    told_at: float | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


_tasks: list[_Task] = []
_lock = threading.Lock()


def tell(text: str) -> None:
    """A line about what is being done."""
    with _lock:
        _write(f"{_erased()}{text}\n")


@contextmanager
def doing(text: str) -> Iterator[None]:
    """Say what is being done while the block runs, if that takes longer than PATIENCE_S. Several may run at once; what
    waits for the same thing says nothing."""
    task = _Task(text)
    with _lock:
        is_said = any(other.text == text for other in _tasks)
        if not is_said:
            _tasks.append(task)
        if not is_said and len(_tasks) == 1:
            threading.Thread(target=_watch, name="outrider-progress", daemon=True).start()
    try:
        yield
    finally:
        with _lock:
            if not is_said:
                _tasks.remove(task)
            if task.told_at is not None:
                _write(f"{_erased()}{text}: {task.seconds:.0f} s\n")


def _watch() -> None:
    """Show what is going on until nothing is."""
    while True:
        time.sleep(0.25)
        with _lock:
            if not _tasks:
                return
            for task in _tasks:
                _show(task)


def _show(task: _Task) -> None:
    if task.seconds < PATIENCE_S:
        return
    if _is_terminal():
        task.told_at = time.monotonic()
        if task is _tasks[-1]:
            shown = "; ".join(f"{other.text} ... {other.seconds:.0f} s" for other in _tasks)
            _write(f"{_erased()}{shown[:_WIDTH]}")
    elif task.told_at is None:
        task.told_at = time.monotonic()
        _write(f"{task.text} ...\n")
    elif time.monotonic() - task.told_at > REPEAT_S:
        task.told_at = time.monotonic()
        _write(f"{task.text} ... {task.seconds:.0f} s\n")


_WIDTH = 110


def _is_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def _erased() -> str:
    """What makes room for a line where a counting one stands."""
    return "\r\x1b[2K" if _is_terminal() else ""


def _write(text: str) -> None:
    if sys.stderr is None or sys.stderr.closed:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # nobody listens any more
