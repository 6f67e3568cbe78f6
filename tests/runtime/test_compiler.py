"""Compiling on the user's machine: what is missing is named."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from runtime import compiler, progress
from runtime.compiler import BuildError


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "thing.cpp"
    path.write_text('#include "thing.h"\nextern "C" int thing() { return THING; }\n')
    (tmp_path / "thing.h").write_text("#define THING 1\n")
    return path


def test_a_library_is_compiled_anew_where_a_header_or_flag_has_changed(source, capfd):
    first = compiler.shared_library("a thing", source, ["-O1"])
    assert first.is_file() and compiler.shared_library("a thing", source, ["-O1"]) == first
    assert compiler.shared_library("a thing", source, ["-O2"]) != first
    (source.parent / "thing.h").write_text("#define THING 2\n")
    assert compiler.shared_library("a thing", source, ["-O1"]) != first


def test_errors_name_the_remedy(source, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "/nonexistent/c++")
        with pytest.raises(BuildError, match=r"no C\+\+ compiler.*install g\+\+ or set CXX"):
            compiler.shared_library("a thing", source, [])
    with monkeypatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda name: "/nonexistent")
        with pytest.raises(BuildError, match="install python3-dev"):
            compiler.compile_extension("a thing", source)
    source.write_text("int thing( {\n")
    with pytest.raises(BuildError, match="error"):
        compiler.shared_library("a thing", source, [])


@pytest.mark.slow
def test_what_is_no_module_is_refused(source):
    with pytest.raises(BuildError, match="cannot be loaded"):
        compiler.load_extension("a thing", "thing", compiler.compile_extension("a thing", source))


def test_what_takes_long_is_said_and_compiled_beside_other_work(source, capfd, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    slow = source.parent / "slow-compiler"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] || sleep 0.5\nexec g++ "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    compiler.compile_ahead([lambda: compiler.shared_library("a thing", source, ["-O1"])])
    assert compiler.shared_library("a thing", source, ["-O1"]).is_file()
    assert "compiling a thing (once; kept in" in capfd.readouterr().err
    for thread in compiler._ahead:
        thread.join()  # the library is there before the folder it was made in is gone
    kept = [path.suffix for path in (source.parent / "cache" / "native").iterdir()]
    assert sorted(kept) == [".lock", ".so"]  # compiled once, and nothing is left lying about


ENDS = """
import sys, time
from pathlib import Path
from runtime import compiler
compiler.compile_ahead([lambda: compiler.shared_library("a thing", Path(sys.argv[1]), [])])
while not compiler._running:
    time.sleep(0.01)
"""


def test_a_program_that_ends_takes_its_compilers_along(source):
    slow = source.parent / "slow-compiler"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] && exec g++ "$@"\nexec sleep 60\n')
    slow.chmod(0o755)
    environment = {**os.environ, "CXX": str(slow), "PYTHONPATH": str(Path(__file__).parents[2])}
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", ENDS, str(source)], env=environment, check=True, timeout=30)
    assert time.monotonic() - started < 20
    assert [path.suffix for path in (source.parent / "cache" / "native").iterdir()] == [".lock"]
