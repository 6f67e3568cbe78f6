"""Compiling on the user's machine: what is missing is named."""

from __future__ import annotations

import sysconfig

import pytest

from runtime import compiler
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
    assert capfd.readouterr().err.count("Compiling a thing") == 1
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
            compiler.extension_module("a thing", "thing", source)
    source.write_text("int thing( {\n")
    with pytest.raises(BuildError, match="error"):
        compiler.shared_library("a thing", source, [])


def test_what_is_no_module_is_refused(source):
    with pytest.raises(BuildError, match="cannot be loaded"):
        compiler.extension_module("a thing", "thing", source)
