"""The published orders of training under caches, at toy scale: three seeds, perplexity through Outrider itself.

Models of about a million parameters are trained on the King James Bible under `full`, `full` with a sink token, `sep`,
`sink` and a strided baseline, the last two at the attended share of `sep`. Each is then served by Outrider:

- within the trained length, on text held out: which policy does best at an equal share, and what training under it
  gains;
- on streams longer than that, under caches with 0, 1 and 4 sinks: what a sink token is for.

An order holds if the mean over seeds of its difference exceeds two standard errors. What is trained stays in the work
folder, and a run that is begun again goes on from there.

    python -m benchmarks.training --small --work /tmp/orders --out out     # minutes on two cores
    python -m benchmarks.training --work /tmp/orders --out out             # within an hour
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import print_json, progress, stderr
from benchmarks.training import orders
from benchmarks.training.corpus import text_file
from benchmarks.training.runs import FULL, SMALL, Scale, config_of, plans, train_all
from benchmarks.training.serving import Served, attended, losses, samples_of, streams_of
from runtime.training.source import train_tokenizer

HELD_OUT = 0.1
"""Of the text, its end: what models are measured on."""


def main(
    work: Annotated[Path, typer.Option(help="Folder for what is trained.")],
    small: Annotated[bool, typer.Option("--small", help="Smaller models, fewer steps.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of the scale's own.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Models trained at a time.")] = 2,
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="UTF-8 text instead of the Bible.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plot (PNG) into this directory.")] = None,
) -> None:
    """Train, serve, compare."""
    scale = SMALL if small else FULL
    if steps is not None:
        scale = Scale(**{**asdict(scale), "steps": steps})
    folder = work / ("small" if small else "full")
    corpus, validation, streams, tokenizer = prepare((text or text_file()).read_text(encoding="utf-8"), scale, folder)
    taken = samples_of(validation, tokenizer, scale)
    chosen = plans(scale, lambda cache, strided: attended(cache, strided, taken, tokenizer, scale))
    keys = [(plan, seed) for seed in range(seeds) for plan in chosen]
    configs = [
        config_of(plan, scale, seed, tokenizer, corpus, validation, folder / f"{plan.name.replace(' ', '-')}-{seed}")
        for plan, seed in keys
    ]
    stderr.print(f"{len(configs)} models of {scale.steps} steps, {jobs} at a time, in {folder}")
    trained = dict(zip([(plan.name, seed) for plan, seed in keys], train_all(configs, jobs), strict=True))
    found: dict[str, list[dict[Served, float]]] = {plan.name: [] for plan in chosen}
    with progress("serving", len(configs)) as done:
        for count, ((plan, _), config) in enumerate(zip(keys, configs, strict=True), 1):
            model = Path(config.output.directory) / "model"
            found[plan.name].append(
                losses(model, plan, chosen, validation, streams_of(streams, tokenizer, scale), scale)
            )
            done(count)
    result = {
        "benchmark": "training",
        "scale": asdict(scale),
        "seeds": seeds,
        "shares": {plan.name: attended(plan.cache, plan.strided, taken, tokenizer, scale) for plan in chosen},
        **orders.report(found, trained, chosen, out),
    }
    print_json(result)


def prepare(text: str, scale: Scale, folder: Path) -> tuple[Path, Path, Path, Path]:
    """The files of text to train on, to validate on, to stream, and the tokenizer's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    start = int(len(text) * (1 - HELD_OUT))
    middle = start + scale.validation_samples * scale.length * 3  # characters; a token has some three
    parts = {"corpus": text[:start], "validation": text[start:middle], "streams": text[middle:]}
    paths = [folder / f"{name}.txt" for name in parts]
    for path, part in zip(paths, parts.values(), strict=True):
        path.write_text(part, encoding="utf-8")
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        train_tokenizer([parts["corpus"]], scale.vocab_size).save_pretrained(tokenizer)
    corpus, validation, streams = paths
    return corpus, validation, streams, tokenizer
