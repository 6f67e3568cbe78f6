"""Runs one answer of the scaling experiment and adds answers up to a cell's figures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.costs import Shape, step_cost
from benchmarks.scaling.cells import Cell
from benchmarks.speed.report import PHASES
from runtime.config import LookaheadConfig, SamplingParams
from runtime.core import partition
from runtime.engine.engine import Engine
from runtime.step import Commit, Row, StepPlan, StepResult, WireLayout
from runtime.workers.worker import wire_layout

LP_SIZES = (2, 4, 8)
"""Replicas for which one worker's steps are also cut, to know the largest part there."""


@dataclass
class Recorder:
    """Stands between an engine and its executor and keeps what the plans looked like."""

    executor: Any
    lp: int
    layout: WireLayout
    parents: list[np.ndarray] = field(default_factory=list)
    replica_rows: list[np.ndarray] = field(default_factory=list)
    """Per step, rows of each replica."""
    commit_rows: list[int] = field(default_factory=list)
    """Per step, rows whose keys and values other replicas copied."""
    result_words: list[int] = field(default_factory=list)

    def execute(self, plan: StepPlan, patience_s: float | None = None) -> StepResult:
        if plan.num_rows:
            self.parents.append(plan.rows[:, Row.PARENT].copy())
            self.replica_rows.append(np.array([len(plan.local_rows(replica)) for replica in range(self.lp)]))
            self.commit_rows.append(int((plan.commits[:, Commit.SOURCE] >= 0).sum()))
            self.result_words.append(self.layout.result_words(plan, self.lp))
        return self.executor.execute(plan, patience_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)

    @classmethod
    def on(cls, engine: Engine) -> Recorder:
        """Put one into `engine`, where EngineStats has no such counters."""
        recorder = cls(engine.executor, engine.config.parallel.lp, wire_layout(engine.config))
        engine.executor = recorder  # type: ignore[assignment]
        return recorder


def answer(
    engine: Engine, recorder: Recorder, prompt: Sequence[int], lookahead: LookaheadConfig, max_new_tokens: int
) -> dict[str, Any]:
    """Run one prompt. Counts and times are those of the steps after the first output, the prompt's own left out."""
    for kept in (recorder.parents, recorder.replica_rows, recorder.commit_rows, recorder.result_words):
        kept.clear()
    stats, tokens, num_first, first = engine.stats, [], 0, None
    started = 0.0
    for output in engine.stream(list(prompt), SamplingParams(max_new_tokens=max_new_tokens), lookahead):
        tokens += output.token_ids
        if first is None:
            first = len(recorder.parents)
            num_first, seconds = len(tokens), dict(stats.seconds)
            started = time.perf_counter()
    total = time.perf_counter() - started
    assert first is not None
    parents, replica_rows = recorder.parents[first:], np.array(recorder.replica_rows[first:])
    num_steps = len(parents)
    record: dict[str, Any] = {
        "prompt_ids": list(prompt),
        "token_ids": tokens,
        "num_prompt_tokens": len(prompt),
        "num_tokens": len(tokens) - num_first,
        "num_steps": num_steps,
        "num_rows": sum(map(len, parents)),
        "context": len(prompt) + (num_first + len(tokens)) / 2,
        "seconds": {phase: stats.seconds[phase] - seconds[phase] for phase in PHASES} | {"total": total},
        "replica_rows": replica_rows.sum(0).tolist() if num_steps else [0] * recorder.lp,
        "largest_rows": int(replica_rows.max(1).sum()) if num_steps else 0,
        "commit_rows": sum(recorder.commit_rows[first:]),
        "plan_bytes": 4 * wire_layout(engine.config).usual_length,
        "result_bytes": 4 * sum(recorder.result_words[first:]),
    }
    if recorder.lp == 1:
        record["largest_rows_at"] = {str(lp): sum(largest_part(rows, lp) for rows in parents) for lp in LP_SIZES}
    return record


def largest_part(parents: np.ndarray, lp: int) -> int:
    """Rows of the largest of `lp` replicas."""
    _, replicas = partition(parents, lp)
    masks = np.array(replicas)
    return max(int((masks >> replica & 1).sum()) for replica in range(lp))


def summarise(cell: Cell, records: Sequence[Mapping[str, Any]], shape: Shape, item_bytes: int) -> dict[str, Any]:
    """A cell's figures over all prompts: totals over totals, so longer answers weigh more."""

    def total(name: str) -> float:
        return sum(record[name] for record in records)

    steps, tokens = max(total("num_steps"), 1), max(total("num_tokens"), 1)
    context = sum(record["context"] * record["num_steps"] for record in records) / steps
    replica_rows = [sum(rows) / steps for rows in zip(*(record["replica_rows"] for record in records), strict=True)]
    cost = step_cost(
        shape,
        replica_rows,
        context,
        cell.tp,
        item_bytes,
        commit_rows=total("commit_rows") / steps,
        plan_bytes=max(record["plan_bytes"] for record in records),
        result_bytes=total("result_bytes") / steps,
    )
    seconds = {phase: sum(record["seconds"][phase] for record in records) for phase in (*PHASES, "total")}
    figures = {
        "kind": "measured",
        "lp": cell.lp,
        "tp": cell.tp,
        "workers": cell.num_workers,
        "sources": cell.sources,
        "budget": cell.budget,
        "num_prompts": len(records),
        "num_tokens": total("num_tokens"),
        "num_steps": total("num_steps"),
        "tokens_per_step": total("num_tokens") / steps,
        "rows_per_step": total("num_rows") / steps,
        "largest_replica_rows": total("largest_rows") / steps,
        "replica_rows": replica_rows,
        "context": context,
        "flops_per_step": cost.flops,
        "flops_per_token": cost.flops * steps / tokens,
        "bytes_moved_per_token": cost.bytes_moved * steps / tokens,
        "communication_bytes_per_step": cost.communication_bytes,
        "communication": {
            "plan": cost.plan_bytes,
            "result": cost.result_bytes,
            "all_reduce": cost.all_reduce_bytes,
            "commit": cost.commit_bytes,
        },
        "step_ms": 1e3 * seconds["total"] / steps,
        "parts_ms": {phase: 1e3 * seconds[phase] / steps for phase in PHASES},
        "ms_per_token": 1e3 * seconds["total"] / tokens,
        "tokens_per_s": tokens / seconds["total"] if seconds["total"] else float("nan"),
    }
    if all("largest_rows_at" in record for record in records):
        figures["largest_replica_rows_at"] = {
            lp: sum(record["largest_rows_at"][lp] for record in records) / steps for lp in map(str, LP_SIZES)
        }
        figures["result_bytes"], figures["plan_bytes"] = total("result_bytes") / steps, records[0]["plan_bytes"]
    return figures
