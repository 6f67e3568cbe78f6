"""Keeps a server up: runs it as a process of its own, and starts it again when it ends unasked.

The two talk through a socket. The server says that it serves, and what it is to be started with the next time (the
ports that the system chose); when the supervisor has gone, however it went, the server sees the socket's end, and ends.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

DESCRIPTOR = "OUTRIDER_SUPERVISOR"
"""Environment variable of a supervised server: the number of its end of the socket."""
STEADY_S = 10.0
"""A server that has served so long may fail as often again as one that has just been started."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Before the server is started again, the first time and after many failures in a row."""
NUMBERS = (signal.SIGINT, signal.SIGTERM)


def is_supervised() -> bool:
    """Whether this process is a server with a supervisor."""
    return DESCRIPTOR in os.environ


def supervise(command: Sequence[str], most_restarts: int) -> int:
    """Run a server's command until a signal asks for its end, or it ends by itself with exit code 0, or before it has
    served at all, or more than `most_restarts` times in a row. Returns its exit code.

    SIGINT and SIGTERM are handed on. For the main thread, which owns signals.
    """
    server: subprocess.Popen[bytes] | None = None
    is_over = threading.Event()

    def hand_on(number: int, _: FrameType | None) -> None:
        is_over.set()
        if server is not None:
            server.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in NUMBERS}
    try:
        settings: list[str] = []
        num_failures, has_served = 0, False
        while True:
            ours, theirs = socket.socketpair()
            with ours:
                environment = os.environ | {DESCRIPTOR: str(theirs.fileno())}
                began = time.monotonic()
                with theirs:  # a process group of its own: what a terminal sends goes to one of us alone
                    server = subprocess.Popen(
                        [*command, *settings], env=environment, pass_fds=[theirs.fileno()], process_group=0
                    )
                code = server.wait()
                said = _left_in(ours)
            if said:
                settings, has_served = json.loads(said), True
            num_failures = 0 if time.monotonic() - began > STEADY_S else num_failures
            if is_over.is_set() or code == 0 or not has_served or num_failures >= most_restarts:
                return 128 - code if code < 0 else code
            pause_s = min(FIRST_PAUSE_S * 2**num_failures, LONGEST_PAUSE_S)
            num_failures += 1
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            print(f"outrider: the server has ended {how}; starting it again in {pause_s:g} s", file=sys.stderr)
            server = None
            if is_over.wait(pause_s):
                return 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _left_in(ours: socket.socket) -> bytes:
    """What the server has said. Others may have its end of the socket still open."""
    ours.setblocking(False)
    try:
        return ours.recv(65_536)
    except BlockingIOError:
        return b""


def serving(settings: Sequence[str]) -> None:
    """Tell the supervisor, if there is one, that calls are taken, and what to add to the command the next time. From
    now on this process ends when the supervisor does."""
    number = os.environ.pop(DESCRIPTOR, None)
    if number is None:
        return
    supervisor = socket.socket(fileno=int(number))
    supervisor.sendall(json.dumps(list(settings)).encode())
    supervisor.shutdown(socket.SHUT_WR)

    def end_with_it() -> None:
        with suppress(OSError):
            supervisor.recv(1)  # nothing ever comes
        os._exit(1)  # as if killed, too: whoever starts another finds the port free

    threading.Thread(target=end_with_it, name="outrider-supervisor", daemon=True).start()
