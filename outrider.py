"""Outrider: decode one request faster than one GPU could, with the same tokens.

import outrider

with outrider.Engine.from_config({"parallel": {"lp": 2}}) as engine:
    print(engine.generate("Once upon a time", outrider.SamplingParams(max_new_tokens=32))[0].text)

`Engine` decodes in this process and its workers; `Client` and `AsyncClient` ask a server. Each name is imported when it
is first used: a client needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from runtime import __version__

if TYPE_CHECKING:
    from cluster.client.async_client import AsyncClient
    from cluster.client.client import Client
    from cluster.wire.answers import Answer, Chunk
    from cluster.wire.statuses import CallError
    from runtime.config import Config, LookaheadConfig, SamplingParams
    from runtime.engine.engine import Engine
    from runtime.engine.session import Session
    from runtime.errors import (
        ConfigError,
        InvalidRequestError,
        OutriderError,
        ResourceExhaustedError,
        WorkerError,
    )
    from runtime.request import Completion, FinishReason, StepOutput, TokenLogprobs, Usage

_HOMES = {
    "cluster.client.async_client": ("AsyncClient",),
    "cluster.client.client": ("Client",),
    "cluster.wire.answers": ("Answer", "Chunk"),
    "cluster.wire.statuses": ("CallError",),
    "runtime.config": ("Config", "LookaheadConfig", "SamplingParams"),
    "runtime.engine.engine": ("Engine",),
    "runtime.engine.session": ("Session",),
    "runtime.errors": ("ConfigError", "InvalidRequestError", "OutriderError", "ResourceExhaustedError", "WorkerError"),
    "runtime.request": ("Completion", "FinishReason", "StepOutput", "TokenLogprobs", "Usage"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Answer",
    "AsyncClient",
    "CallError",
    "Chunk",
    "Client",
    "Completion",
    "Config",
    "ConfigError",
    "Engine",
    "FinishReason",
    "InvalidRequestError",
    "LookaheadConfig",
    "OutriderError",
    "ResourceExhaustedError",
    "SamplingParams",
    "Session",
    "StepOutput",
    "TokenLogprobs",
    "Usage",
    "WorkerError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'outrider' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
