"""What takes long says so, also where nobody looks at a terminal."""

from __future__ import annotations

import io
import sys
import time

import pytest

from runtime import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.1)
    monkeypatch.setattr(progress, "REPEAT_S", 0.3)


def test_what_is_over_at_once_is_not_worth_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.doing("blinking"):
        pass
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_elsewhere_than_at_a_terminal_lines_come_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.doing("working"):
        time.sleep(0.9)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "working ..." and lines[-1] == "working: 1 s"
    assert "working ... 1 s" in lines or len(lines) > 2


def test_at_a_terminal_a_line_counts_and_makes_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.doing("one"), progress.doing("two"):
        time.sleep(0.7)
        progress.tell("by the way")
    shown = terminal.getvalue()
    assert "\r\x1b[2Kone ... 0 s; two ... 0 s" in shown and "\r\x1b[2Kby the way\n" in shown
    assert shown.endswith("one: 1 s\n")


def test_what_fails_ends_its_line_and_a_stderr_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(ValueError), progress.doing("failing"):
        time.sleep(0.5)
        raise ValueError
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    progress.tell("nobody hears this")
