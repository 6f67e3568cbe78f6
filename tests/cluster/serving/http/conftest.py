"""One server on the tiny model for all tests of the HTTP door."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from runtime.config import Config
from runtime.engine.engine import Engine
from tests.cluster.serving.serving import ServerThread, serving

LOOKAHEAD = [
    "lookahead.planner=false",
    "lookahead.window_size=4",
    "lookahead.ngram_size=3",
    "lookahead.guess_set_size=4",
]


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> Iterator[Engine]:
    settings = [f"model.path={tiny_model}", "server.model_name=tiny", "model.device=cpu", "server.port=0"]
    with Engine.from_config(Config.load(None, [*settings, *LOOKAHEAD, "sampling.max_new_tokens=16"])) as engine:
        yield engine


@pytest.fixture(scope="session")
def server(engine: Engine) -> Iterator[ServerThread]:
    with serving(engine, http=True) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: ServerThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def http(server: ServerThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        yield http


@pytest.fixture(scope="session")
def expected(tiny_model: Path) -> Iterator[Callable]:
    """What another engine, in no server and without lookahead, gives for a prompt."""
    settings = [f"model.path={tiny_model}", "lookahead.enabled=false", "model.device=cpu", "sampling.max_new_tokens=16"]
    with Engine.from_config(Config.load(None, settings)) as engine:
        yield lambda prompt, **sampling: engine.generate([prompt], sampling)
