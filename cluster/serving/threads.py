"""Work whose time grows with what a client has sent, off the event loop: long messages hold up neither short ones nor
the engine."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

R = TypeVar("R")

SHORT_BYTES = 2**16
"""Messages up to this size take milliseconds to read and tokenise; one of 16 MiB takes many seconds."""


class RequestThreads:
    """Some threads for short messages, and one for the others, which leaves the cores to whoever else wants them."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(4, "outrider-short")
        self._long = ThreadPoolExecutor(1, "outrider-long", initializer=_step_back)

    async def run(self, num_bytes: int, work: Callable[..., R], *arguments: object) -> R:
        """What `work(*arguments)` gives, for a message of so many bytes."""
        threads = self._short if num_bytes <= SHORT_BYTES else self._long
        return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)

    def close(self) -> None:
        """Take no more work; what runs goes on."""
        self._short.shutdown(wait=False, cancel_futures=True)
        self._long.shutdown(wait=False, cancel_futures=True)


def _step_back() -> None:
    """Let all other threads go first."""
    with suppress(OSError, AttributeError):  # Linux has a priority for each thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
