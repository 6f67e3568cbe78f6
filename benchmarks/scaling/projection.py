"""Latency on GPUs that are not here: S as one worker measured it, step times from the roofline.

S depends on the rows of a step, not on the mesh that runs them, so it carries over to any mesh (nearly: how the
vocabulary is split shifts the probabilities that `recycle` ranks by). That it carries over from the measured model to
the projected one is an assumption; every record says which model S came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.costs import Shape, splits, step_cost
from benchmarks.roofline.host import HostPath
from benchmarks.roofline.roofline import Device, fits, step_seconds
from benchmarks.scaling.cells import OFF


def project(
    measured: Iterable[Mapping[str, Any]],
    device: Device,
    model: Shape,
    workers: Sequence[int],
    context: float,
    measured_with: str,
    item_bytes: int = 2,
    host: HostPath | None = None,
) -> list[dict[str, Any]]:
    """Project every cell of one worker onto every split of `workers` GPUs; splits that do not fit are left out.

    Args:
        measured: figures of one worker's cells (scaling_run.summarise).
        context: cached tokens.
        measured_with: the model that gave S.
        host: what steps take around the devices, as measured; None: not counted, and the records say so.
    """
    alone = [figures for figures in measured if figures["workers"] == 1]
    meshes = [mesh for count in workers for mesh in splits(count, model.num_heads)]
    return [
        _record(figures, device, model, lp, tp, context, measured_with, item_bytes, host)
        for lp, tp in meshes
        if fits(device, model, tp, context, item_bytes)
        for figures in alone
        if figures["sources"] != OFF or lp == 1
    ]


def _record(
    figures: Mapping[str, Any],
    device: Device,
    model: Shape,
    lp: int,
    tp: int,
    context: float,
    measured_with: str,
    item_bytes: int,
    host: HostPath | None,
) -> dict[str, Any]:
    rows, tokens_per_step = figures["rows_per_step"], figures["tokens_per_step"]
    largest = rows if lp == 1 else figures["largest_replica_rows_at"][str(lp)]
    sent = {"plan_bytes": figures["plan_bytes"], "result_bytes": figures["result_bytes"]}
    step = step_seconds(
        device,
        model,
        largest,
        context,
        tp,
        lp,
        item_bytes,
        commit_rows=tokens_per_step,
        host=host,
        rows=rows,
        **sent,
    )
    # As if every replica had the largest one's rows: an upper bound of the work.
    cost = step_cost(model, [largest] * lp, context, tp, item_bytes, commit_rows=tokens_per_step, **sent)
    return {
        "kind": "projected",
        "device": device.name,
        "model": model.name,
        "tokens_per_step_measured_with": measured_with,
        "lp": lp,
        "tp": tp,
        "workers": lp * tp,
        "sources": figures["sources"],
        "budget": figures["budget"],
        "tokens_per_step": tokens_per_step,
        "rows_per_step": rows,
        "largest_replica_rows": largest,
        "host_path": _host_path(host, lp, tp),
        "context": context,
        "flops_per_step": cost.flops,
        "flops_per_token": cost.flops / tokens_per_step,
        "bytes_moved_per_token": cost.bytes_moved / tokens_per_step,
        "communication_bytes_per_step": cost.communication_bytes,
        "step_ms": 1e3 * step.total,
        "parts_ms": {part: 1e3 * seconds for part, seconds in step.parts().items()},
        "ms_per_token": 1e3 * step.total / tokens_per_step,
        "tokens_per_s": tokens_per_step / step.total,
    }


def _host_path(host: HostPath | None, lp: int, tp: int) -> str:
    if host is None:
        return "not counted"
    return "measured" if host.has(lp, tp) else "one process measured, transport assumed"
