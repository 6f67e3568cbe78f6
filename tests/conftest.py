"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest

from runtime import cost
from tests.models import save_tiny_model


@pytest.fixture(scope="session", autouse=True)
def cost_curves_of_their_own(tmp_path_factory):
    """Measured short, and kept out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("cost")
        patch.setattr(cost, "cost_folder", lambda: place)
        patch.setattr(cost, "BUDGET_S", 0.3)
        patch.setattr(cost, "TOLERATED", 1e9)  # steps of tiny models are all noise
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Directory of a random 3-layer Llama of 9 query and 3 KV heads."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))
