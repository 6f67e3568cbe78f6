"""Which processes descend from this one, and how to be sure that they are gone."""

from __future__ import annotations

import psutil


def descendants() -> list[psutil.Process]:
    """Every living process that this one started, directly or not."""
    return psutil.Process().children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie that nobody has waited for yet does not."""
    return [process for process in processes if process.is_running() and _status(process) != psutil.STATUS_ZOMBIE]


def end(processes: list[psutil.Process], grace_s: float) -> None:
    """Wait up to `grace_s` seconds for the processes to end, then kill what is left."""
    _, left = psutil.wait_procs(processes, timeout=grace_s)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(left, timeout=grace_s)


def describe(process: psutil.Process) -> str:
    """The process's id and command, for a message."""
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:100] or process.name()}"
    except psutil.Error:
        return str(process.pid)


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_ZOMBIE)
