"""The roofline beside published figures: which it matches, within what, and why it does not where it does not.

python -m benchmarks.roofline --overhead FILE     # the host's part as `python -m benchmarks.overhead` measured it
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.roofline.host import HostPath
from benchmarks.roofline.roofline import DEVICES, EAGER, GRAPH, MODELS, TRANSPORT, Software, step_seconds

GPT_FAST = "gpt-fast README, 8 x A100 80 GB limited to 330 W, batch 1, 5-token prompts, torch.compile"
SGLANG = "SGLang's documentation of EAGLE-3: 158 tokens/s plain, 373 with it, MT-bench, Llama-3.1-8B on one H100"
LOOKAHEAD = "Fu et al. 2024, arXiv 2402.02057"
LOOKAHEAD_README = "README of hao-ai-lab/LookaheadDecoding"
HF_CONTEXT, GPT_FAST_CONTEXT = 512, 100
"""Cached tokens assumed: a chat turn's middle; the middle of 200 new tokens after a prompt of 5."""
PAPER_ROWS = 1 + 14 + 3 * 15 + 4 * 15
"""Rows of W=15, N=5, G=15: current token and window row 0 (15), three more window rows, 15 tails of 4 tokens."""


@dataclass(frozen=True)
class Check:
    """One published figure, or range of figures, and what the constants give."""

    name: str
    unit: str
    published: tuple[float, float]
    """Lowest and highest; the same where one figure was published."""
    projected: float
    source: str
    note: str = ""

    @property
    def error(self) -> float:
        """Relative distance of the projection from the published range; 0 inside it, above 0 is too fast."""
        low, high = self.published
        if low <= self.projected <= high:
            return 0.0
        return self.projected / (high if self.projected > high else low) - 1

    @property
    def verdict(self) -> str:
        if self.error == 0:
            return "inside"
        return f"{self.error:+.0%}"


def tokens_per_s(model: str, tp: int, software: Software, context: float) -> float:
    """Plain decoding on A100s, without our control plane: neither source has one."""
    step = step_seconds(DEVICES["a100"], MODELS[model], 1, context, tp, software=software)
    return 1 / (step.total - step.broadcast - step.gather)


def plain_ms(device: str, model: str, context: float) -> float:
    """Milliseconds per token of plain decoding, without our host: the engines compared have their own."""
    return 1000 * step_seconds(DEVICES[device], MODELS[model], 1, context).total


def kept_speed(software: Software, lp: int = 1, rows: float = PAPER_ROWS) -> float:
    """Of S, the share that becomes speed: a plain step's time over a lookahead step's, Llama-2-7B on A100s."""
    a100, model = DEVICES["a100"], MODELS["llama-2-7b"]
    plain = step_seconds(a100, model, 1, HF_CONTEXT, software=software)
    ahead = step_seconds(a100, model, rows, HF_CONTEXT, lp=lp, commit_rows=1.0, software=software)
    return plain.total / ahead.total


def checks() -> list[Check]:
    """Figures that the constants can be held against."""
    published = {
        ("llama-2-7b", 1): 104.9,
        ("llama-2-7b", 2): 168.84,
        ("llama-2-7b", 4): 254.02,
        ("llama-2-7b", 8): 328.43,
        ("llama-2-70b", 2): 21.32,
        ("llama-2-70b", 4): 38.01,
        ("llama-2-70b", 8): 62.50,
    }
    found = [
        Check(
            f"{model} plain, captured graph, tp={tp}",
            "tokens/s",
            (figure, figure),
            tokens_per_s(model, tp, GRAPH, GPT_FAST_CONTEXT),
            GPT_FAST,
        )
        for (model, tp), figure in published.items()
    ]
    found.append(
        Check(
            "llama-3.1-8b plain, SGLang, one H100",
            "tokens/s",
            (158.3, 158.3),
            1000 / plain_ms("h100", "llama-3-8b", HF_CONTEXT),
            SGLANG,
            "6.3 ms per token; vLLM in the same comparison: 7.5",
        )
    )
    device, model = DEVICES["a100"], MODELS["llama-2-7b"]
    weights = model.num_layers * model.layer_weights + model.head_weights
    found += [
        Check(
            "llama-2-7b, weights at the data sheet's bandwidth",
            "tokens/s",
            (150, 155),
            device.memory_bandwidth / (2 * weights),
            "arithmetic: the usual memory roofline of about 150",
        ),
        Check(
            "llama-2-7b plain, eager transformers",
            "tokens/s",
            (30, 45),
            tokens_per_s("llama-2-7b", 1, EAGER, HF_CONTEXT),
            "commonly reported for fp16 on one A100, versions differ",
            "33 launches a layer at 20 us: the host, not the GPU, sets the pace",
        ),
    ]
    return found


@dataclass(frozen=True)
class Implied:
    """A published speedup, and the S that it takes by the projected step times. Not a test of the constants: S was not
    published beside it."""

    name: str
    speedup: tuple[float, float]
    kept: float
    """Share of S that becomes speed."""
    software: str
    source: str

    @property
    def tokens_per_step(self) -> tuple[float, float]:
        return self.speedup[0] / self.kept, self.speedup[1] / self.kept


def implied() -> list[Implied]:
    """Fu et al.'s speedups, on one A100 and on eight with lookahead parallelism, whose rows per GPU stay the same."""
    cases = (
        ("1 GPU, several datasets", (1.5, 2.3), 1, LOOKAHEAD_README),
        ("1 GPU, MT-bench", (1.90, 1.90), 1, LOOKAHEAD),
        ("8 GPUs (LP), MT-bench", (2.05, 2.05), 8, LOOKAHEAD),
        ("1 GPU, code", (2.7, 2.7), 1, LOOKAHEAD),
        ("8 GPUs (LP), code", (3.9, 3.9), 8, LOOKAHEAD),
    )
    return [
        Implied(name, speedup, kept_speed(software, lp), software.name, source)
        for name, speedup, lp, source in cases
        for software in (EAGER, GRAPH)
    ]


MEASURED_S = ((16.0, 2.47, "the planner"), (128.0, 3.76, "suffix, recycle"))
"""(rows, tokens per step, sources): ours, of a model of 135 million parameters on Spec-Bench (docs/benchmarks.md)."""


@dataclass(frozen=True)
class Beside:
    """Ours, projected, beside what an engine publishes for the same work: Llama-3.1-8B, one H100, one request."""

    sources: str
    rows: float
    tokens_per_step: float
    """Measured, with another model: an assumption."""
    ms: float
    """Per token."""
    host_ms: float | None
    """Of the step, as measured; None: not counted."""


def beside(host: HostPath | None) -> list[Beside]:
    """Plain first."""
    found = []
    for rows, tokens, sources in ((1.0, 1.0, "plain"), *MEASURED_S):
        step = step_seconds(DEVICES["h100"], MODELS["llama-3-8b"], rows, HF_CONTEXT, host=host)
        host_ms = 1000 * step.host if host is not None else None
        found.append(Beside(sources, rows, tokens, 1000 * step.total / tokens, host_ms))
    return found


def main(
    overhead: Annotated[Path | None, typer.Option(help="What `python -m benchmarks.overhead` printed.")] = None,
) -> None:
    """Print constants and checks, then one JSON line."""
    host = HostPath.load(overhead) if overhead is not None else None
    print("constants (units and sources: benchmarks/roofline.py)")
    for constants in (*DEVICES.values(), GRAPH, EAGER, TRANSPORT):
        print("  " + ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                               for name, value in asdict(constants).items()))  # fmt: skip
    print("\npublished against projected")
    found = checks()
    for check in found:
        figure = " to ".join(f"{value:g}" for value in dict.fromkeys(check.published))
        shown = f"{figure:>10} {check.unit}, projected {check.projected:6.1f}  {check.verdict:>6}"
        print(f"  {check.name:50} {shown}  [{check.source}]{' ' + check.note if check.note else ''}")
    print(
        "  Differences are as they come. The reached bandwidth is gpt-fast's own observation, and the time per kernel\n"
        "  was chosen with its figures in view, so its rows test the model's form (tp, model size) more than the\n"
        "  constants. Its cards were limited to 330 W; its all-reduce and NVLink mesh are not those assumed here."
    )
    print(f"\nS that published lookahead speedups imply ({PAPER_ROWS} rows per GPU; S was not published with them)")
    speedups = implied()
    for case in speedups:
        low, high = case.tokens_per_step
        shown = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
        print(f"  {case.name:36} {case.software:20} keeps {case.kept:4.0%} of S, so S = {shown}")
    print(
        "  In eager transformers the host's launches hide the extra rows, so speedup is nearly S; a captured graph\n"
        "  has no such slack, and pays for them. LP's control plane costs a larger share of the faster step."
    )
    print(
        "\nLlama-3.1-8B on one H100, ms per token: SGLang 6.3 plain, 2.7 with a trained EAGLE-3 head; projected for us"
    )
    ours = beside(host)
    for case in ours:
        shown = "not counted" if case.host_ms is None else f"{case.host_ms:.2f} ms of the step"
        print(
            f"  {case.sources:16} {case.rows:4.0f} rows, S {case.tokens_per_step:.2f}: {case.ms:5.2f}   host: {shown}"
        )
    if host is None:
        print("  Without --overhead the host's part is not counted, which flatters us.")
    else:
        print(f"  The host's part is from {host.source}: of that machine, not of one with an H100.")
    print("  S was measured with a model of 135 million parameters; that an 8B model's is the same is an assumption.")
    print(json.dumps({
        "benchmark": "roofline",
        "kind": "projected",
        "checks": [asdict(check) | {"error": check.error} for check in found],
        "beside": [asdict(case) for case in ours],
        "implied": [asdict(case) | {"tokens_per_step": case.tokens_per_step} for case in speedups],
    }))  # fmt: skip
