"""What a GGUF file says about itself: its metadata and its table of tensors, of all parts of a split one.

Only the head of each part is read. (The `gguf` package's own reader takes seconds for a vocabulary.)
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import ConfigError
from runtime.files import flaw

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
MAGIC = b"GGUF"
DEEPEST = 4
"""Arrays inside one another; none is known that has more than one."""
ALIGNMENT = 32
"""Of tensors, in bytes, where the file does not say."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and how it is stored."""

    path: Path
    kind: int
    """GGMLQuantizationType."""
    shape: tuple[int, ...]
    """Rows first, as in torch."""
    offset: int
    """Of its first byte, from the beginning of the file."""
    num_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """One model, in one file or in several."""

    paths: tuple[Path, ...]
    """Its parts, in order."""
    metadata: dict[str, Any]
    """The first part's."""
    tensors: dict[str, StoredTensor]
    """Of all parts."""

    @classmethod
    def read(cls, path: Path) -> GGUFFile:
        """The heads of all parts, whichever of them `path` names. Raises ConfigError."""
        paths = parts(path)
        metadata, tensors = _read_head(paths[0])
        number, count = metadata.get("split.no", 0), metadata.get("split.count", 1)
        for name, value in (("split.no", number), ("split.count", count)):
            if type(value) is not int:
                raise refused(path, f"its {name} = {value!r:.60} is not a whole number", "Fetch it again.")
        if count not in (0, 1) and count != len(paths):
            problem = f"is part {number + 1} of {count}, but its name does not say so"
            raise refused(path, problem, f"Name the parts as they were, NAME-00001-of-{count:05d}.gguf.")
        for number, part in enumerate(paths[1:], start=1):
            others, more = _read_head(part)
            if (others.get("split.no"), others.get("split.count")) != (number, len(paths)):
                raise refused(path, f"{part.name} is not part {number + 1} of {len(paths)}", "Fetch the parts again.")
            if twice := next((name for name in more if name in tensors), None):
                raise refused(path, f"{part.name} has tensor {twice} once more", "Fetch the parts again.")
            tensors |= more
        announced = metadata.get("split.tensors.count", len(tensors))
        if announced != len(tensors):
            problem = f"its parts have {len(tensors)} tensors, and should have {announced}"
            raise refused(path, problem, "Fetch the parts again.")
        return cls(paths, metadata, tensors)


def parts(path: Path) -> tuple[Path, ...]:
    """All parts of the model of which `path` is one. Raises ConfigError naming those that are missing."""
    name = PART.fullmatch(path.name)
    if name is None:
        return (path,)
    count = int(name["count"])
    found = tuple(path.with_name(f"{name['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1))
    if not 1 <= int(name["number"]) <= count:
        raise refused(path, "its name says that it is a part that there is not", "Name the parts as they were.")
    if missing := [part.name for part in found if not part.is_file()]:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise refused(path, f"the model's other parts are missing: {names}", "Put all parts side by side.")
    return found


def is_gguf(path: Path) -> bool:
    """Whether a file says so by its name, or by how it begins. Raises ConfigError if it cannot be read."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise refused(path, error.strerror or "cannot be read", "Mend what keeps it from being read.") from error


def refused(path: Path, problem: str, remedy: str) -> ConfigError:
    return ConfigError("model.path", str(path), problem, remedy)


class _Broken(Exception):
    """The head of the file makes no sense; says where."""


class _Head:
    """Reads values one behind the other."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at = content, 0

    def skip(self, num_bytes: int) -> int:
        """Where the next `num_bytes` begin, which are now behind us."""
        start, self.at = self.at, self.at + num_bytes
        if self.at > len(self.content):
            raise _Broken("it ends in the middle of its head")
        return start

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        return struct.unpack_from(layout, self.content, self.skip(struct.calcsize(f"<{code}") * count))

    def text(self) -> str:
        (length,) = self.numbers("Q")
        start = self.skip(length)
        # Vocabularies have been seen that hold halves of characters.
        return self.content[start : start + length].decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.numbers("I")[0], self.numbers("Q")[0]
            if inner in SCALARS:
                return list(self.numbers(SCALARS[inner], count))
            if depth >= DEEPEST:
                raise _Broken("an array has arrays in it, too many in one another")
            return [self.value(inner, depth + 1) for _ in range(count)]
        if kind not in SCALARS:
            raise _Broken(f"a value has type {kind}, which there is not")
        return self.numbers(SCALARS[kind])[0]


def _read_head(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    if found := flaw(path):
        raise refused(path, *found)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        head = _Head(content)
        try:
            return _parse(path, head)
        except (_Broken, struct.error, MemoryError, OverflowError) as error:
            problem = f"is no whole GGUF file: {error or 'its counts make no sense'}"
            raise refused(path, problem, "Fetch it again.") from error


def _parse(path: Path, head: _Head) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    if bytes(head.content[: len(MAGIC)]) != MAGIC:
        raise _Broken("it does not begin with GGUF")
    head.skip(len(MAGIC))
    (version,) = head.numbers("I")
    if version not in VERSIONS:
        big_endian = version & 0xFFFF == 0
        problem = "has its bytes in big-endian order" if big_endian else f"is of GGUF version {version}"
        raise refused(path, f"{problem}, which is not supported", "Convert the model anew, with today's llama.cpp.")
    num_tensors, num_values = head.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = head.text()
        if key in metadata:
            raise _Broken(f"it has the key {key} twice")
        metadata[key] = head.value(head.numbers("I")[0])
    rows: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(num_tensors):
        name = head.text()
        (num_axes,) = head.numbers("I")
        if num_axes > 4:
            raise _Broken(f"tensor {name} has {num_axes} axes")
        shape = head.numbers("Q", num_axes)[::-1]
        (kind,), (offset,) = head.numbers("I"), head.numbers("Q")
        rows.append((name, shape, kind, offset))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _Broken(f"general.alignment is {alignment!r}")
    start = -(-head.at // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in rows:
        if name in tensors:
            raise _Broken(f"it has tensor {name} twice")
        tensors[name] = StoredTensor(path, kind, shape, start + offset, _num_bytes(path, name, kind, shape))
        if start + offset + tensors[name].num_bytes > len(head.content):
            raise _Broken(f"it ends before the end of tensor {name}")
    return metadata, tensors


def _num_bytes(path: Path, name: str, kind: int, shape: tuple[int, ...]) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        remedy = "Take the model in another type, such as Q8_0 or F16."
        raise refused(path, f"tensor {name} has type {kind}, which is not known here", remedy) from error
    elements = 1
    for size in shape:
        elements *= size
    if not shape or shape[-1] % block:
        raise _Broken(f"tensor {name} has shape {shape}, which its type cannot have")
    return elements // block * block_bytes
