"""Fixtures shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch

from runtime.tuning import cost, priming
from tests.models import save_tiny_model

if not torch.cuda.is_available():  # before any module with kernels is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def measurements_of_their_own(tmp_path_factory):
    """Cost curves and bigrams, made in a short time, and kept out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        places = {name: tmp_path_factory.mktemp(name) for name in ("cost", "bigrams")}
        patch.setattr(cost, "cost_folder", lambda: places["cost"])
        patch.setattr(priming, "primed_folder", lambda: places["bigrams"])
        patch.setattr(priming, "BUDGET_S", 0.5)
        patch.setattr(cost, "BUDGET_S", 0.3)
        patch.setattr(cost, "STEADY", 1e9)  # steps of tiny models are all noise
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Directory of a random 3-layer Llama of 9 query and 3 KV heads."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))
