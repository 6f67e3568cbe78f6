"""What the speed benchmark measured, as tables, a bar chart and one JSON line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import Run, print_json, print_table
from runtime.config import Config
from runtime.equality import Equality

BASELINE = "lookahead off"
PHASES = ("plan", "broadcast", "forward", "gather", "verify")


@dataclass
class Method:
    """A way to answer a prompt, and what it took so far."""

    name: str
    run: Callable[[Sequence[int]], Run]
    peer: bool = False
    """Another engine: its rounding is not ours."""
    runs: list[Run] = field(default_factory=list)
    phase_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_steps: int = 0


@dataclass(frozen=True)
class Floor:
    """What memory alone allows, measured beside the methods."""

    bandwidth: float
    """Bytes per second, median over the prompts."""
    weight_bytes: float
    """Of all matrices that a step reads, in the run's dtype."""
    plain_step_s: float
    """Decoding step of the baseline, the prompt's left out; median over the prompts."""

    @property
    def seconds(self) -> float:
        return self.weight_bytes / self.bandwidth

    @property
    def ratio(self) -> float:
        """How many times the floor a plain step takes."""
        return self.plain_step_s / self.seconds


def report(
    methods: Sequence[Method],
    equalities: dict[str, Equality],
    config: Config,
    dtype: str,
    floor: Floor,
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
        decoding_s = sum(usage.latency_s - usage.ttft_s for usage in usages)
        decoding = sum(usage.num_new_tokens - 1 for usage in usages) / decoding_s if decoding_s else None
        equality = equalities[method.name]
        same = "-" if method is plain else verdict(equality, method.peer)
        shown = [f"{value:.2f}" if value else "-" for value in (decoding, tokens_per_step, rows_per_step)]
        rows.append([method.name, f"{speed:.2f}", f"{ratio:.2f}", *shown, same])
        result: dict[str, Any] = {
            "method": method.name,
            "tokens_per_s": speed,
            "speedup_over_lookahead_off": ratio,
            "decoding_tokens_per_s": decoding,
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
    title = f"{num_prompts} prompts, up to {max_new_tokens} new tokens, {dtype}, {mesh} (medians)"
    columns = ["method", "tokens/s", f"x {BASELINE}", "past the first", "tokens/step", "rows/step", "same tokens"]
    print_table(title, columns, rows)
    print_table("where a step's time goes, ms", ["method", *PHASES, "step", "overhead"], breakdown)
    print_floor(floor, dtype)
    if plot:
        draw(rows, title, plot)
    memory = {
        "read_gb_per_s": floor.bandwidth / 1e9,
        "weight_bytes": floor.weight_bytes,
        "floor_ms": 1e3 * floor.seconds,
        "plain_step_ms": 1e3 * floor.plain_step_s,
        "plain_step_over_floor": floor.ratio,
    }
    settings = config.model_dump(mode="json")
    print_json({"benchmark": "speed", "config": settings, "dtype": dtype, "memory": memory, "methods": results})


def print_floor(floor: Floor, dtype: str) -> None:
    shown = [
        f"{floor.bandwidth / 1e9:.1f}",
        f"{floor.weight_bytes / 1e6:.0f}",
        f"{1e3 * floor.seconds:.1f}",
        f"{1e3 * floor.plain_step_s:.1f}",
        f"{floor.ratio:.2f}",
    ]
    columns = ["read, GB/s", f"weights, MB of {dtype}", "floor, ms", f"{BASELINE}, ms per step", "ratio"]
    print_table("memory's floor, read with the same threads in the same turns", columns, [shown])


def verdict(equality: Equality, peer: bool) -> str:
    """Whether the tokens are those of the baseline; another engine's may part from them."""
    if not equality.divergences:
        return "yes"
    gaps = ", ".join(f"{divergence.gap:.0e}" for divergence in equality.divergences)
    if peer:
        return f"first {equality.num_tokens} (gaps {gaps})"
    return f"{'near-ties' if equality.lossless else 'NO'} ({gaps})"


def draw(rows: Sequence[Sequence[str]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, speeds = [row[0] for row in rows], [float(row[1]) for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(rows) + 1.2), layout="constrained")
    colours = ["tab:grey" if name.startswith(("H", "llama", BASELINE)) else "tab:blue" for name in names]
    axes.bar_label(axes.barh(names[::-1], speeds[::-1], color=colours[::-1]), fmt=" %.1f")
    axes.set(xlabel="tokens/s", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
