"""`python -m benchmarks.chaos`: what faults cost."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.chaos import servers, workers
from benchmarks.chaos.record import Asked, Report, Verdict
from benchmarks.common import DEFAULT_PROMPTS, load_prompts, print_json, print_table, progress, stderr
from cluster.cli.options import ConfigOption, SetOption
from runtime.config import Config
from runtime.engine.engine import Engine

POLICIES: tuple[dict[str, object], ...] = (
    {"policy": "full"},
    {"policy": "sink", "num_sinks": 4, "window": 252},
    {"policy": "sep", "design": "streaming", "local": 128, "max_separators": 32, "capacity": 256},
)
"""Of caches; meshes take them in turn."""


def main(
    meshes: Annotated[str, typer.Option(help="LPxTP, comma-separated.")] = "2x1,3x1,1x2,2x2",
    kills: Annotated[int, typer.Option(help="Workers killed, all meshes together.")] = 50,
    stops: Annotated[int, typer.Option(help="Workers stopped (SIGSTOP), all meshes together.")] = 10,
    server_kills: Annotated[int, typer.Option(help="Times that the server is killed.")] = 10,
    streams: Annotated[int, typer.Option(help="Answers that run at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 48,
    prompts: Annotated[Path, typer.Option(help="JSON lines as `outrider batch` reads them.")] = DEFAULT_PROMPTS,
    seed: Annotated[int, typer.Option(help="Of what is done to whom and when.")] = 0,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Kill and stop workers and servers under load, and compare every answer with that of an undisturbed run.

    Half of the answers are sampled. On native kernels they are to be the same to the last token; the exit code is 1 if
    a token is lost, repeated or changed, or an answer ends with an error.
    """
    settings = Config.load(config, set_ or ())
    choice = random.Random(seed)
    with Engine.from_config(settings.merged({"parallel": {"lp": 1, "tp": 1}})) as engine:
        texts = [ids for _, ids in load_prompts(engine, prompts, streams)]
    asked = [Asked(tuple(texts[i % len(texts)]), _sampling(i, max_new_tokens)) for i in range(streams)]
    shapes = [tuple(map(int, mesh.split("x"))) for mesh in meshes.split(",") if mesh]
    reports: list[Report] = []
    with progress("faults", kills + stops + server_kills) as show:
        num_done = 0

        def count() -> None:
            nonlocal num_done
            num_done += 1
            show(num_done)

        for number, (lp, tp) in enumerate(shapes):
            kinds = ["kill"] * _share(kills, number, len(shapes)) + ["stop"] * _share(stops, number, len(shapes))
            choice.shuffle(kinds)
            mesh = {
                "parallel": {"lp": lp, "tp": tp},
                "cache": POLICIES[number % len(POLICIES)],
                "scheduler": {"max_sequences": streams},
            }
            reports.append(workers.disturb(settings.merged(mesh), asked, kinds, choice, count))
            stderr.print(f"{lp}x{tp}: {reports[-1].verdict}")
        if server_kills:
            alone = settings.merged({"scheduler": {"max_sequences": streams}})
            expected = workers.undisturbed(alone.merged({"parallel": {"lp": 1, "tp": 1}}), asked)
            options = [*(set_ or ()), f"scheduler.max_sequences={streams}"]
            reports.append(servers.disturb(options, config, asked, expected, server_kills, choice, count))
            stderr.print(f"server: {reports[-1].verdict}")
    rows = [row for report in reports for row in report.rows()]
    columns = ("mesh", "fault", "how many", "pause of all answers, s", "longest, s")
    print_table(
        "what faults cost",
        columns,
        [(mesh, kind, str(count), f"{middle:.2f}", f"{longest:.2f}") for mesh, kind, count, middle, longest in rows],
    )
    total = Verdict()
    for report in reports:
        for name, value in asdict(report.verdict).items():
            setattr(total, name, getattr(total, name) + value)
    print_json(
        {
            "benchmark": "chaos",
            "faults": dict(Counter(fault.kind for report in reports for fault in report.faults)),
            **asdict(total),
            "answers": sum(len(report.streams) for report in reports),
            "pauses": [
                {"mesh": mesh, "fault": kind, "count": count, "median_s": middle, "longest_s": longest}
                for mesh, kind, count, middle, longest in rows
            ],
        }
    )
    if any(asdict(total).values()):
        raise typer.Exit(1)


def _sampling(number: int, max_new_tokens: int) -> dict[str, object]:
    drawn = {"temperature": 0.8, "top_p": 0.95, "seed": number} if number % 2 else {"temperature": 0.0}
    return {"max_new_tokens": max_new_tokens, "ignore_eos": True, **drawn}


def _share(total: int, number: int, count: int) -> int:
    """Of so many things for `count` takers, those of taker `number`."""
    return total // count + (number < total % count)
