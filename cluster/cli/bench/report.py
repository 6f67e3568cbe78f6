"""What people see of a load test: one table, a column for each load, and a plot of a sweep."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.cli.bench.figures import METRICS, Figures, Spread
from runtime.errors import ConfigError

NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return " / ".join(f"{value:.{1 if value < 100 else 0}f}" for value in (spread.mean, spread.median, spread.p99))


def _errors(figures: Figures) -> str:
    return ", ".join(f"{number} x {kind}" for kind, number in figures.errors.items()) or "none"


LINES: dict[str, Callable[[Figures], str]] = {
    "answered": lambda f: f"{f.num_answered} of {f.num_requests}",
    "errors": _errors,
    "seconds": lambda f: f"{f.seconds:.2f}",
    "prompt tokens": lambda f: f"{f.num_prompt_tokens / max(f.num_answered, 1):.0f} each",
    "new tokens": lambda f: f"{f.num_new_tokens / max(f.num_answered, 1):.0f} each",
    "requests/s": lambda f: f"{f.requests_per_s:.2f}",
    "new tokens/s": lambda f: f"{f.tokens_per_s:.1f}",
    "all tokens/s": lambda f: f"{f.total_tokens_per_s:.1f}",
    "tokens per chunk": lambda f: f"{f.tokens_per_chunk:.2f}",
}


def show(found: Sequence[Figures], url: str) -> None:
    """Print the table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", title=url, title_justify="left")
    for figures in found:
        table.add_column(figures.load, justify="right")
    for name, cell in LINES.items():
        table.add_row(name, *map(cell, found))
    if any(figures.num_good is not None for figures in found):
        goodput = (f"{f.good_per_s or 0:.2f} ({(f.num_good or 0) / max(f.num_answered, 1):.0%})" for f in found)
        table.add_row("goodput, requests/s", *goodput)
    for metric in METRICS:
        table.add_row(f"{NAMES[metric]} ms", *(_spread(getattr(figures, metric)) for figures in found))
    table.caption = "milliseconds: mean / median / p99"
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else max(80, 30 + 26 * len(found))).print(table)


def check_plot(path: Path) -> None:
    """Raise ConfigError if a plot cannot be written there: before minutes of load, not behind them."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError("--plot", str(path), "is no .png, .svg or .pdf", "Give it such a name.")
    if not path.absolute().parent.is_dir():
        raise ConfigError("--plot", str(path), "its folder is not there", "Make it first.")


def plot(found: Sequence[Figures], path: Path, axis: str) -> None:
    """Write the sweep's throughput and latencies over its loads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, latency) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    paces = [figures.pace for figures in found]
    speed.plot(paces, [figures.tokens_per_s for figures in found], marker="o", label="new tokens/s")
    speed.set(xlabel=axis, ylabel="new tokens/s", title="Throughput", ylim=(0, None))
    for metric in ("ttft", "tpot", "itl"):
        for name, style in (("median", "-"), ("p99", ":")):
            points = [(f.pace, getattr(spread, name)) for f in found if (spread := getattr(f, metric)) is not None]
            colour = f"C{METRICS.index(metric)}"
            latency.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=f"{NAMES[metric]} {name}")
    latency.set(xlabel=axis, ylabel="milliseconds", title="Latency", yscale="log")
    latency.legend(frameon=False, fontsize="small")
    for each in (speed, latency):
        each.set_xscale("log", base=2)
        each.set_xticks(paces, [f"{pace:g}" for pace in paces])
        each.minorticks_off()
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
