"""Does control over the output cost speed, or change a token? Every control with lookahead on and off; JSON schemas
with the source `grammar` and without; and what a sampled row costs.

    python -m benchmarks.control --limit 4 --max-new-tokens 96
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import numpy as np
import torch
import typer

from benchmarks.common import DEFAULT_PROMPTS, check_parts, load_prompts, print_json, print_table
from benchmarks.control.schemas import SCHEMAS
from cluster.client.backends import open_engine
from runtime.config import Config, LookaheadConfig, SamplingParams
from runtime.engine.engine import Engine
from runtime.mesh.mesh import Mesh
from runtime.model.native.build import available, library
from runtime.model.native.drawing import draw
from runtime.model.sampler import Ragged, Sampled
from runtime.request import Completion, FinishReason
from runtime.step import Row, Seq

PARTS = ("controls", "schemas", "rows")
CONTROLS: dict[str, dict[str, Any]] = {
    "none": {},
    "min_p": {"min_p": 0.05},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "presence, frequency": {"presence_penalty": 0.5, "frequency_penalty": 0.3},
    "logit_bias": {"logit_bias": {11: -2.0, 30: 1.0}},
    "min_new_tokens": {"min_new_tokens": 32},
    "stop": {"stop": ("\n\n", "###")},
    "logprobs": {"logprobs": 5},
    "json_object": {"json_object": True},
}
TEMPERATURES = (0.0, 0.7, 1.0)


@dataclass
class Total:
    """What some answers came to."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps


def answered(
    engine: Engine, prompts: Sequence[Any], sampling: Sequence[SamplingParams], lookahead: LookaheadConfig
) -> tuple[Total, list[Completion]]:
    """Each prompt alone, one after the other, with knowledge of their own."""
    engine.knowledge = engine.knowledge.fresh()
    total, answers = Total(), []
    for prompt, params in zip(prompts, sampling, strict=True):
        answer = engine.generate([prompt], params, lookahead)[0]
        answers.append(answer)
        total.tokens += answer.usage.num_new_tokens
        total.steps += answer.usage.num_steps
        total.seconds += answer.usage.latency_s - answer.usage.ttft_s
    return total, answers


def measure_controls(engine: Engine, prompts: list[list[int]], max_new_tokens: int) -> list[dict[str, Any]]:
    """Every control, greedy and sampled, with lookahead off and on."""
    found = []
    plain = engine.config.lookahead.merged({"enabled": False})
    for name, control in CONTROLS.items():
        for temperature in TEMPERATURES if name in ("none", "top_p") else TEMPERATURES[:2]:
            values = {"max_new_tokens": max_new_tokens, "temperature": temperature, **control}
            sampling = [SamplingParams(seed=seed, **values) for seed in range(len(prompts))]
            off, expected = answered(engine, prompts, sampling, plain)
            on, answers = answered(engine, prompts, sampling, engine.config.lookahead)
            found.append(
                {
                    "control": name,
                    "temperature": temperature,
                    "tokens_per_s_off": off.tokens_per_s,
                    "tokens_per_s_on": on.tokens_per_s,
                    "tokens_per_step": on.tokens_per_step,
                    "equal": [a.token_ids for a in answers] == [e.token_ids for e in expected],
                }
            )
    return found


def measure_schemas(engine: Engine, max_new_tokens: int) -> list[dict[str, Any]]:
    """The schemas with lookahead off, and on with the source `grammar` and without; the questions as free text."""
    lookahead = engine.config.lookahead
    others = tuple(source for source in lookahead.sources if source != "grammar")
    ways = {
        "off": lookahead.merged({"enabled": False}),
        "on, without grammar": lookahead.merged({"sources": others}),
        "on": lookahead.merged({"sources": (*others, "grammar")}),
    }
    questions = [[{"role": "user", "content": question}] for question, _ in SCHEMAS.values()]
    free = [SamplingParams(max_new_tokens=max_new_tokens)] * len(questions)
    bound = [SamplingParams(max_new_tokens=max_new_tokens, json_schema=json.dumps(s)) for _, s in SCHEMAS.values()]
    found, expected = [], None
    for name, way in ways.items():
        for kind, sampling in (("free", free), ("schema", bound)):
            total, answers = answered(engine, questions, sampling, way)
            line = {"text": kind, "lookahead": name, "ms_per_token": 1e3 / total.tokens_per_s}
            line["tokens_per_step"] = total.tokens_per_step
            if kind == "schema":
                whole = [answer.finish_reason is FinishReason.STOP for answer in answers]
                line["whole"] = sum(whole)
                line["valid"] = sum(map(is_valid, answers, [schema for _, schema in SCHEMAS.values()]))
                tokens = [answer.token_ids for answer in answers]
                expected = expected or tokens
                line["equal"] = tokens == expected
            found.append(line)
    return found


def is_valid(answer: Completion, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(answer.text), schema)
        return True
    except (ValueError, jsonschema.ValidationError):
        return False


def measure_rows(vocabulary: int, num_rows: int = 16, times: int = 20) -> list[dict[str, Any]]:
    """Processor milliseconds of the native sampling function on one core, per row; the fastest of some times."""
    if not available()[0]:
        return []
    kinds: dict[str, dict[Seq, float]] = {
        "temperature": {},
        "top_k": {Seq.TOP_K: 50},
        "top_p": {Seq.TOP_P: 0.9},
        "min_p": {Seq.MIN_P: 0.05},
        "penalties": {Seq.REPETITION: 1.1, Seq.FREQUENCY: 0.2},
        "all": {Seq.TOP_K: 50, Seq.TOP_P: 0.9, Seq.MIN_P: 0.01, Seq.REPETITION: 1.1},
    }
    logits = torch.randn(num_rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 2.5
    text = np.arange(0, 3000, 3, dtype=np.int32), np.ones(1000, np.int32)
    found = []
    for name, values in kinds.items():
        line = np.zeros(len(Seq), np.int32)
        for column, value in {Seq.TEMPERATURE: 1.0, Seq.TOP_P: 1.0, **values}.items():
            line[column] = value if column is Seq.TOP_K else np.float32(value).view(np.int32)
        rows = np.zeros((num_rows, len(Row)), np.int32)
        rows[:, Row.POSITION] = np.arange(num_rows)
        sampled = Sampled(np.arange(num_rows), rows, np.stack([line] * num_rows), Ragged.of([text] * num_rows))
        taken = []
        for _ in range(times):
            started = time.thread_time()
            draw(library(), logits, sampled, Mesh(), (0, vocabulary), 1)
            taken.append(time.thread_time() - started)
        found.append({"sampling": name, "ms_per_row": 1e3 * min(taken) / num_rows})
    return found


def main(
    prompts: Annotated[Path, typer.Option(help="JSON lines as `outrider batch` reads them.")] = DEFAULT_PROMPTS,
    limit: Annotated[int | None, typer.Option(help="First prompts only.")] = None,
    max_new_tokens: int = 96,
    part: Annotated[list[str], typer.Option(help=f"{', '.join(PARTS)}; all by default.")] = list(PARTS),  # noqa: B006
    config: Annotated[Path | None, typer.Option(help="Run config, YAML.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="key.path=value")] = [],  # noqa: B006
) -> None:
    """Measure; exit 1 if lookahead changed a token, or a whole answer is not of its schema."""
    check_parts(part, PARTS)
    results: dict[str, list[dict[str, Any]]] = {}
    with open_engine(Config.load(config, set_)) as engine:
        if "controls" in part:
            ids = [tokens for _, tokens in load_prompts(engine, prompts, limit)]
            results["controls"] = measure_controls(engine, ids, max_new_tokens)
        if "schemas" in part:
            results["schemas"] = measure_schemas(engine, max_new_tokens)
        if "rows" in part:
            results["rows"] = measure_rows(engine.spec.vocab_size)
    for name, lines in results.items():
        if lines:
            heads = list(dict.fromkeys(key for line in lines for key in line))
            print_table(name, heads, [[shown(line.get(head, "")) for head in heads] for line in lines])
    every = [line for lines in results.values() for line in lines]
    fine = all(line.get("equal", True) and line.get("valid", 0) == line.get("whole", 0) for line in every)
    print_json({"benchmark": "control", "fine": fine, **results})
    raise typer.Exit(0 if fine else 1)


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
