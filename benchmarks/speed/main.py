"""Speed of one request at a time: lookahead beside lookahead off, Hugging Face, its prompt lookup, llama.cpp.

All methods answer every prompt in turn within one run, the order rotating from prompt to prompt, and
ratios are taken prompt by prompt: machines drift, pairs do not. Outputs are compared token for token; those of other
engines and other dtypes may differ by rounding, which is told but is no error. In the same turns a large array is read
with the same threads: weights' bytes over that speed is the floor of a plain step. What lookahead learns stays with the
method that learned it: it goes from prompt to prompt, not from method to method.

    python -m benchmarks.speed --limit 6 --try W15=window_size:15,ngram_size:5 --llama-cpp --plot out/speed.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from benchmarks.common import (
    DEFAULT_PROMPTS,
    NEAR_TIE,
    HuggingFace,
    Run,
    load_prompts,
    parse_try,
    read_bandwidth,
    stderr,
)
from benchmarks.costs import Shape
from benchmarks.speed.peers import LlamaCpp, hugging_face_dtypes, load_hugging_face
from benchmarks.speed.report import BASELINE, PHASES, Floor, Method, report
from cluster.client.backends import open_engine
from runtime.config import Config, LookaheadConfig, SamplingParams
from runtime.engine.engine import Engine
from runtime.equality import Equality, Gap


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
    hugging_face_dtype: Annotated[str, typer.Option(help="auto (both), float32 or bfloat16.")] = "auto",
    llama_cpp: Annotated[bool, typer.Option(help="Measure llama.cpp too, bfloat16 (benchmarks/peers.py).")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart to this PNG.")] = None,
) -> None:
    """Compare decoding speed, method by method."""
    run_config = Config.load(config, set_)
    dtypes = hugging_face_dtypes(hugging_face_dtype)
    if threads:
        torch.set_num_threads(threads)
    with open_engine(run_config) as engine:
        if engine.cost.curve.provisional:
            engine.measure_cost()
        methods = outrider_methods(engine, max_new_tokens, try_)
        records = load_prompts(engine, prompts, limit)
        references = load_hugging_face(run_config.model, dtypes if hugging_face else ())
        if hugging_face:
            methods += hugging_face_methods({dtype: references[dtype] for dtype in dtypes}, max_new_tokens)
        if llama_cpp:
            context = max(len(ids) for _, ids in records) + max_new_tokens
            peer = LlamaCpp(run_config.model, torch.get_num_threads(), context, engine.spec.eos_token_ids)
            methods.append(Method("llama.cpp bfloat16", lambda ids: peer.run(ids, max_new_tokens), peer=True))
        for method in methods:
            method.run(range(100, 132))  # warm up, on no text that is measured
        speeds = measure(engine, methods, [ids for _, ids in records])
        dtype = run_dtype(engine)
        shape = Shape.of("model", engine.spec)
        config_used = engine.config
    matrices = shape.num_layers * shape.layer_weights + shape.head_weights
    floor = Floor(median(speeds), matrices * getattr(torch, dtype).itemsize, plain_step_seconds(methods[0]))
    equalities = compare(methods, [ids for _, ids in records], references["float32"].gap_of, dtype)
    report(methods, equalities, config_used, dtype, floor, len(records), max_new_tokens, plot)


def run_dtype(engine: Engine) -> str:
    """The dtype that the engine computes in, "auto" resolved."""
    configured = engine.config.model.dtype
    found = getattr(engine, "dtype", configured) if configured == "auto" else configured
    return str(found).removeprefix("torch.")


def outrider_methods(engine: Engine, max_new_tokens: int, tries: Sequence[str]) -> list[Method]:
    """Lookahead off, as configured, and every `--try`, each with knowledge of its own.

    All methods answer the same prompts: with the same tables the second would find the first one's answer there.
    """
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    configured = engine.config.lookahead.merged({"enabled": True})
    settings = {BASELINE: configured.merged({"enabled": False}), "lookahead": configured}
    for text in tries:
        name, values = parse_try(text)
        settings[name] = configured.merged(values, "--try ")

    def method(name: str, lookahead: LookaheadConfig) -> Method:
        knowledge = engine.knowledge.fresh()

        def run(prompt: Sequence[int]) -> Run:
            engine.knowledge = knowledge
            completion = engine.generate([prompt], sampling, lookahead)[0]
            return Run(completion.token_ids, completion.usage.latency_s, completion)

        return Method(name, run)

    return [method(name, lookahead) for name, lookahead in settings.items()]


def hugging_face_methods(models: Mapping[str, HuggingFace], max_new_tokens: int) -> list[Method]:
    def method(name: str, model: HuggingFace, **options: Any) -> Method:
        return Method(name, lambda ids: model.run(ids, max_new_tokens, **options), peer=True)

    plain = [method(f"Hugging Face {dtype}", model) for dtype, model in models.items()]
    lookup = [
        method(f"HF prompt lookup {dtype}", model, prompt_lookup_num_tokens=10) for dtype, model in models.items()
    ]
    return plain + lookup


def measure(engine: Engine, methods: Sequence[Method], prompts: Sequence[list[int]]) -> list[float]:
    """Every method on every prompt, a different one first each time; returns memory's speed beside each prompt."""
    bandwidth, speeds = read_bandwidth(), []
    for number, ids in enumerate(track(prompts, "prompts", console=stderr)):
        first = number % len(methods)
        speeds.append(bandwidth())
        for method in (*methods[first:], *methods[:first]):
            steps, seconds = engine.stats.num_steps, dict(engine.stats.seconds)
            method.runs.append(method.run(ids))
            method.num_steps += engine.stats.num_steps - steps
            for phase in PHASES:
                method.phase_seconds[phase] += engine.stats.seconds[phase] - seconds[phase]
    return speeds


def plain_step_seconds(baseline: Method) -> float:
    """Seconds per decoding step, the prompt's left out; nan where answers have one token."""
    usages = [run.completion.usage for run in baseline.runs if run.completion]
    steps = [(u.latency_s - u.ttft_s) / (u.num_steps - 1) for u in usages if u.num_steps > 1]
    return median(steps) if steps else float("nan")


def compare(methods: Sequence[Method], prompts: Sequence[list[int]], gap_of: Gap, dtype: str) -> dict[str, Equality]:
    """Each method's outputs against those with lookahead off."""
    equalities = {}
    for method in methods:
        equality = Equality(gap_of, tolerance=NEAR_TIE[dtype])
        for ids, plain, run in zip(prompts, methods[0].runs, method.runs, strict=True):
            equality.compare(ids, plain.token_ids, run.token_ids)
        equalities[method.name] = equality
    return equalities
