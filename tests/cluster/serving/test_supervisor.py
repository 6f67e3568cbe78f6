"""A server that ends unasked is started again, as it was; one that is told to end, ends; it does not outlive its
supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.serving import supervisor

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]

SERVER = """
import os, signal, sys, time
from cluster.serving import supervisor
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
place, how, *settings = sys.argv[1:]
with open(place, "a") as file:
    file.write(f"{os.getpid()} {' '.join(settings)}\\n")
if how == "refuses":
    sys.exit(2)
supervisor.serving(["--set", f"server.port={len(settings)}"])
if how == "fails":
    sys.exit(3)
time.sleep(50)
"""
SUPERVISED = """
import sys
from cluster.serving import supervisor
sys.exit(supervisor.supervise([sys.executable, "-c", SERVER, *sys.argv[1:]], 2))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "starts"


@pytest.fixture
def supervised(place: Path) -> Iterator[subprocess.Popen[bytes]]:
    program = f"SERVER = {SERVER!r}\n{SUPERVISED}"
    process = subprocess.Popen([sys.executable, "-c", program, str(place), "serves"], cwd=Path(__file__).parents[3])
    yield process
    process.kill()
    process.wait()


def starts(place: Path, count: int) -> list[tuple[int, str]]:
    """Process and further arguments of the server's starts, once there are so many."""
    deadline = time.monotonic() + 30
    while not place.exists() or len(place.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lines = [line.partition(" ") for line in place.read_text().splitlines()]
    return [(int(pid), rest) for pid, _, rest in lines]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_server_is_started_again_with_its_ports(supervised, place) -> None:
    ((first, rest),) = starts(place, 1)
    assert rest == ""
    time.sleep(0.3)  # it says that it serves
    os.kill(first, signal.SIGKILL)
    second, rest = starts(place, 2)[1]
    assert second != first and rest == "--set server.port=0"
    supervised.send_signal(signal.SIGTERM)
    assert supervised.wait(20) == 0
    assert not is_alive(second)


def test_it_ends_with_its_supervisor(supervised, place) -> None:
    ((server, _),) = starts(place, 1)
    time.sleep(0.3)
    supervised.kill()
    deadline = time.monotonic() + 20
    while is_alive(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("how", "code", "count"), [("refuses", 2, 1), ("fails", 3, 3)])
def test_what_cannot_be_started_or_fails_again_and_again_ends(place, monkeypatch, how, code, count) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)
    command = [sys.executable, "-c", SERVER, str(place), how]
    assert supervisor.supervise(command, most_restarts=2) == code
    assert len(starts(place, count)) == count
