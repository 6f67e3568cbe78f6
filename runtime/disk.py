"""What Outrider keeps on disk between runs: one directory, written by one process at a time.

The directory may be read-only, full, or missing. What is in it is used all the same; what cannot be kept there is
made in a temporary folder, or anew each time, and that is said once.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import ConfigError
from runtime.progress import tell

REMEDY = "Name a folder that can be written to in OUTRIDER_CACHE."


def cache_root() -> Path:
    """$OUTRIDER_CACHE, else outrider/ in the user's cache directory, else, where there is none, a temporary folder.

    Raises ConfigError naming the variable that cannot be meant so.
    """
    if chosen := os.environ.get("OUTRIDER_CACHE"):
        try:
            root = Path(chosen).expanduser().absolute()
        except RuntimeError as error:
            raise ConfigError("OUTRIDER_CACHE", chosen, f"cannot be found ({error})", REMEDY) from error
        above = next(path for path in (root, *root.parents) if path.exists())
        if not above.is_dir():
            raise ConfigError("OUTRIDER_CACHE", chosen, f"{above} is not a folder", REMEDY)
        return root
    base = os.environ.get("XDG_CACHE_HOME")
    if base and not Path(base).is_absolute():
        raise ConfigError("XDG_CACHE_HOME", base, "is not an absolute path", "Write it from / on, or unset it.")
    try:
        root = (Path(base) if base else Path.home() / ".cache") / "outrider"
        if root.is_dir() or _can_write(root):
            return root
    except (RuntimeError, OSError):  # there is no home, or it cannot be looked at
        pass
    return _temporary_root()


def writable(name: str) -> Path:
    """The folder of this name in the cache or, where it cannot be written to, in a temporary place."""
    folder = cache_root() / name
    if _can_write(folder):
        return folder
    folder = _temporary_root() / name
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which then takes its place: nobody reads half of it. Raises OSError."""
    with contextlib.suppress(OSError):  # writing says so
        path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")  # other machines may write here, too
    try:
        yield scratch
        scratch.replace(path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def kept(path: Path) -> Iterator[Path]:
    """`written_whole` for what only saves time: where it cannot be written, that is said once, and the run goes on."""
    try:
        with written_whole(path) as scratch:
            yield scratch
    except OSError as error:
        _tell(f"nothing can be kept in {path.parent} ({error.strerror or error}), so it is computed in every run")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system drops it with the process. Where nothing can be written, or locked,
    there is no lock."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.open("w")), fcntl.LOCK_EX)
        yield


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@functools.cache
def _temporary_root() -> Path:
    """A folder of this user's below the system's temporary one, the same for all processes. Raises ConfigError."""
    try:
        root = Path(tempfile.gettempdir()) / f"outrider-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            root.mkdir(mode=0o700)
        status = root.lstat()
        # Whoever else may write here may put code here that we run.
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            root = Path(tempfile.mkdtemp(prefix="outrider-"))
    except OSError as error:
        problem = f"neither the cache nor a temporary folder can be written to ({error})"
        raise ConfigError("OUTRIDER_CACHE", os.environ.get("OUTRIDER_CACHE"), problem, REMEDY) from error
    _tell(f"the cache cannot be written to; using {root} instead. {REMEDY}")
    return root


@functools.cache
def _tell(line: str) -> None:
    tell(line)
