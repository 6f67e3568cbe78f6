"""`/live`: what the engine does now, for the page's view of the mesh."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from starlette.responses import Response

from cluster.serving.desk import Desk
from cluster.serving.http.reading import model_id
from cluster.serving.http.replies import reply
from runtime.mesh.device import pick_device


def response(desk: Desk) -> Response:
    """The snapshot as JSON. Raises WorkerError before there is an engine."""
    return reply(snapshot(desk))


def snapshot(desk: Desk) -> dict[str, Any]:
    """Counts since the start, whose differences the page shows, and what there is now."""
    engine, loop = desk.opened
    config, stats, now = engine.config, engine.stats, loop.stats
    report = engine.cache_report()
    return {
        "time_s": time.monotonic(),
        "version": version("outrider"),
        "model": {"id": model_id(config), "dtype": config.model.dtype, "architecture": engine.spec.architecture},
        "mesh": {"lp": config.parallel.lp, "tp": config.parallel.tp, "device": pick_device(config, 0).type},
        "num_running": now.num_running,
        "num_waiting": now.num_waiting,
        "num_sessions": now.num_sessions,
        "uptime_s": now.uptime_s,
        "num_steps": stats.num_steps,
        "num_rows": stats.num_rows,
        "num_tokens": stats.num_tokens,
        "requests_by_outcome": {str(reason): count for reason, count in now.outcomes.items()},
        "seconds_by_phase": dict(stats.seconds),
        "sources": {
            name: {"proposed": proposed, "accepted": accepted}
            for name, (proposed, accepted) in engine.knowledge.tally.sources.items()
        },
        "cache": {
            "policy": report.policy,
            "num_slots": report.num_slots,
            "most_tokens": report.max_stored_tokens,
            "bytes_per_token": report.bytes_per_token,
            "slots": [asdict(slot) for slot in engine.slots()],
        },
    }
