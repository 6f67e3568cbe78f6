"""Packing loses no token, and every piece of a document stands for itself; files that cannot be read are named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from runtime.errors import ConfigError
from runtime.training.corpus import IGNORED, pack, read_documents


@pytest.mark.parametrize("sink", [None, 99])
@pytest.mark.parametrize("length", [8, 13, 40])
def test_packing_loses_no_token(sink, length) -> None:
    rng = np.random.default_rng(length)
    documents = [rng.integers(1, 90, size).tolist() for size in (5, 1, 33, 8, 2, 61, 7)]
    samples = pack(documents, length, fill=0, sink=sink)
    real = samples.documents >= 0
    kept = samples.tokens[real & (samples.tokens != (sink or -1))]
    assert kept.tolist() == [token for document in documents for token in document]
    assert (samples.tokens[~real] == 0).all() and (samples.labels[~real] == IGNORED).all()
    begins = samples.positions == 0
    assert (samples.labels[begins] == IGNORED).all()
    if sink is not None:
        assert (samples.tokens[begins & real] == sink).all() and np.count_nonzero(samples.tokens == sink) == begins[
            real
        ].sum()
    targets = real & ~begins
    assert (samples.labels[targets] == samples.tokens[targets]).all() and samples.num_targets == targets.sum()
    assert (np.diff(samples.positions, axis=1)[np.diff(samples.documents, axis=1) == 0] == 1).all()
    assert ((~real).sum(axis=1)[:-1] <= 1).all()  # but for the last sample, hardly anything fills up


def test_nothing_makes_no_samples() -> None:
    assert len(pack([], 8, fill=0)) == 0


def test_files_are_documents_and_so_are_lines_of_json(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("One.\nText.", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": " "}\n{"text": "three"}\n', encoding="utf-8")
    files = [str(tmp_path / name) for name in ("a.txt", "b.jsonl")]
    assert list(read_documents(files, "text")) == ["One.\nText.", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.txt", b"\xff\xfe\xfd", "UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}', "line 1 has no text under 'text'"),
        ("a.jsonl", b'["x"]', "line 1 has no text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, named) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=named) as error:
        list(read_documents([str(tmp_path / name)], "text"))
    assert error.value.field == "data.files" and error.value.remedy


def test_a_file_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        list(read_documents([str(tmp_path / "none.txt")], "text"))


def test_a_long_line_is_one_document(tmp_path) -> None:
    text = "word " * 10_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": text}))
    assert list(read_documents([str(tmp_path / "a.jsonl")], "body")) == [text]
