"""What is kept of a model's config: read once by transformers, then from disk."""

import json
import shutil

import pytest

from runtime.errors import ConfigError
from runtime.model import directory
from runtime.model.directory import load_spec


@pytest.fixture
def model(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_a_spec_is_read_once_and_is_the_same_from_disk(model, monkeypatch):
    first = load_spec(model)
    monkeypatch.setattr(directory, "read_spec", None)
    assert load_spec(model) == first


def test_a_config_that_has_changed_is_read_anew(model):
    first, path = load_spec(model), model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 77.0, "rope_parameters": None}))
    assert load_spec(model).rope != first.rope
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": -1}))
    with pytest.raises(ConfigError, match="hidden_size"):
        load_spec(model)


def test_what_was_kept_and_is_broken_is_read_anew(model, tmp_path):
    first = load_spec(model)
    (kept,) = (tmp_path / "cache" / "specs").iterdir()
    kept.write_text(kept.read_text()[:50])
    assert load_spec(model) == first and json.loads(kept.read_text())
