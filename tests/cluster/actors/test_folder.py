"""A local Ray's folder is short, whatever TMPDIR says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.actors import folder
from runtime.errors import ConfigError


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR", "XDG_RUNTIME_DIR"])
@pytest.mark.parametrize("value", ["/nonexistent/folder", "{tmp}/" + "x" * 90])
def test_long_and_missing_places_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    place = value.format(tmp=tmp_path)
    if str(tmp_path) in place:
        os.mkdir(place)
    monkeypatch.setenv(variable, place)
    made = folder.make()
    try:
        assert made.is_dir() and len(os.fsencode(made)) <= folder.LONGEST
        (made / "session").mkdir()
    finally:
        folder.remove(made)
    assert not made.exists()
    assert not os.path.isdir(place) or os.listdir(place) == []


def test_no_place_is_said_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FALLBACKS", ())
    for variable in ("RAY_TMPDIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    with pytest.raises(ConfigError, match="TMPDIR.*RAY_TMPDIR"):
        folder.make()
