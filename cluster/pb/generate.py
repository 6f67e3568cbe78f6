"""Generates the Python code of proto/ into place: `python -m cluster.pb.generate`.

Needs grpcio-tools, in the version that the constraints file pins: another one may write other code.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "outrider/v1"


def generate(root: Path = ROOT) -> dict[Path, str]:
    """The generated files' text by path relative to the project root. Raises RuntimeError if protoc fails."""
    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(root / "proto")) for path in (root / "proto" / PACKAGE).glob("*.proto"))
    with tempfile.TemporaryDirectory() as produced:
        arguments = [
            "protoc",
            f"--proto_path={root / 'proto'}",
            f"--proto_path={resources.files('grpc_tools') / '_proto'}",
            f"--python_out={produced}",
            f"--pyi_out={produced}",
            f"--grpc_python_out={produced}",
            *sources,
        ]
        if status := protoc.main(arguments):
            raise RuntimeError(f"protoc ended with status {status}; its messages are above")
        home = Path("cluster", "pb")
        files = {home / package / "__init__.py": "" for package in (PACKAGE, PACKAGE.partition("/")[0])}
        for path in sorted(Path(produced).rglob("*.py*")):
            files[home / path.relative_to(produced)] = _rehome(path.read_text())
        return files


def _rehome(text: str) -> str:
    """protoc imports messages by their proto package; here they live below cluster.pb."""
    package = PACKAGE.replace("/", ".")
    return text.replace(f"from {package} import", f"from cluster.pb.{package} import")


def main() -> int:
    for path, text in generate().items():
        target = ROOT / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
