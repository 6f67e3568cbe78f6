"""The scaling experiment's figures. What was not measured is called projected, and drawn apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Line, plot_lines
from benchmarks.scaling.cells import OFF
from benchmarks.scaling.fits import AcceptanceFit, LineFit

Figures = Mapping[str, Any]
"""A cell's record: scaling_run.summarise, or projection.project."""
Fits = dict[str, dict[str, LineFit | AcceptanceFit | None]]
"""By source set: "line" and "acceptance"."""


def fastest(records: Iterable[Figures]) -> Figures:
    return min(records, key=lambda record: record["ms_per_token"])


def method(record: Figures) -> str:
    return OFF if record["sources"] == OFF else f"{record['sources']} {record['budget']}"


def draw_growth(figures: Sequence[Figures], fits: Fits, path: Path) -> None:
    """S over the FLOPs of a step, measured with one worker, with the fitted lines."""
    lines: dict[str, Line] = {}
    styles: dict[str, dict[str, Any]] = {}
    for number, (sources, pair) in enumerate(fits.items()):
        points = sorted(
            (record["flops_per_step"], record["tokens_per_step"])
            for record in figures
            if record["workers"] == 1 and record["sources"] == sources
        )
        xs = [x for x, _ in points]
        lines[f"{sources} (measured)"] = (xs, [y for _, y in points])
        styles[f"{sources} (measured)"] = {"color": f"C{number}", "linestyle": "", "marker": "o"}
        if isinstance(line := pair["line"], LineFit):
            name = f"{sources}: {line.slope:+.2f} per doubling"
            lines[name] = (xs, [line.at(x) for x in xs])
            styles[name] = {"color": f"C{number}", "linestyle": "--", "marker": ""}
    labels = ("FLOPs per step (from shapes and rows)", "tokens per step, S")
    model = figures[0]["model"]
    plot_lines(path, f"S against FLOPs, {model}, one worker (measured)", labels, lines, styles, xscale="log")


def draw_latency(figures: Sequence[Figures], projected: Sequence[Figures], path: Path) -> None:
    """The fastest cell's ms per token over workers, lookahead off beside it; projected lines dashed and hollow."""
    lines: dict[str, Line] = {}
    styles: dict[str, dict[str, Any]] = {}

    def add(name: str, records: Sequence[Figures], number: int) -> None:
        for kind, chosen in (
            ("off", [record for record in records if record["sources"] == OFF]),
            ("lookahead, fastest", [record for record in records if record["sources"] != OFF]),
        ):
            workers = sorted({record["workers"] for record in chosen})
            if not workers:
                continue
            best = [fastest(r for r in chosen if r["workers"] == count)["ms_per_token"] for count in workers]
            label = f"{name}, {kind}"
            lines[label] = (workers, best)
            is_projected = records[0]["kind"] == "projected"
            styles[label] = {
                "color": f"C{number}",
                "alpha": 0.5 if kind == "off" else 1.0,
                "linestyle": "--" if is_projected else "-",
                "marker": "o",
                "markerfacecolor": "white" if is_projected else f"C{number}",
            }

    add(f"{figures[0]['model']}, this CPU (measured)", figures, 0)
    for number, (device, model) in enumerate(dict.fromkeys((r["device"], r["model"]) for r in projected), 1):
        chosen = [record for record in projected if (record["device"], record["model"]) == (device, model)]
        add(f"{model}, {device} (PROJECTED)", chosen, number)
    title = "latency: solid is measured" + (", dashed and hollow is PROJECTED" if projected else "")
    ticks = sorted({record["workers"] for record in (*figures, *projected)})
    axes = {"xscale": "log", "yscale": "log", "xticks": ticks, "xticklabels": ticks}
    plot_lines(path, title, ("workers", "ms per token"), lines, styles, **axes)


def draw_breakdown(figures: Sequence[Figures], projected: Sequence[Figures], path: Path) -> None:
    """Where a step's time goes: bars of the fastest lookahead cell of each mesh, measured and projected apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("measured", figures)] + ([("PROJECTED", projected)] if projected else [])
    most = max(len(bars_of(records)) for _, records in panels)
    height = 1.5 + 0.3 * most
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(7 * len(panels), height), layout="constrained", squeeze=False
    )
    for plot, (kind, records) in zip(axes[0], panels, strict=True):
        bars = bars_of(records)[::-1]
        left = [0.0] * len(bars)
        names = [f"{r.get('device', '')} {r['lp']}x{r['tp']} {method(r)}".strip() for r in bars]
        for part in bars[0]["parts_ms"]:
            widths = [record["parts_ms"][part] for record in bars]
            plot.barh(
                names, widths, left=left, label=part, hatch="//" if kind == "PROJECTED" else "", edgecolor="white"
            )
            left = [start + width for start, width in zip(left, widths, strict=True)]
        plot.set_ylim(len(bars) - most - 0.5, len(bars) - 0.5)  # bars as thick as the other panel's
        models = ", ".join(dict.fromkeys(record["model"] for record in bars))
        plot.set(xlabel="ms per step", title=f"a step of {models} ({kind})")
        plot.spines[["top", "right"]].set_visible(False)
        plot.legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def bars_of(records: Sequence[Figures]) -> list[Figures]:
    """Lookahead off where it was run, and the fastest lookahead cell, mesh by mesh; of one model."""
    groups = dict.fromkeys((record.get("device"), record["model"]) for record in records)
    first_model = next(iter(groups))[1]
    chosen: list[Figures] = []
    for device, model in groups:
        if model != first_model:
            continue
        group = [record for record in records if (record.get("device"), record["model"]) == (device, model)]
        for mesh in dict.fromkeys((record["lp"], record["tp"]) for record in group):
            here = [record for record in group if (record["lp"], record["tp"]) == mesh]
            ahead = [record for record in here if record["sources"] != OFF]
            chosen += [record for record in here if record["sources"] == OFF] + ([fastest(ahead)] if ahead else [])
    return chosen
