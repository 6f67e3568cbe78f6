"""The server's description of itself: what is served, how, and what has happened so far."""

from __future__ import annotations

import dataclasses
import math
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.pb.outrider.v1 import generation_pb2 as pb
from runtime.config import Config
from runtime.engine.loop import EngineLoop, LoopStats
from runtime.model.gguf import EMBEDDED_FILE
from runtime.model.spec import ModelSpec
from runtime.model.weights import HEAD, tensor_shapes

if TYPE_CHECKING:
    from runtime.engine.engine import Engine  # which compiles when it is imported for the first time


def server_info(engine: Engine, loop: EngineLoop, num_refused: int) -> pb.GetServerInfoResponse:
    """What is served, how, and what has happened so far."""
    config, spec, stats, live = engine.config, engine.spec, engine.stats, loop.stats
    outcomes = {str(reason): count for reason, count in live.outcomes.items()}
    return pb.GetServerInfoResponse(
        version=version("outrider"),
        model=pb.ModelInfo(
            name=_model_name(config),
            architecture=spec.architecture,
            dtype=config.model.dtype,
            device=_device_kind(config),
            vocab_size=spec.vocab_size,
            capacity=engine.capacity,
            num_parameters=count_parameters(spec),
        ),
        mesh=pb.MeshInfo(
            lp=config.parallel.lp,
            tp=config.parallel.tp,
            num_workers=config.parallel.num_workers,
            num_replicas=stats.num_replicas,
            num_lost=stats.num_lost,
            num_rereads=stats.num_rereads,
        ),
        lookahead=pb.LookaheadParams(**config.lookahead.model_dump()),
        sampling=pb.SamplingParams(**config.sampling.model_dump()),
        counters=pb.Counters(
            requests_by_outcome={**outcomes, "refused": num_refused},
            num_running=live.num_running,
            num_waiting=live.num_waiting,
            num_steps=stats.num_steps,
            num_tokens=stats.num_tokens,
            seconds_by_phase=dict(stats.seconds),
            uptime_s=live.uptime_s,
        ),
        cache=cache_info(engine, live),
    )


def cache_info(engine: Engine, live: LoopStats) -> pb.CacheInfo:
    """What sequences keep, what that takes, and who holds it now."""
    return pb.CacheInfo(
        **dataclasses.asdict(engine.cache_report()),
        max_sessions=engine.config.scheduler.session_limit,
        num_sessions=live.num_sessions,
    )


def _model_name(config: Config) -> str:
    if config.model.path is None:
        return f"{Path(EMBEDDED_FILE).stem} (embedded)"
    return config.model.path


def _device_kind(config: Config) -> str:
    from runtime.mesh.device import pick_device  # which imports torch, and the server listens before

    return pick_device(config, 0).type


def count_parameters(spec: ModelSpec) -> int:
    """Weights of the model, tied embeddings counted once."""
    shapes = tensor_shapes(spec)
    if spec.tie_embeddings:
        del shapes[HEAD]
    return sum(math.prod(shape) for shape in shapes.values())
