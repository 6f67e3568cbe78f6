"""The check for the day a GPU is there runs, every section of it, where there is none; and it finds what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.cli import doctor
from runtime import build
from runtime.gpu_check import kernels, main, products, wheels
from runtime.gpu_check.models import save_random_model
from runtime.model import native
from runtime.model.cuda.decoder import CudaDecoder

ROOT = Path(__file__).resolve().parents[3]
NEEDED = {"numpy", "torch", "triton", "yaml", "safetensors", "tqdm", "transformers", "tokenizers"}
"""Packages that a bare machine has: with torch, Triton and transformers."""


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.skipif(not native.available()[0], reason="deterministic runs on a CPU take the native kernels")
def test_the_whole_check_runs_from_end_to_end(tmp_path: Path, capsys) -> None:
    model = save_random_model(tmp_path / "model", is_tiny=True)
    assert main.main(["--device", "cpu", "--tiny", "--model", str(model)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["benchmark"] == "gpu-check" and found["ok"] and found["tiny"]
    sections = found["sections"]
    assert list(sections) == list(main.SECTIONS)
    assert all(section.get("ok", True) and section["seconds"] >= 0 for section in sections.values())
    assert sections["device"]["bytes_per_s"] > 0 and sections["device"]["flops"] > 0
    assert set(sections["products"]["shapes"]) == {"qkv", "output", "gate and up", "down", "LM head"}
    assert set(sections["kernels"]["errors"]) == {f"float32 {name}" for name in kernels.POLICIES}
    of_model = sections["steps"]["models"]["tiny"]["32"]
    assert set(of_model["ms"]) == {"1", "2", "4", "8"} and set(of_model["parts_ms"]) == {"1", "8"}
    modes = sections["text"]["modes"]
    assert modes["deterministic"]["alike"] == modes["deterministic"]["total"] > 0
    assert sections["text"]["hugging_face"] > 0
    assert sections["ranks"]["meshes"] == {"1x1": True, "2x1": True, "1x2": True}
    assert any("nothing failed" in line for line in table)


def test_a_section_that_raises_does_not_stop_the_others(monkeypatch, capsys) -> None:
    monkeypatch.setattr(products, "check", lambda setting: 1 / 0)
    assert main.main(["--device", "cpu", "--tiny", "--sections", "products,device"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert "ZeroDivisionError" in found["sections"]["products"]["error"] and "ZeroDivisionError" in err
    assert found["sections"]["device"]["flops"] > 0 and not found["ok"]


@pytest.mark.parametrize("fault", ["logits", "tokens"])
def test_kernels_that_compute_something_else_fail(monkeypatch, capsys, fault: str) -> None:
    if fault == "logits":
        real = CudaDecoder.logits
        monkeypatch.setattr(CudaDecoder, "logits", lambda self, hidden: real(self, hidden) + 1e-3)
    else:
        wrong = replace(kernels.EAGER, draw=lambda logits, *_: (logits.amax(1), logits.argmin(1).int()))
        monkeypatch.setattr(kernels, "EAGER", wrong)
    assert main.main(["--device", "cpu", "--tiny", "--sections", "kernels"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_doctor_runs_the_short_form(monkeypatch, capsys) -> None:
    assert "lookahead changes 0 of 24 tokens" in doctor.gpu_check("kernels", "cpu", is_tiny=True)
    assert "place among the rows" in doctor.gpu_check("products", "cpu", is_tiny=True)
    assert "x the memory floor" in doctor.gpu_check("steps", "cpu", is_tiny=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(doctor.NotAvailable):
        doctor.gpu_check("kernels")


def test_it_needs_little_of_a_machine() -> None:
    """Of packages, those of a bare machine and those that are carried: no Ray, no gRPC, nothing of a command line."""
    modules = ", ".join(module for module, _ in main.SECTIONS.values())
    script = f"""
import os, sys, sysconfig
import {modules}
site = sysconfig.get_path("purelib")
tops = {{name.partition(".")[0] for name in sys.modules}}
print(*(top for top in tops if os.path.exists(f"{{site}}/{{top}}") or os.path.exists(f"{{site}}/{{top}}.py")))
"""
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    carried = {name.replace("-", "_") for name in wheels.LACKING}
    setup = {"_distutils_hack", "torchgen", "setuptools", "pkg_resources", "functorch"}
    found = {name for name in output.split() if not name.startswith("__editable__")}
    assert found - NEEDED - carried - setup == set()


def test_an_extension_that_was_carried_is_used(tmp_path: Path, monkeypatch, capsys) -> None:
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    own = build.compiled()
    monkeypatch.setenv(build.PREBUILT, str(tmp_path))
    assert build.compiled() == own and "has no core-" in capsys.readouterr().err
    carried = tmp_path / build.carried_name(suffix)
    carried.write_bytes(own.read_bytes())
    assert build.compiled() == carried
    command = [sys.executable, "-c", "from runtime import core; print(core.__file__)"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == str(carried)
    assert build.carried_name(".cpython-312-x86_64-linux-gnu.so") != carried.name


def test_a_cpu_runs_it_tiny_only(capsys) -> None:
    for arguments, words in ((["--device", "cpu"], "--tiny only"), (["--sections", "all"], "no section 'all'")):
        with pytest.raises(SystemExit):
            main.main(arguments)
        assert words in capsys.readouterr().err
