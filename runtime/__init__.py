"""Outrider's decoding runtime: lossless lookahead decoding on a mesh of workers.

from runtime import Engine, SamplingParams

with Engine.from_config({"parallel": {"lp": 2}}) as engine:
    print(engine.generate(["Once upon a time"], SamplingParams(max_new_tokens=32))[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.config import Config, LookaheadConfig, SamplingParams
from runtime.errors import ConfigError, InvalidRequestError, OutriderError, ResourceExhaustedError, WorkerError

if TYPE_CHECKING:
    from runtime.engine.engine import Engine

__all__ = [
    "Config",
    "ConfigError",
    "Engine",
    "InvalidRequestError",
    "LookaheadConfig",
    "OutriderError",
    "ResourceExhaustedError",
    "SamplingParams",
    "WorkerError",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`Engine` on first use, so that reading a config does not import torch."""
    if name == "Engine":
        from runtime.engine import ahead

        ahead.compile_all(Config())
        from runtime.engine.engine import Engine

        return Engine
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
