"""Times whole steps of the real engine around a decoder that costs nothing, by rows, sequences and meshes."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, cast

import typer

from benchmarks.common import plot_lines, print_json, print_table, progress
from benchmarks.overhead.free_decoder import NUM_WORDS, FreeDecoder, free_decoder
from runtime.config import Config
from runtime.engine.engine import Engine
from runtime.model.directory import checked_model
from runtime.model.spec import ModelSpec
from runtime.request import Request
from runtime.tokenizer import Tokenizer
from runtime.tuning.cost import CostCurve
from runtime.workers.executor import Executor, LocalExecutor
from runtime.workers.mesh_executor import MeshExecutor
from runtime.workers.pool import ProcessPool

PROMPT = 512
"""Tokens of each sequence before the first timed step."""
CAPACITY = 2048
"""Tokens of a cache slot; memory that is never written is never there."""
WARM_UP = 50
"""Steps before the timed ones: tables fill, caches warm."""


@dataclass(frozen=True)
class Cell:
    """One measured case."""

    lp: int
    tp: int
    sequences: int
    rows: int
    """Most rows of a step, all sequences together."""
    ms: float
    """Median of a whole step, less the decoder's own time."""
    rows_run: float
    """Rows of a step, median."""
    tokens_per_step: float
    parts: dict[str, float]
    """Medians, ms: what engine and executor say of it."""


def main(
    rows: Annotated[str, typer.Option(help="Rows per step, comma-separated.")] = "1,4,16,64,128,256,512",
    meshes: Annotated[str, typer.Option(help="Meshes, LPxTP, comma-separated.")] = "1x1,2x1,1x2,4x1,8x1",
    mesh_rows: Annotated[str, typer.Option(help="Rows per step on meshes of several processes.")] = "1,16,128,512",
    sequences: Annotated[str, typer.Option(help="Numbers of sequences, which share the rows.")] = "1,8,64",
    steps: Annotated[int, typer.Option(help="Timed steps of a case.")] = 300,
    plot: Annotated[Path | None, typer.Option(help="Where to draw it.")] = None,
) -> None:
    """What a step takes beside the model's own work: planning, transport, the caches' accounts, verification.

    On a mesh every worker is a process of this machine; where these are more than the cores, they wait for each other.
    There the decoder's own microseconds are left in.
    """
    cells: list[Cell] = []
    counts = [int(count) for count in sequences.split(",")]
    shapes = [(int(lp), int(tp)) for lp, tp in (mesh.split("x") for mesh in meshes.split(","))]
    with progress("timing steps", len(shapes)) as show:
        for done, (lp, tp) in enumerate(shapes):
            budgets = [int(number) for number in (rows if lp * tp == 1 else mesh_rows).split(",")]
            cells += measured(lp, tp, counts if lp * tp == 1 else counts[:1], budgets, steps)
            show(done + 1)
    columns = ("mesh", "sequences", "rows at most", "rows", "tokens per step", "plan", "execute", "verify", "ms")
    lines = [
        (
            f"{cell.lp}x{cell.tp}",
            str(cell.sequences),
            str(cell.rows),
            f"{cell.rows_run:.0f}",
            f"{cell.tokens_per_step:.2f}",
            *(f"{cell.parts[part]:.3f}" for part in ("plan", "execute", "verify")),
            f"{cell.ms:.3f}",
        )
        for cell in cells
    ]
    print_table("what a step takes beside the decoder, ms (medians)", columns, lines)
    if plot is not None:
        draw(plot, cells)
    print_json({"benchmark": "overhead", "cells": [asdict(cell) for cell in cells]})


def measured(lp: int, tp: int, counts: Sequence[int], budgets: Sequence[int], steps: int) -> Iterator[Cell]:
    """The cases of one mesh, one after the other on the same workers."""
    settings = {
        "parallel": {"lp": lp, "tp": tp},
        "scheduler": {"max_sequences": max(counts), "max_rows": max(*budgets, PROMPT)},
        "cache": {"capacity": CAPACITY},
        "sampling": {"ignore_eos": True},
    }
    config = Config.from_dict(settings)
    directory, spec = checked_model(config)
    executor: Executor
    if lp * tp == 1:
        executor = LocalExecutor(config, spec, free_decoder)
    else:
        executor = MeshExecutor(config, spec, ProcessPool(free_decoder))
    gc.freeze()  # as `outrider serve` does
    with closing(executor):
        for count in counts:
            for budget in budgets:
                if budget >= count:
                    engine = Engine(config, spec, Tokenizer(directory), executor)
                    yield cell_of(engine, spec, count, budget, steps)


def cell_of(engine: Engine, spec: ModelSpec, count: int, budget: int, steps: int) -> Cell:
    """Run `count` sequences that share `budget` rows per step; rows cost nothing, so the planner takes all it gets."""
    config, executor = engine.config, engine.executor
    engine.use_curve(CostCurve((1, config.scheduler.max_rows + 1), (1.0, 1.0 + 1e-9)))
    lookahead = config.lookahead.model_copy(update={"row_budget": budget // count})
    sampling = config.sampling.model_copy(update={"max_new_tokens": CAPACITY - PROMPT - 1})
    decoder = cast(FreeDecoder, executor._worker.decoder) if isinstance(executor, LocalExecutor) else None
    whole: list[float] = []
    parts: dict[str, list[float]] = {"plan": [], "execute": [], "verify": []}
    num_rows, num_tokens, number = [], 0, 0
    while len(whole) < steps:
        while engine.num_running + engine.num_waiting < count:
            number += 1
            prompt = tuple((number * 7919 + place * place) % NUM_WORDS for place in range(PROMPT))
            engine.add_request(Request(f"request-{number}", prompt, sampling, lookahead))
        stats = engine.stats
        before, rows_before, tokens_before = dict(stats.seconds), stats.num_rows, stats.num_tokens
        free_before = decoder.seconds if decoder is not None else 0.0
        waiting, reading = engine.num_waiting, any(s.num_uncached > 1 for s in engine._scheduler.running.values())
        started = perf_counter()
        engine.step()
        taken = perf_counter() - started
        free = decoder.seconds - free_before if decoder is not None else 0.0
        if waiting or reading or stats.num_steps <= WARM_UP:
            continue
        whole.append(taken - free)
        num_rows.append(stats.num_rows - rows_before)
        num_tokens += stats.num_tokens - tokens_before
        spent = {phase: stats.seconds[phase] - before[phase] for phase in before}
        parts["plan"].append(spent["plan"])
        parts["verify"].append(spent["verify"])
        parts["execute"].append(spent["broadcast"] + spent["forward"] + spent["gather"] - free)
    for request_id in [sequence.request.request_id for sequence in engine._scheduler.running.values()]:
        engine.abort(request_id)
    engine.step()
    return Cell(
        lp=config.parallel.lp,
        tp=config.parallel.tp,
        sequences=count,
        rows=budget,
        ms=median(whole) * 1000,
        rows_run=median(num_rows),
        tokens_per_step=num_tokens / len(whole) / count,
        parts={part: median(values) * 1000 for part, values in parts.items()},
    )


def draw(place: Path, cells: Sequence[Cell]) -> None:
    """Milliseconds by rows, a line per mesh and number of sequences."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for cell in cells:
        xs, ys = lines.setdefault(f"{cell.lp}x{cell.tp}, {cell.sequences} sequences", ([], []))
        xs.append(cell.rows)
        ys.append(cell.ms)
    top = 10 ** math.ceil(math.log10(max(cell.ms for cell in cells)))
    settings = {"xscale": "log", "yscale": "log", "ylim": (0.01, top)}
    plot_lines(place, "what a step takes beside the decoder", ("rows", "ms"), lines, **settings)
