"""Generates the Python code of proto/ into place: `python -m cluster.pb.generate`.

Messages go to runtime/pb and service stubs, which import grpc, to cluster/pb. Needs grpcio-tools, in
the version that the constraints file pins: another one may write other code.
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
    with tempfile.TemporaryDirectory() as folder:
        messages, stubs = Path(folder, "messages"), Path(folder, "stubs")
        messages.mkdir()
        stubs.mkdir()
        arguments = [
            "protoc",
            f"--proto_path={root / 'proto'}",
            f"--proto_path={resources.files('grpc_tools') / '_proto'}",
            f"--python_out={messages}",
            f"--pyi_out={messages}",
            f"--grpc_python_out={stubs}",
            *sources,
        ]
        if status := protoc.main(arguments):
            raise RuntimeError(f"protoc ended with status {status}; its messages are above")
        files = {}
        for home, produced in (("runtime/pb", messages), ("cluster/pb", stubs)):
            for path in sorted(produced.rglob("*.py*")):
                files[Path(home) / path.relative_to(produced)] = _rehome(path.read_text())
            for package in (PACKAGE, PACKAGE.partition("/")[0]):
                files[Path(home, package, "__init__.py")] = ""
        return files


def _rehome(text: str) -> str:
    """protoc imports messages by their proto package; here they live below runtime.pb."""
    package = PACKAGE.replace("/", ".")
    return text.replace(f"from {package} import", f"from runtime.pb.{package} import")


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
