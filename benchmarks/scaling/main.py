"""Scaling: tokens per step and latency against workers, how they are split, rows per step and candidate sources.

Measured on the meshes of this machine; every answer is compared with one worker's, lookahead off. S depends on a
step's rows, not on the mesh, so `--project` takes S from one worker and step times from benchmarks/roofline.py; such
figures are called projected in every row, record and plot. Finished answers stay in DIR/answers.jsonl: `--resume`
skips them.

    python -m benchmarks.scaling                                         # one worker, and both meshes of two
    python -m benchmarks.scaling --all --resume --limit 6 --max-new-tokens 128
    python -m benchmarks.scaling --workers 1 --project h100 --project a100 --project-model llama-2-7b
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import DEFAULT_PROMPTS, NEAR_TIE, load_prompts, print_json, stderr
from benchmarks.costs import Shape
from benchmarks.lossless import gap_under
from benchmarks.roofline.roofline import DEVICES, MODELS
from benchmarks.scaling.cells import MIN_BUDGET, OFF, SOURCE_SETS, Cell, Store, grid, key_of, parse_numbers
from benchmarks.scaling.cells import parse_sources as parse_source_sets
from benchmarks.scaling.fits import AcceptanceFit, LineFit
from benchmarks.scaling.projection import project as project_onto
from benchmarks.scaling.report import fit_all, report
from benchmarks.scaling.run import LP_SIZES, Recorder, answer, summarise
from benchmarks.speed.main import run_dtype
from cluster.client.backends import open_engine
from runtime.config import Config
from runtime.engine.engine import Engine
from runtime.equality import Equality, Gap, hugging_face_gap
from runtime.model.directory import load_spec, resolve_model

ALL = {"workers": "1,2,4,8", "budgets": "16,32,64,128,256,512,1024", "sources": ",".join(SOURCE_SETS)}
WARM_UP_TOKENS = 6


def main(
    prompts: Annotated[Path, typer.Option(help="JSON lines as `outrider batch` reads them.")] = DEFAULT_PROMPTS,
    limit: Annotated[int | None, typer.Option(help="First prompts only.")] = 2,
    max_new_tokens: int = 48,
    workers: Annotated[str, typer.Option(help="Numbers of workers, each in all splits.")] = "1,2",
    budgets: Annotated[str, typer.Option(help="Rows of the whole mesh in a step.")] = "16,64,256",
    sources: Annotated[str, typer.Option(help="Source sets, names joined by +.")] = "jacobi,suffix+recycle",
    everything: Annotated[bool, typer.Option("--all", help="All workers, budgets and source sets.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads per worker, on every mesh.")] = 1,
    processes: Annotated[bool, typer.Option("--processes/--ray", help="Where workers run.")] = True,
    project: Annotated[list[str], typer.Option(help="Project onto a100, h100 or h200; repeatable.")] = [],  # noqa: B006
    project_model: Annotated[list[str], typer.Option(help=f"Among {', '.join(MODELS)}.")] = ["llama-2-7b"],  # noqa: B006
    project_workers: Annotated[str, typer.Option(help="GPUs, each number in all splits.")] = "1,2,4,8",
    project_context: Annotated[int, typer.Option(help="Cached tokens.")] = 1024,
    project_host: Annotated[bool, typer.Option(help="Add this machine's planning and verifying.")] = True,
    config: Annotated[Path | None, typer.Option(help="Run config, YAML.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="key.path=value")] = [],  # noqa: B006
    resume: Annotated[bool, typer.Option(help="Use the answers that --out already has.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for answers and plots.")] = Path("out/scaling"),
) -> None:
    """Measure, project and fit; exit 1 if an answer is not lossless."""
    if everything:
        workers, budgets, sources = ALL["workers"], ALL["budgets"], ALL["sources"]
    counts = parse_numbers(workers, "--workers")
    rows, sets = parse_numbers(budgets, "--budgets", MIN_BUDGET), parse_source_sets(sources)
    gpus = parse_numbers(project_workers, "--project-workers")
    check_projection(project, project_model, gpus)
    run_config = Config.load(config, set_)
    spec = load_spec(resolve_model(run_config.model.path))
    run_config = one_request_at_a_time(run_config, max(rows))
    cells = grid(counts, rows, sets, spec.num_heads)
    store = Store(out / "answers.jsonl", resume)
    torch.set_num_threads(threads)
    answers, dtype = measure(run_config, cells, store, prompts, limit, max_new_tokens, threads, processes)

    name = Path(run_config.model.path or "SmolLM2-135M-Instruct").name.removesuffix(".gguf")
    shape = Shape.of(name, spec)
    figures = [summarise(cell, records, shape, getattr(torch, dtype).itemsize) for cell, records in answers.items()]
    check_lossless(figures, answers, gap_for(run_config), NEAR_TIE[dtype])
    for record in figures:
        record |= {"model": name, "dtype": dtype, "threads": threads}
        record["oversubscribed"] = record["workers"] * threads > (os.cpu_count() or 1)
    fits = fit_all(figures)
    projected = [
        record
        for device in project
        for model in project_model
        for record in project_onto(
            figures, DEVICES[device], MODELS[model], gpus, project_context, f"{name} {dtype}", host=project_host
        )
    ]
    plots = report(figures, projected, fits, out)
    print_json({
        "benchmark": "scaling",
        "config": run_config.model_dump(mode="json"),
        "measured": figures,
        "projected": projected,
        "fits": {sources: {kind: plain(fit) for kind, fit in pair.items()} for sources, pair in fits.items()},
        "plots": [str(plot) for plot in plots],
    })  # fmt: skip
    raise typer.Exit(0 if all(record["lossless"] for record in figures) else 1)


def plain(fit: LineFit | AcceptanceFit | None) -> dict[str, float | None] | None:
    """For JSON, which knows no nan."""
    return fit and {name: None if math.isnan(value) else value for name, value in asdict(fit).items()}


def check_projection(devices: Sequence[str], models: Sequence[str], gpus: Sequence[int]) -> None:
    """Refuse names and sizes for which there are no figures."""
    for names, known, option in ((devices, DEVICES, "--project"), (models, MODELS, "--project-model")):
        if unknown := set(names) - set(known):
            problem = f"{', '.join(sorted(unknown))}: unknown; choose among {', '.join(known)}."
            raise typer.BadParameter(problem, param_hint=option)
    if unknown := set(gpus) - {1, *LP_SIZES}:
        problem = f"{', '.join(map(str, sorted(unknown)))}: one worker's steps are cut for 1, 2, 4 and 8 replicas only."
        raise typer.BadParameter(problem, param_hint="--project-workers")


def one_request_at_a_time(config: Config, max_rows: int) -> Config:
    """A step holds the largest budget, on every mesh alike, and one sequence; no planner measures what rows cost."""
    scheduler = config.scheduler.model_dump()
    scheduler |= {"max_sequences": 1, "max_rows": max(max_rows, scheduler["max_rows"]), "max_sessions": None}
    return config.merged({"scheduler": scheduler, "lookahead": {**config.lookahead.model_dump(), "planner": False}})


@contextmanager
def engine_on(config: Config, lp: int, tp: int, threads: int, processes: bool) -> Iterator[Engine]:
    """An engine whose mesh is lp x tp, of local processes or on Ray."""
    config = config.merged({"parallel": {"lp": lp, "tp": tp, "threads": threads}})
    if not processes or lp * tp == 1:  # one worker needs no Ray, and open_engine settles what is "auto"
        with open_engine(config) as engine:
            yield engine
        return
    with Engine.from_config(config) as engine:
        yield engine


def measure(
    config: Config,
    cells: Mapping[tuple[int, int], Sequence[Cell]],
    store: Store,
    prompts: Path,
    limit: int | None,
    max_new_tokens: int,
    threads: int,
    processes: bool,
) -> tuple[dict[Cell, list[dict[str, Any]]], str]:
    """Every cell's answers, one per prompt, and the dtype they were computed in. What `store` has is not run again.

    On one mesh all cells answer a prompt before the next prompt comes, a different one first each time.
    """
    with engine_on(config, 1, 1, threads, processes) as engine:
        ids = [tokens for _, tokens in load_prompts(engine, prompts, limit)]
        dtype = run_dtype(engine)
        config = config.merged({"model": {**config.model.model_dump(), "dtype": dtype}})
        environment = {
            "machine": [platform.processor() or platform.machine(), os.cpu_count()],
            "threads": threads,
            "processes": processes,
            "dtype": dtype,
            "max_new_tokens": max_new_tokens,
            **config.model_dump(mode="json", include={"model", "cache", "scheduler"}),
        }

        def key(cell: Cell, prompt: Sequence[int]) -> str:
            lookahead = cell.lookahead(config.lookahead).model_dump(mode="json")
            return key_of(environment | {"lp": cell.lp, "tp": cell.tp, "lookahead": lookahead, "prompt": list(prompt)})

        keys = {cell: [key(cell, prompt) for prompt in ids] for group in cells.values() for cell in group}
        alone, others = cells[1, 1], {mesh: group for mesh, group in cells.items() if mesh != (1, 1)}
        run_mesh(engine, alone, keys, ids, store, max_new_tokens)
    for (lp, tp), group in others.items():
        if store.missing([key for cell in group for key in keys[cell]]):
            with engine_on(config, lp, tp, threads, processes) as engine:
                run_mesh(engine, group, keys, ids, store, max_new_tokens)
    return {cell: [store.records[key] for key in keys[cell]] for cell in keys}, dtype


def run_mesh(
    engine: Engine,
    cells: Sequence[Cell],
    keys: Mapping[Cell, Sequence[str]],
    prompts: Sequence[Sequence[int]],
    store: Store,
    max_new_tokens: int,
) -> None:
    """Run what one mesh still lacks."""
    todo = [cell for cell in cells if store.missing(keys[cell])]
    if not todo:
        return
    parallel = engine.config.parallel
    recorder = Recorder.on(engine)
    for cell in todo:
        answer(engine, recorder, prompts[0], cell.lookahead(engine.config.lookahead), WARM_UP_TOKENS)
    for number, prompt in enumerate(prompts):
        first = number % len(todo)
        for cell in (*todo[first:], *todo[:first]):
            key = keys[cell][number]
            if key in store.records:
                continue
            record = answer(engine, recorder, prompt, cell.lookahead(engine.config.lookahead), max_new_tokens)
            store.add({"key": key, "kind": "measured", "cell": asdict(cell), "prompt": number, **record})
            speed = record["num_tokens"] / max(record["seconds"]["total"], 1e-9)
            where = f"lp={parallel.lp} tp={parallel.tp} {cell.method}, prompt {number + 1} of {len(prompts)}"
            stderr.print(f"{where}: {speed:.1f} tokens/s", highlight=False)


def check_lossless(
    figures: Sequence[dict[str, Any]], answers: Mapping[Cell, list[dict[str, Any]]], gap_of: Gap, tolerance: float
) -> None:
    """Add to each cell's figures how its tokens compare with one worker's, lookahead off."""
    expected = answers[Cell(1, 1, OFF)]
    for record, given in zip(figures, answers.values(), strict=True):
        equality = Equality(gap_of, tolerance)
        for number, (one, other) in enumerate(zip(expected, given, strict=True)):
            equality.compare(one["prompt_ids"], one["token_ids"], other["token_ids"], f"prompt {number}")
        gaps = [divergence.gap for divergence in equality.divergences]
        record |= {"lossless": equality.lossless, "near_ties": sum(gap < tolerance for gap in gaps), "gaps": gaps}
        record["tokens_compared"] = equality.num_tokens


def gap_for(config: Config) -> Gap:
    """Gaps by Hugging Face in float32, or by our own model under another cache policy; loaded if one is asked for."""

    @cache
    def load() -> Gap:
        if config.cache.policy == "full":
            return hugging_face_gap(resolve_model(config.model.path))
        return gap_under(config)

    loaded: Callable[[], Gap] = load
    return lambda context, one, other: loaded()(context, one, other)
