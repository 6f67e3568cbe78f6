"""What the benchmarks share: prompts, cache policies, the Hugging Face baseline, progress, tables and plots for people,
one JSON line for machines."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cluster.cli.batch import parse, read_lines
from runtime.config import CacheConfig, LookaheadConfig
from runtime.engine.engine import Engine
from runtime.equality import Gap, gap_by
from runtime.request import Completion

DEFAULT_PROMPTS = Path(__file__).parent / "prompts.jsonl"
stderr = Console(stderr=True)


def load_prompts(engine: Engine, source: Path, limit: int | None) -> list[tuple[str, list[int]]]:
    """(id, token ids) of the records in a file that `outrider batch` would read."""
    records = [parse(line, number) for number, line in enumerate(read_lines(source, limit), 1)]
    return [(str(record.id), list(engine.make_request(record.prompt).prompt_ids)) for record in records]


@dataclass(frozen=True)
class Run:
    """One method's answer to one prompt."""

    token_ids: tuple[int, ...]
    seconds: float
    completion: Completion | None = None
    """Outrider's own account; None for the baselines."""

    @property
    def tokens_per_s(self) -> float:
        """Prompt processing included."""
        return len(self.token_ids) / self.seconds


class HuggingFace:
    """transformers' own `generate` on the same weights, dtype and device, greedy."""

    def __init__(self, directory: Path, dtype: str, device: str) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
        self.model = model.to(device)
        self.gap_of: Gap = gap_by(self.model)

    @torch.inference_mode()
    def run(self, prompt: Sequence[int], max_new_tokens: int, **options: Any) -> Run:
        ids = torch.tensor([list(prompt)], device=self.model.device)
        started = time.perf_counter()
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        tokens = output[0, len(prompt) :].tolist()
        return Run(tuple(tokens), time.perf_counter() - started)


def parse_try(text: str) -> tuple[str, dict[str, Any]]:
    """NAME and the settings of NAME=key:value,key:value, for any key of `lookahead`; lists are written a+b.

    Raises BadParameter; what the keys and values mean is checked where they are merged.
    """
    name, _, pairs = text.partition("=")
    values: dict[str, Any] = {}
    for pair in filter(None, pairs.split(",")):
        key, colon, value = pair.partition(":")
        if not colon:
            raise typer.BadParameter(f"{pair}: write key:value.", param_hint="--try")
        key, value = key.strip(), value.strip()
        field_ = LookaheadConfig.model_fields.get(key)
        is_list = field_ is not None and str(field_.annotation).startswith("tuple")
        values[key] = value.split("+") if is_list else yaml.safe_load(value)
    if not name or not values:
        raise typer.BadParameter(f"{text}: write NAME=key:value,key:value.", param_hint="--try")
    return name, values


def check_parts(chosen: Collection[str], known: Sequence[str]) -> None:
    """Refuse a `--part` that a benchmark does not have."""
    if unknown := set(chosen) - set(known):
        problem = f"{', '.join(sorted(unknown))}: no such part; choose among {', '.join(known)}."
        raise typer.BadParameter(problem, param_hint="--part")


def sink(size: int, num_sinks: int = 4, positions: str = "slot") -> CacheConfig:
    """`sink` whose sinks and window together hold `size` tokens."""
    return _cache(policy="sink", num_sinks=num_sinks, window=size - num_sinks, positions=positions)


def full(length: int) -> CacheConfig:
    """`full` for texts of `length` tokens, the trained length notwithstanding."""
    return _cache(policy="full", capacity=length, beyond_trained=True)


def sep(length: int, num_neighbors: int = 256) -> CacheConfig:
    """`sep`, fundamental design, for texts of `length` tokens."""
    return _cache(policy="sep", num_neighbors=num_neighbors, capacity=length, beyond_trained=True)


def sep_streaming(size: int) -> CacheConfig:
    """`sep`, streaming design, of capacity `size`: few separators, and a compaction every size / 16 tokens."""
    separators = size // 64
    local = size - 4 - separators - size // 16
    return _cache(policy="sep", design="streaming", max_separators=separators, local=local, capacity=size)


def sep_streaming_as_published(size: int) -> CacheConfig:
    """`sep`, streaming design, with the shares of the paper's s=64, w=256, c=800: one compaction per c / 2 tokens."""
    share = size / 800
    settings = {"max_separators": int(64 * share), "local": int(256 * share), "capacity": size}
    return _cache(policy="sep", design="streaming", **settings)


def _cache(**settings: Any) -> CacheConfig:
    return CacheConfig.model_validate(settings)


def perplexity(log_probs: np.ndarray) -> float:
    """exp of the mean negative log-probability; nan where there is none."""
    return math.exp(-log_probs.mean()) if log_probs.size else math.nan


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The mean and its standard error, which is nan for a single value."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)


NEAR_TIE = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.03}
"""By dtype, the largest gap of two logits, told in float32, that counts as a near-tie. Those of the half types are two
units in the last place of a logit between 16 and 32."""


def read_bandwidth(num_bytes: int = 1 << 28, num_reads: int = 3, device: str = "cpu") -> Callable[[], float]:
    """A function that reads a large array with this process's torch threads and gives the best of `num_reads` speeds,
    in bytes per second. One array serves all its calls."""
    array = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)

    def measure() -> float:
        best = math.inf
        for _ in range(num_reads):
            started = time.perf_counter()
            float(array.sum())
            best = min(best, time.perf_counter() - started)
        return num_bytes / best

    return measure


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; the function it gives sets how much is done."""
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)


Line = tuple[Sequence[float], Sequence[float]]


def plot_lines(
    path: Path,
    title: str,
    labels: tuple[str, str],
    lines: Mapping[str, Line],
    styles: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> None:
    """Write named lines (xs, ys) to a PNG; `labels` are the axes', `styles` and `settings` matplotlib's own for some of
    the lines and for the axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plot = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, (xs, ys) in lines.items():
        plot.plot(xs, ys, **{"marker": ".", "label": name, **(styles or {}).get(name, {})})
    plot.set(xlabel=labels[0], ylabel=labels[1], title=title, **settings)
    plot.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    plot.spines[["top", "right"]].set_visible(False)
    if len(lines) > 6:
        figure.legend(frameon=False, fontsize="small", loc="outside right center")
    else:
        plot.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(table)


def print_json(result: dict[str, Any]) -> None:
    """The last line of stdout."""
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    print(json.dumps({**result, "machine": machine, "torch": torch.__version__}), flush=True)
