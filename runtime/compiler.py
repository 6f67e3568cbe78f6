"""Compiling our C++ on the machine it runs on: once, and kept on disk."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from runtime.disk import cache_root, locked, writable
from runtime.errors import OutriderError
from runtime.progress import doing

COMPILERS = ("g++", "clang++", "c++")
TIMEOUT_S = 300.0


class BuildError(OutriderError):
    """C++ that is needed cannot be compiled or loaded here; the message says why."""


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    version: str
    """What it says of itself."""

    @property
    def is_clang(self) -> bool:
        return "clang" in self.version


@functools.cache
def find_compiler(chosen: str | None = None) -> Compiler:
    """$CXX, given as `chosen`, or the first of COMPILERS that is there. Raises BuildError."""
    for name in [chosen] if chosen else COMPILERS:
        command = shlex.split(name)
        if shutil.which(command[0]):
            version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S)
            if version.returncode == 0:
                return Compiler(tuple(command), version.stdout)
    wanted = f"CXX={chosen}" if chosen else ", ".join(COMPILERS)
    raise BuildError(f"no C++ compiler found ({wanted}); install g++ or set CXX")


def shared_library(
    what: str,
    source: Path,
    flags: Sequence[str],
    link_flags: Sequence[str] = (),
    depends_on: Sequence[str] = (),
    include: Sequence[str] = (),
    library: Sequence[Path] = (),
) -> Path:
    """`source`, with the headers beside it, as a shared library; compiled on the first call.

    Args:
        what: what messages call it.
        depends_on: what besides sources, flags and compiler the result depends on.
        include: where other headers are; their versions, not their places, belong into `depends_on`.
        library: further sources, not ours, which are compiled beside it; likewise.
    Several processes may call this at once: one compiles, the others wait. Raises BuildError.
    """
    compiler = find_compiler(os.environ.get("CXX"))
    texts = (path.read_text() for path in (source, *sorted(source.parent.glob("*.h"))))
    parts = (*texts, *compiler.command, compiler.version, *flags, *link_flags, *depends_on)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    name = f"{source.stem}-{key}.so"
    if (target := cache_root() / "native" / name).is_file() or (target := writable("native") / name).is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            doing(f"compiling {what} (once; kept in {target.parent})"),  # or waiting for another process that does
            locked(target.with_suffix(".lock")),
            tempfile.TemporaryDirectory(dir=target.parent) as scratch,
        ):
            if not target.is_file():
                places, linked = [f"-I{place}" for place in include], f"{scratch}/linked.so"
                objects = {path: f"{scratch}/{path.stem}.o" for path in (source, *library)}
                commands = ([*flags, *places, "-fPIC", "-c", str(path), "-o", to] for path, to in objects.items())
                _run([[*compiler.command, *command] for command in commands])
                _run([[*compiler.command, "-shared", *link_flags, *objects.values(), "-o", linked]])
                os.replace(linked, target)
    except OSError as error:
        raise BuildError(f"{what}, compiled, cannot be kept in {target.parent} ({error})") from error
    return target


def compile_extension(what: str, source: Path) -> Path:
    """The file of the Python module that `source` defines with nanobind, compiled if need be. Raises BuildError."""
    import nanobind

    headers = sysconfig.get_path("include")
    if not (Path(headers) / "Python.h").is_file():
        raise BuildError(f"compiling {what} takes Python's headers, not found in {headers}; install python3-dev")
    include, library = binding()
    return shared_library(
        what,
        source,
        EXTENSION_FLAGS,
        ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [],
        depends_on=(str(sysconfig.get_config_var("EXT_SUFFIX")), nanobind.__version__),
        include=(headers, *include),
        library=[library],
    )


EXTENSION_FLAGS = ("-std=c++20", "-O2", "-DNDEBUG", "-fvisibility=hidden", "-fno-strict-aliasing")


def binding() -> tuple[list[str], Path]:
    """Where nanobind's headers are, and its own source, which is compiled along."""
    import nanobind

    theirs = Path(nanobind.source_dir())
    return [nanobind.include_dir(), str(theirs.parent / "ext" / "robin_map" / "include")], theirs / "nb_combined.cpp"


def load_extension(what: str, name: str, path: Path) -> ModuleType:
    """The module in this file, under this dotted name. Raises BuildError."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"{what}, compiled, cannot be loaded ({error})") from error
    return module


def compile_ahead(libraries: Iterable[Callable[[], object]]) -> None:
    """Compile these in threads of their own, beside whatever comes next; who needs one then waits for it, and is told
    what is wrong with it. A program that ends meanwhile does not wait."""
    for library in libraries:
        thread = threading.Thread(target=_tried, args=(library,), name="outrider-compiler", daemon=True)
        thread.start()
        _ahead.append(thread)


_ahead: list[threading.Thread] = []
_running: set[subprocess.Popen[str]] = set()
_ending = threading.Event()


def _tried(library: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):
        library()


@atexit.register
def _end_compilers() -> None:
    _ending.set()
    for process in list(_running):
        process.kill()
    for thread in _ahead:
        thread.join(timeout=10)  # it removes what is half done; and half an import, torch's say, complains at the end


def _run(commands: Sequence[Sequence[str]]) -> None:
    """Run all, side by side. Raises BuildError if one fails."""
    with contextlib.ExitStack() as stack:
        processes = []
        for command in commands:
            if _ending.is_set():
                raise BuildError("the program ends")
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)  # where it still runs, another one has failed
            stack.callback(_running.discard, process)
            _running.add(process)
            processes.append(process)
        for process, command in zip(processes, commands, strict=True):
            try:
                _, errors = process.communicate(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired as error:
                raise BuildError(f"{command[0]} took longer than {TIMEOUT_S:.0f} s") from error
            if process.returncode:
                lines = [line for line in errors.splitlines() if "error" in line] or errors.splitlines()
                why = lines[0].strip() if lines else f"status {process.returncode}"
                raise BuildError(f"{command[0]} failed: {why}")
