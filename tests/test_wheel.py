"""A wheel, built from this tree and installed elsewhere, has all that the command needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.models import save_tiny_model

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that the wheel was installed into."""
    pytest.importorskip("setuptools")
    place = tmp_path_factory.mktemp("wheel")
    # From a copy: building leaves files behind, and takes what earlier builds have left.
    for name in ("runtime", "cluster", "outrider.py", "pyproject.toml", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        (place / "tree").mkdir(exist_ok=True)
        copy(ROOT / name, place / "tree" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(place)]
    subprocess.run([*pip, "wheel", *options, str(place / "tree")], check=True)
    (wheel,) = place.glob("outrider-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(place / "site"), str(wheel)], check=True)
    return place / "site"


def run(installed: Path, *command: str) -> str:
    """Standard output of a command that finds the wheel's packages before any others, far from this tree."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_outrider_generate_runs_from_a_wheel(installed: Path, tmp_path: Path) -> None:
    places = "import outrider, runtime, cluster; print(outrider.__file__, runtime.__file__, cluster.__file__)"
    assert run(installed, sys.executable, "-c", places).count(str(installed)) == 3
    model = save_tiny_model(tmp_path / "tiny")
    command = [str(installed / "bin" / "outrider"), "generate", "--raw", "one two", "--max-new-tokens", "4", "--json"]
    assert '"num_new_tokens": 4' in run(
        installed, sys.executable, *command, "--ignore-eos", "--set", f"model.path={model}", "--set", "model.device=cpu"
    )


def test_the_public_face_has_what_it_lists_and_a_client_needs_no_torch(installed: Path) -> None:
    program = """
import sys, outrider
outrider.Client("localhost:1").close()
assert not {"torch", "transformers", "ray"} & set(sys.modules)
assert all(getattr(outrider, name) is not None for name in outrider.__all__)
print(outrider.__version__)
"""
    from runtime import __version__

    assert run(installed, sys.executable, "-c", program).strip() == __version__
