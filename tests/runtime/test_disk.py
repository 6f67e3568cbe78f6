"""The cache: what is not meant as one is refused by name; what cannot be written is done without."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import disk
from runtime.compiler import shared_library
from runtime.errors import ConfigError


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OUTRIDER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(disk.tempfile, "tempdir", str(tmp_path))
    for cached in (disk._temporary_root, disk._tell):
        cached.cache_clear()
    yield
    for cached in (disk._temporary_root, disk._tell):
        cached.cache_clear()


def unwritable(tmp_path: Path) -> Path:
    """A folder's path at which no folder can be made, whoever tries (root may write to read-only ones)."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "home"


def test_places_that_are_none_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for below in ("", "/below"):
        (tmp_path / "file").touch()
        monkeypatch.setenv("OUTRIDER_CACHE", f"{tmp_path}/file{below}")
        with pytest.raises(ConfigError, match="OUTRIDER_CACHE.*is not a folder"):
            disk.cache_root()
    monkeypatch.delenv("OUTRIDER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "some/where")
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME.*absolute"):
        disk.cache_root()


def test_without_a_home_a_temporary_folder_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(unwritable(tmp_path)))
    root = disk.cache_root()
    assert root == disk.cache_root() == tmp_path / f"outrider-{os.getuid()}"
    assert root.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err.count("OUTRIDER_CACHE") == 1  # said once


def test_a_temporary_folder_that_others_may_write_to_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(unwritable(tmp_path)))
    planted = tmp_path / f"outrider-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    assert disk.cache_root() != planted


def test_a_cache_that_cannot_be_written_to_is_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file where the cache's folders would be stands for one that is read-only."""
    source = tmp_path / "thing.cpp"
    source.write_text('extern "C" int thing() { return 1; }\n')
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("OUTRIDER_CACHE", str(cache))
    (cache / "native").touch()
    compiled = shared_library("a thing", source, [])
    assert compiled.is_file() and compiled.is_relative_to(tmp_path / f"outrider-{os.getuid()}")
    made = compiled.stat().st_mtime_ns
    assert shared_library("a thing", source, []) == compiled and compiled.stat().st_mtime_ns == made
    assert capsys.readouterr().err.count("the cache cannot be written to") <= 1
    (cache / "native").unlink()
    (cache / "native").mkdir()
    compiled.replace(cache / "native" / compiled.name)
    assert shared_library("a thing", source, []) == cache / "native" / compiled.name


def test_what_cannot_be_kept_is_said_once_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        with disk.locked(unwritable(tmp_path) / f"{name}.lock"), disk.kept(unwritable(tmp_path) / name) as scratch:
            scratch.write_text("x")
    assert capsys.readouterr().err.count("nothing can be kept") == 1


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "curve"
    target.write_text("old")
    with disk.kept(target) as scratch:
        scratch.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    assert "No space left" in capsys.readouterr().err
    with pytest.raises(OSError), disk.written_whole(target) as scratch:
        raise OSError(errno.ENOSPC, "No space left on device")
