"""A local Ray's folder is short enough for its sockets, and gone afterwards; else a line says what to set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.actors import folder
from runtime.errors import ConfigError


@pytest.fixture(autouse=True)
def nowhere_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_a_long_or_missing_place_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "missing"))
    made = folder.make()
    assert len(os.fsencode(made)) <= folder.LONGEST and made.is_dir() and not any(long.iterdir())
    (made / "session").mkdir()
    folder.remove(made)
    assert not made.exists()


def test_where_there_is_no_place_a_line_names_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folder, "FALLBACKS", ())
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 80)))
    with pytest.raises(ConfigError, match=r"TMPDIR = .*no place for a local Ray.*RAY_TMPDIR"):
        folder.make()
