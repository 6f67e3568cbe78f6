"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest

from tests.models import save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Directory of a random 3-layer Llama of 9 query and 3 KV heads."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))
