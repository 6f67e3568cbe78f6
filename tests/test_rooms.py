"""The house: rooms import rooms below them only, no two files import each other, and `runtime/` needs neither Ray nor
gRPC. docs/architecture.md says what each room is for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROOMS = {
    # From the top of the house to its foundation. What stands in `runtime/` itself are the contracts.
    "runtime": ("gpu_check", "training", "engine", "tuning", "lookahead", "workers", "model", "mesh", ""),
    # `wire` knows what an engine is, but no door and no client.
    "cluster": ("cli", "serving", "client", "actors", "wire", "pb", ""),
    "benchmarks": (
        "training",
        "scaling",
        "quality",
        "streaming",
        "speed",
        "control",
        "chaos",
        "conversation",
        "streams",
        "deadlines",
        "lossless",
        "roofline",
        "overhead",
        "bigrams",
        "doors",
        "",
    ),
}
FLOORS = ("benchmarks", "cluster", "runtime")
NOT_BELOW_CLUSTER = {
    "ray",
    "grpc",
    "grpc_health",
    "grpc_reflection",
    "google",
    "fastapi",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "aiohttp",
    "flask",
}


def sources() -> list[Path]:
    found = [path for floor in FLOORS for path in (ROOT / floor).rglob("*.py") if "pb/outrider" not in path.as_posix()]
    return [ROOT / "outrider.py", *found]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sources()}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in it, those for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative imports hide where a module is"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in MODULES else node.module


GRAPH = {name: {found for found in imports(path) if found in MODULES} - {name} for name, path in MODULES.items()}


def place(name: str) -> tuple[int, int]:
    """(floor, room) from the top; the public face stands above all."""
    floor, _, rest = name.partition(".")
    if floor not in FLOORS:
        return -1, 0
    room = rest.partition(".")[0]
    rooms = ROOMS[floor]
    return FLOORS.index(floor), rooms.index(room if room in rooms else "")  # runtime/core is the contracts' own C++


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_a_file_imports_only_its_own_room_and_rooms_below(name: str) -> None:
    if name == "runtime":  # hands on the engine, lazily
        return
    upwards = [other for other in GRAPH[name] if place(other) < place(name) and other != "runtime"]
    assert not upwards


def test_no_two_files_import_each_other_by_any_way_round() -> None:
    edges = {name: {other for other in found if other != "runtime"} for name, found in GRAPH.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in edges[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_runtime_needs_neither_ray_nor_grpc_nor_a_web_framework() -> None:
    named = {name: {found.partition(".")[0] for found in imports(MODULES[name])} for name in MODULES}
    assert not {
        name: found & NOT_BELOW_CLUSTER
        for name, found in named.items()
        if name.startswith("runtime") and found & NOT_BELOW_CLUSTER
    }


def test_every_folder_is_a_room_that_the_rules_know() -> None:
    for floor, rooms in ROOMS.items():
        folders = {path.name for path in (ROOT / floor).iterdir() if path.is_dir() and any(path.glob("*.py"))}
        assert folders <= {*rooms, "core"}, f"{floor}: give {folders - set(rooms)} a place in ROOMS"
