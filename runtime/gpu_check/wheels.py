"""Collects what a bare GPU machine lacks to run the check: wheels, and the C++ of the step for its Python.

python -m runtime.gpu_check.wheels gpu-wheels

The machine is taken to have Python 3.12 on x86-64 Linux with a CUDA build of torch, Triton, transformers (so numpy,
PyYAML, safetensors and tokenizers) and grpcio; no network, and perhaps no compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from runtime.build import SOURCE, carried_name
from runtime.compiler import EXTENSION_FLAGS, BuildError, binding, find_compiler
from runtime.progress import tell

LACKING = (
    "pydantic",
    "pydantic_core",
    "annotated-types",
    "typing-inspection",
    "typing_extensions",
    "nanobind",
    "llguidance",
)
"""In the versions that are installed here."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
TARGET = "3.12"
ASK = (
    "import json, sysconfig; print(json.dumps([sysconfig.get_path('include'), sysconfig.get_config_var('EXT_SUFFIX')]))"
)


def collect(folder: Path, python: str | None) -> None:
    """Fill the folder. `python`: an interpreter of the target's version whose headers are here."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.whl"), *folder.glob("core-*.so")):
        old.unlink()  # of two versions pip would take neither
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    wanted = [f"{name}=={version(name)}" for name in LACKING]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", TARGET, "--implementation", "cp"]
    command = [sys.executable, "-m", "pip", "download", *options, *platforms, "--dest", str(folder), *wanted]
    subprocess.run(command, check=True, stdout=sys.stderr)
    found = python or interpreter()
    if found is None:
        tell(f"no Python {TARGET} with headers is here (--python): the machine must compile the step's C++ itself")
    else:
        tell(f"compiled {compile_for(found, folder).name}")
    tell(f"{folder} has {len(list(folder.glob('*.whl')))} wheels; carry it along, and run there:")
    tell(f"  python3 -m runtime.gpu_check --wheels {folder}")


def interpreter() -> str | None:
    """A Python of the target's version with its headers, on PATH or among pyenv's."""
    places = [Path(place) / f"python{TARGET}" for place in os.environ.get("PATH", "").split(os.pathsep)]
    places += sorted((Path.home() / ".pyenv" / "versions").glob(f"{TARGET}*/bin/python"))
    for place in places:
        if place.is_file() and os.access(place, os.X_OK):
            asked = subprocess.run([place, "-c", ASK], capture_output=True, text=True)
            if asked.returncode == 0 and (Path(json.loads(asked.stdout)[0]) / "Python.h").is_file():
                return str(place)
    return None


def compile_for(python: str, folder: Path) -> Path:
    """The step's C++ for this interpreter, with all but the C library in it. Raises BuildError."""
    answer = subprocess.run([python, "-c", ASK], check=True, capture_output=True, text=True).stdout
    headers, suffix = json.loads(answer)
    target = folder / carried_name(suffix)
    compiler = find_compiler(os.environ.get("CXX"))
    include, library = binding()
    flags = [*EXTENSION_FLAGS, "-fPIC", "-shared", "-static-libstdc++", "-static-libgcc"]
    places = [f"-I{place}" for place in (headers, *include)]
    command = [*compiler.command, *flags, *places, str(SOURCE), str(library), "-o", str(target)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise BuildError(f"{compiler.command[0]} failed: {made.stderr.strip().splitlines()[0]}")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to, for example gpu-wheels, which git ignores")
    parser.add_argument("--python", help=f"a Python {TARGET} with headers; by default looked for")
    options = parser.parse_args()
    collect(options.folder, options.python)


if __name__ == "__main__":
    main()
