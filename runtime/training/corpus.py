"""From files to samples: documents packed into rows of one length.

A document goes on in the next sample where it does not fit; there it begins anew, at position 0, since nothing before
is seen. With a sink token, every such piece begins with it: it is always position 0 of what is seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ConfigError

IGNORED = -100
"""The label of a token that is no target."""


@dataclass(frozen=True)
class Samples:
    """[N, T] each, int32."""

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    """From the beginning of the token's document in the sample."""
    documents: NDArray[np.int32]
    """Counts within the sample; what fills the last sample up has the number -1."""
    labels: NDArray[np.int32]
    """The token itself, which the one before predicts; IGNORED at position 0 and in what fills up."""

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, stop: int) -> Samples:
        columns = (self.tokens, self.positions, self.documents, self.labels)
        return Samples(*(column[start:stop] for column in columns))

    @property
    def num_targets(self) -> int:
        return int(np.count_nonzero(self.labels != IGNORED))


def read_documents(files: Sequence[str], text_field: str, field: str = "data.files") -> Iterator[str]:
    """The texts, in order; empty ones are none. Raises ConfigError naming the file and, of JSON lines, the line."""
    for name in files:
        path = Path(name).expanduser()
        try:
            content = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ConfigError(field, name, error.strerror or "cannot be read", "Name readable files.") from error
        except UnicodeDecodeError as error:
            raise ConfigError(field, name, f"is not UTF-8 text ({error.reason})", "Save it as UTF-8.") from error
        texts = _json_lines(name, content, text_field, field) if path.suffix == ".jsonl" else [content]
        yield from (text for text in texts if text.strip())


def _json_lines(name: str, content: str, text_field: str, field: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(field, name, f"line {number} is not JSON ({error})", "Mend the line.") from error
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            problem = f"line {number} has no text under {text_field!r}"
            raise ConfigError(field, name, problem, "Mend the line, or set data.text_field.")
        yield text


def pack(documents: Iterable[Sequence[int]], length: int, fill: int, sink: int | None = None) -> Samples:
    """Lay the documents' tokens one behind the other into samples of `length`.

    A last sample of a single token, which predicts nothing, is left out. `fill`: the token id that fills up the last
    sample; `sink`: the one that begins every piece of a document.
    """
    head = [] if sink is None else [sink]
    room, number = length, 0
    columns: tuple[list[NDArray[np.int32]], ...] = ([], [], [], [])

    def put(piece: NDArray[np.int32], document: int, is_target: bool) -> None:
        labels = piece.copy() if is_target else np.full_like(piece, IGNORED)
        labels[:1] = IGNORED
        numbers = np.full_like(piece, document)
        for column, values in zip(
            columns, (piece, np.arange(len(piece), dtype=np.int32), numbers, labels), strict=True
        ):
            column.append(values)

    for ids in documents:
        rest = np.asarray(ids, np.int32)
        while len(rest):
            taken = rest[: room - len(head)]
            put(np.concatenate([np.asarray(head, np.int32), taken]), number, is_target=True)
            rest, room, number = rest[len(taken) :], room - len(head) - len(taken), number + 1
            if room == 1:  # a piece of one token predicts nothing
                put(np.full(1, fill, np.int32), -1, is_target=False)
                room = 0
            if not room:
                room, number = length, 0
    if 0 < room < length:
        put(np.full(room, fill, np.int32), -1, is_target=False)
    whole = (np.concatenate(column) if column else np.empty(0, np.int32) for column in columns)
    samples = Samples(*(column.reshape(-1, length) for column in whole))
    return samples if not len(samples) or samples.part(-1, len(samples)).num_targets else samples.part(0, -1)
