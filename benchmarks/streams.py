"""Many answers at a time: is lookahead worth it beside how many others, and do running answers stall while long prompts
come?

Throughput: so many streams run to their ends with lookahead off and on, in turns. Stall: the gaps between the steps of
running answers, without and with prompts of thousands of tokens that come meanwhile, with the chunks that the scheduler
gives them and with half of every step, as it would be without `scheduler.max_stall`.

    python -m benchmarks.streams --set model.dtype=bfloat16 --counts 1,2,4,8,16,32,64
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.common import DEFAULT_PROMPTS, check_parts, load_prompts, print_json, print_table, progress
from runtime.config import Config, SamplingParams
from runtime.engine.chunks import Chunks
from runtime.engine.engine import Engine
from runtime.request import Request

PARTS = ("throughput", "stall")


def main(
    part: Annotated[list[str], typer.Option(help=f"Of {', '.join(PARTS)}.")] = list(PARTS),  # noqa: B006
    prompts: Annotated[Path, typer.Option(help="JSON lines as `outrider batch` reads them.")] = DEFAULT_PROMPTS,
    counts: Annotated[str, typer.Option(help="Numbers of streams, comma-separated.")] = "1,2,4,8,16,32,64",
    max_new_tokens: int = 48,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 3,
    answers: Annotated[int, typer.Option(help="Running answers beside long prompts.")] = 4,
    long_tokens: Annotated[int, typer.Option(help="Tokens of a long prompt.")] = 4000,
    num_long: Annotated[int, typer.Option(help="Long prompts.")] = 2,
    config: Annotated[Path | None, typer.Option(help="Run config, YAML.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="key.path=value")] = [],  # noqa: B006
) -> None:
    """Measure, print tables, and one JSON line last."""
    check_parts(part, PARTS)
    run_config = Config.load(config, set_).merged({"scheduler": {"prefix_reuse": False}})
    result: dict[str, Any] = {"benchmark": "streams"}
    with Engine.from_config(run_config) as engine:
        ids = [tokens for _, tokens in load_prompts(engine, prompts, None)]
        if "throughput" in part:
            result["throughput"] = throughput(engine, ids, [int(n) for n in counts.split(",")], max_new_tokens, rounds)
        if "stall" in part:
            result["stall"] = stall(engine, ids, answers, long_tokens, num_long)
    print_json(result)


def throughput(
    engine: Engine, ids: Sequence[list[int]], counts: Sequence[int], max_new_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """New tokens per second at each number of streams; prompts are read before the clock starts to count."""
    sampling = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    off = engine.config.lookahead.merged({"enabled": False})
    found = []
    with progress("throughput", len(counts) * rounds) as done:
        for at, count in enumerate(counts):
            speeds: dict[str, list[float]] = {"off": [], "on": []}
            rows = 0.0
            for turn in range(rounds):
                for name, lookahead in (("off", off), ("on", engine.config.lookahead)):
                    asked = list(itertools.islice(itertools.cycle(ids), count))
                    requests = [engine.make_request(prompt, sampling, lookahead) for prompt in asked]
                    speed, per_step = _run(engine, requests)
                    speeds[name].append(speed)
                    rows = per_step if name == "on" else rows
                done(at * rounds + turn + 1)
            ratios = [on / plain for plain, on in zip(speeds["off"], speeds["on"], strict=True)]
            medians = {name: statistics.median(values) for name, values in speeds.items()}
            found.append({"streams": count, **medians, "ratio": statistics.median(ratios), "rows_per_step": rows})
    lines = [[str(f["streams"]), *(f"{f[name]:.1f}" for name in ("off", "on")), f"{f['ratio']:.2f}"] for f in found]
    for line, each in zip(lines, found, strict=True):
        line.append(f"{each['rows_per_step']:.1f}")
    print_table("new tokens/s of all streams", ["streams", "lookahead off", "on", "ratio", "rows/step, on"], lines)
    return found


def _run(engine: Engine, requests: Sequence[Request]) -> tuple[float, float]:
    """Tokens per second from when all prompts have been read, and rows per step."""
    for request in requests:
        engine.add_request(request)
    unread = {request.request_id for request in requests}
    tokens = steps = rows = 0
    began = time.perf_counter()
    while engine.has_work:
        before = engine.stats.num_rows
        outputs = engine.step()
        if unread:
            unread -= {output.request_id for output in outputs if output.token_ids}
            began = time.perf_counter()
            continue
        steps, rows = steps + 1, rows + engine.stats.num_rows - before
        tokens += sum(len(output.token_ids) for output in outputs)
    return tokens / (time.perf_counter() - began), rows / max(steps, 1)


def stall(
    engine: Engine, ids: Sequence[list[int]], num_answers: int, long_tokens: int, num_long: int
) -> list[dict[str, Any]]:
    """Median and 99th percentile of the gaps, and how long the long prompts waited for their first token."""
    words = [token for prompt in ids for token in prompt]
    found = []
    halves = engine.config.scheduler.merged({"max_stall": 1000.0})
    for name, limits, number in (
        ("no long prompts", engine.config.scheduler, 0),
        (f"chunks, max_stall {engine.config.scheduler.max_stall:g}", engine.config.scheduler, num_long),
        ("half of each step", halves, num_long),
    ):
        engine._scheduler.chunks = Chunks(limits)
        long = [list(itertools.islice(itertools.cycle(words[at:]), long_tokens)) for at in range(number)]
        gaps, first_s = _gaps(engine, ids[:num_answers], long)
        median, p99 = statistics.median(gaps), float(np.percentile(gaps, 99))
        found.append({"case": name, "median_s": median, "p99_s": p99, "ratio": p99 / median, "first_token_s": first_s})
    engine._scheduler.chunks = Chunks(engine.config.scheduler)
    lines = [
        [f["case"], f"{1e3 * f['median_s']:.0f}", f"{1e3 * f['p99_s']:.0f}", f"{f['ratio']:.1f}"]
        + [f"{f['first_token_s']:.1f}" if f["first_token_s"] else "-"]
        for f in found
    ]
    columns = ["", "median gap, ms", "p99", "p99 / median", "a long prompt's first token, s"]
    print_table(f"{num_answers} answers beside prompts of {long_tokens} tokens", columns, lines)
    return found


def _gaps(engine: Engine, prompts: Sequence[list[int]], long: Sequence[list[int]]) -> tuple[list[float], float]:
    """Seconds between the outputs of answers that run until the long prompts have been read, one after the other."""
    endless = SamplingParams(max_new_tokens=1500, ignore_eos=True)
    running = [engine.make_request(prompt, endless) for prompt in prompts]
    for request in running:
        engine.add_request(request)
    names = {request.request_id for request in running}
    waiting = [engine.make_request(tokens, SamplingParams(max_new_tokens=1)) for tokens in long]
    last: dict[str, float] = {}
    gaps: list[float] = []
    firsts: list[float] = []
    began: float | None = None
    for step in itertools.count():
        if began is None and waiting and step >= 40:
            engine.add_request(waiting.pop())
            began = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.request_id not in names:
                assert began is not None
                firsts.append(now - began)
                began = None
            elif output.request_id in last and step >= 20:
                gaps.append(now - last[output.request_id])
            last[output.request_id] = now
        if (step >= 160 if not long else len(firsts) == len(long)) or not engine.has_work:
            break
    for request in running:
        engine.abort(request.request_id)
    engine.step()
    return gaps, statistics.fmean(firsts) if firsts else 0.0


if __name__ == "__main__":
    typer.run(main)
