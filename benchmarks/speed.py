"""Speed of one request at a time: lookahead beside lookahead off, Hugging Face generate and its prompt lookup.

All methods answer every prompt in turn within one run, the order rotating from prompt to prompt, and
ratios are taken prompt by prompt: machines drift, pairs do not. Outputs are compared token for token.

    python -m benchmarks.speed --limit 6 --try W15=window_size:15,ngram_size:5 --plot out/speed.png
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.progress import track

from benchmarks.common import DEFAULT_PROMPTS, HuggingFace, Run, load_prompts, print_json, print_table, stderr
from cluster.backends import open_engine
from runtime.config import Config, LookaheadConfig, SamplingParams
from runtime.engine import Engine
from runtime.equality import Equality
from runtime.model.loader import resolve_model

BASELINE = "lookahead off"
PHASES = ("plan", "broadcast", "forward", "gather", "verify")


@dataclass
class Method:
    """A way to answer a prompt, and what it took so far."""

    name: str
    run: Callable[[Sequence[int]], Run]
    runs: list[Run] = field(default_factory=list)
    phase_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_steps: int = 0


def main(
    prompts: Annotated[Path, typer.Option(help="JSON lines as `outrider batch` reads them.")] = DEFAULT_PROMPTS,
    limit: Annotated[int | None, typer.Option(help="First prompts only.")] = None,
    max_new_tokens: int = 128,
    config: Annotated[Path | None, typer.Option(help="Run config, YAML.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="key.path=value")] = [],  # noqa: B006
    try_: Annotated[
        list[str], typer.Option("--try", help="One more lookahead setting: NAME=key:value,key:value (sources: a+b).")
    ] = [],  # noqa: B006
    threads: Annotated[int | None, typer.Option(help="CPU threads of every method.")] = None,
    hugging_face: Annotated[bool, typer.Option(help="Measure transformers too.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart to this PNG.")] = None,
) -> None:
    """Compare decoding speed, method by method."""
    run_config = Config.load(config, set_)
    if threads:
        torch.set_num_threads(threads)
    with open_engine(run_config) as engine:
        methods = outrider_methods(engine, max_new_tokens, try_)
        device = "cuda" if run_config.model.device != "cpu" and torch.cuda.is_available() else "cpu"
        reference = HuggingFace(resolve_model(run_config.model.path), run_config.model.dtype, device)
        if hugging_face:
            methods += hugging_face_methods(reference, max_new_tokens)
        records = load_prompts(engine, prompts, limit)
        for method in methods:
            method.run(records[0][1][:32])  # warm up
        measure(engine, methods, [ids for _, ids in records])
    equalities = compare(methods, [ids for _, ids in records], reference)
    report(methods, equalities, run_config, len(records), max_new_tokens, plot)


def outrider_methods(engine: Engine, max_new_tokens: int, tries: Sequence[str]) -> list[Method]:
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    configured = engine.config.lookahead.merged({"enabled": True})
    settings = {BASELINE: configured.merged({"enabled": False}), "lookahead": configured}
    for text in tries:
        name, _, pairs = text.partition("=")
        values = {key: parse_value(key, value) for key, _, value in (pair.partition(":") for pair in pairs.split(","))}
        settings[name] = configured.merged(values, "--try ")

    def method(name: str, lookahead: LookaheadConfig) -> Method:
        def run(prompt: Sequence[int]) -> Run:
            completion = engine.generate([prompt], sampling, lookahead)[0]
            return Run(completion.token_ids, completion.usage.latency_s, completion)

        return Method(name, run)

    return [method(name, lookahead) for name, lookahead in settings.items()]


def parse_value(key: str, value: str) -> Any:
    return value.split("+") if key == "sources" else yaml.safe_load(value)


def hugging_face_methods(reference: HuggingFace, max_new_tokens: int) -> list[Method]:
    return [
        Method("Hugging Face", lambda ids: reference.run(ids, max_new_tokens)),
        Method("HF prompt lookup", lambda ids: reference.run(ids, max_new_tokens, prompt_lookup_num_tokens=10)),
    ]


def measure(engine: Engine, methods: Sequence[Method], prompts: Sequence[list[int]]) -> None:
    """Every method on every prompt; a different one goes first each time."""
    for number, ids in enumerate(track(prompts, "prompts", console=stderr)):
        first = number % len(methods)
        for method in (*methods[first:], *methods[:first]):
            steps, seconds = engine.stats.num_steps, dict(engine.stats.seconds)
            method.runs.append(method.run(ids))
            method.num_steps += engine.stats.num_steps - steps
            for phase in PHASES:
                method.phase_seconds[phase] += engine.stats.seconds[phase] - seconds[phase]


def compare(methods: Sequence[Method], prompts: Sequence[list[int]], reference: HuggingFace) -> dict[str, Equality]:
    """Each method's outputs against those with lookahead off."""
    equalities = {}
    for method in methods:
        equality = Equality(reference.gap_of, tolerance=1e-3 if method.runs[0].completion is None else 1e-4)
        for ids, plain, run in zip(prompts, methods[0].runs, method.runs, strict=True):
            equality.compare(ids, plain.token_ids, run.token_ids)
        equalities[method.name] = equality
    return equalities


def report(
    methods: Sequence[Method],
    equalities: dict[str, Equality],
    config: Config,
    num_prompts: int,
    max_new_tokens: int,
    plot: Path | None,
) -> None:
    plain = methods[0]
    rows, breakdown, results = [], [], []
    for method in methods:
        speed = median(run.tokens_per_s for run in method.runs)
        ratio = median(run.tokens_per_s / base.tokens_per_s for run, base in zip(method.runs, plain.runs, strict=True))
        usages = [run.completion.usage for run in method.runs if run.completion]
        steps = sum(usage.num_steps for usage in usages)
        tokens_per_step = sum(usage.num_new_tokens for usage in usages) / steps if steps else None
        rows_per_step = sum(usage.num_rows for usage in usages) / steps if steps else None
        equality = equalities[method.name]
        same = "-" if method is plain else _verdict(equality)
        shown = [f"{value:.2f}" if value else "-" for value in (tokens_per_step, rows_per_step)]
        rows.append([method.name, f"{speed:.2f}", f"{ratio:.2f}", *shown, same])
        result: dict[str, Any] = {
            "method": method.name,
            "tokens_per_s": speed,
            "speedup_over_lookahead_off": ratio,
            "tokens_per_step": tokens_per_step,
            "rows_per_step": rows_per_step,
            "identical_tokens": equality.num_tokens,
            "divergence_gaps": [divergence.gap for divergence in equality.divergences],
        }
        if method.num_steps:
            per_step = {phase: 1e3 * method.phase_seconds[phase] / method.num_steps for phase in PHASES}
            total = sum(per_step.values())
            overhead = 1 - per_step["forward"] / total
            breakdown.append(
                [method.name, *(f"{per_step[phase]:.2f}" for phase in PHASES), f"{total:.2f}", f"{overhead:.1%}"]
            )
            result |= {"ms_per_step": per_step, "overhead": overhead}
        results.append(result)
    mesh = f"lp={config.parallel.lp} tp={config.parallel.tp}"
    title = f"{num_prompts} prompts, up to {max_new_tokens} new tokens, {config.model.dtype}, {mesh} (medians)"
    print_table(title, ["method", "tokens/s", f"x {BASELINE}", "tokens/step", "rows/step", "same tokens"], rows)
    print_table("where a step's time goes, ms", ["method", *PHASES, "step", "overhead"], breakdown)
    if plot:
        draw(rows, title, plot)
    print_json({"benchmark": "speed", "config": config.model_dump(mode="json"), "methods": results})


def _verdict(equality: Equality) -> str:
    if not equality.divergences:
        return "yes"
    gaps = ", ".join(f"{divergence.gap:.0e}" for divergence in equality.divergences)
    return f"{'near-ties' if equality.lossless else 'NO'} ({gaps})"


def draw(rows: Sequence[Sequence[str]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, speeds = [row[0] for row in rows], [float(row[1]) for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(rows) + 1.2), layout="constrained")
    colours = ["tab:grey" if name.startswith(("H", BASELINE)) else "tab:blue" for name in names]
    axes.bar_label(axes.barh(names[::-1], speeds[::-1], color=colours[::-1]), fmt=" %.1f")
    axes.set(xlabel="tokens/s", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
