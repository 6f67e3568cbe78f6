"""Promise 1, checked: lookahead on and off give the same tokens on every mesh, and those of Hugging Face.

Every prompt is answered with lookahead off on one worker; that answer is compared with lookahead off and
on, on every mesh asked for, alone and all prompts in company, and with Hugging Face's greedy generate.
Where two answers part, the Hugging Face model tells the gap of the two tokens' logits. Under another cache policy
than full (`--set cache.policy=sink`), which Hugging Face does not have, one process of ours takes its place.

    python -m benchmarks.lossless --shapes 1x1,2x1,4x1,1x2,1x3,2x2,8x1
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.common import DEFAULT_PROMPTS, HuggingFace, load_prompts, parse_try, print_json, print_table, stderr
from cluster.client.backends import open_engine
from runtime.config import Config, LookaheadConfig, SamplingParams
from runtime.engine.engine import Engine
from runtime.engine.scoring import Scorer
from runtime.equality import Equality, Gap
from runtime.model.directory import resolve_model

BETWEEN_RUNS, AGAINST_HUGGING_FACE = 1e-4, 1e-3
"""Largest gap that counts as a near-tie, float32."""


def main(
    prompts: Annotated[Path, typer.Option(help="JSON lines as `outrider batch` reads them.")] = DEFAULT_PROMPTS,
    limit: Annotated[int | None, typer.Option(help="First prompts only.")] = None,
    max_new_tokens: int = 128,
    shapes: Annotated[str, typer.Option(help="Meshes, LPxTP, comma-separated.")] = "1x1,2x1,4x1,1x2,1x3,2x2,8x1",
    try_: Annotated[
        list[str],
        typer.Option("--try", help="One more lookahead setting: NAME=key:value,key:value (sources: a+b)."),
    ] = [],  # noqa: B006
    config: Annotated[Path | None, typer.Option(help="Run config, YAML.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="key.path=value")] = [],  # noqa: B006
) -> None:
    """Count divergences; exit 1 if one is not a near-tie."""
    run_config = Config.load(config, set_)
    reference = None
    if run_config.cache.policy == "full":
        reference = HuggingFace(resolve_model(run_config.model.path), run_config.model.dtype, "cpu")
    gap_of = reference.gap_of if reference else gap_under(run_config)
    greedy = SamplingParams(max_new_tokens=max_new_tokens)
    plain = run_config.lookahead.merged({"enabled": False})
    tried = {name: run_config.lookahead.merged(values, "--try ") for name, values in map(parse_try, try_)}
    with open_engine(run_config.merged({"parallel": {}})) as engine:
        ids = [tokens for _, tokens in load_prompts(engine, prompts, limit)]
        expected = [engine.generate([prompt], greedy, plain)[0].token_ids for prompt in ids]
    checks: dict[str, Equality] = {}

    def check(name: str, answers: list[tuple[int, ...]], tolerance: float = BETWEEN_RUNS) -> None:
        equality = checks[name] = Equality(gap_of, tolerance)
        for number, (prompt, one, other) in enumerate(zip(ids, expected, answers, strict=True)):
            equality.compare(prompt, one, other, f"prompt {number}")
        stderr.print(f"{name}: {equality}")

    if reference:  # which knows no other policy
        check("Hugging Face", [reference.run(p, max_new_tokens).token_ids for p in ids], AGAINST_HUGGING_FACE)
    for shape in shapes.split(","):
        lp, tp = (int(number) for number in shape.split("x"))
        started = time.perf_counter()
        with open_engine(run_config.merged({"parallel": {"lp": lp, "tp": tp}})) as engine:
            stderr.print(f"lp={lp} tp={tp}: up after {time.perf_counter() - started:.0f} s")
            for name, lookahead in {"off": plain, "on": run_config.lookahead, **tried}.items():
                check(f"lp={lp} tp={tp} {name}", answers(engine, ids, greedy, lookahead, together=False))
            check(f"lp={lp} tp={tp} on, in company", answers(engine, ids, greedy, run_config.lookahead, together=True))
    report(checks)


def gap_under(config: Config) -> Gap:
    """Gaps by our own model, one process, under the config's cache policy."""
    scorer = Scorer(config)

    def gap_of(context: Sequence[int], one: int, other: int) -> float:
        return abs(float(np.subtract(*(scorer.score([*context, token]).log_probs[-1] for token in (one, other)))))

    return gap_of


def answers(
    engine: Engine, ids: list[list[int]], sampling: SamplingParams, lookahead: LookaheadConfig, *, together: bool
) -> list[tuple[int, ...]]:
    groups = [ids] if together else [[prompt] for prompt in ids]
    return [answer.token_ids for group in groups for answer in engine.generate(group, sampling, lookahead)]


def report(checks: dict[str, Equality]) -> None:
    rows, results = [], []
    for name, equality in checks.items():
        gaps = [divergence.gap for divergence in equality.divergences]
        rows.append([name, str(equality.num_tokens), str(len(gaps)), ", ".join(f"{gap:.1e}" for gap in gaps) or "-"])
        results.append({"run": name, "num_tokens": equality.num_tokens, "gaps": gaps, "lossless": equality.lossless})
    print_table("against one worker, lookahead off", ["run", "tokens alike", "divergences", "logit gaps"], rows)
    lossless = all(equality.lossless for equality in checks.values())
    print_json({"benchmark": "lossless", "lossless": lossless, "runs": results})
    raise typer.Exit(0 if lossless else 1)


if __name__ == "__main__":
    typer.run(main)
