"""The scaling experiment's tables and fits. What was not measured is called projected wherever it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import print_table
from benchmarks.scaling.cells import NGRAM_SIZE, OFF, Cell
from benchmarks.scaling.fits import AcceptanceFit, LineFit, fit_acceptance, fit_line
from benchmarks.scaling.plots import Figures, Fits, draw_breakdown, draw_growth, draw_latency, fastest, method


def fit_all(figures: Sequence[Figures]) -> Fits:
    """The fits of every source set, from one worker's cells."""
    fits: Fits = {}
    alone = [record for record in figures if record["workers"] == 1]
    for sources in dict.fromkeys(record["sources"] for record in alone if record["sources"] != OFF):
        points = [record for record in alone if record["sources"] == sources]
        values = [record["tokens_per_step"] for record in points]
        candidates = [Cell(1, 1, sources, record["budget"]).num_candidates for record in points]
        fits[sources] = {
            "line": fit_line([record["flops_per_step"] for record in points], values),
            "acceptance": fit_acceptance(candidates, values, NGRAM_SIZE - 1),
        }
    return fits


def report(figures: Sequence[Figures], projected: Sequence[Figures], fits: Fits, out: Path) -> list[Path]:
    """Print the tables and write the figures; returns their paths."""
    print_measured(figures)
    print_fits(fits)
    if projected:
        print_projected(projected)
    plots = [out / "s_over_flops.png", out / "latency.png", out / "breakdown.png"]
    draw_growth(figures, fits, plots[0])
    draw_latency(figures, projected, plots[1])
    draw_breakdown(figures, projected, plots[2])
    return plots


def print_measured(figures: Sequence[Figures]) -> None:
    base = next(record for record in figures if record["workers"] == 1 and record["sources"] == OFF)
    rows, work = [], []
    for record in figures:
        parts = record["parts_ms"]
        ties = f" ({record['near_ties']} near-ties)" if record["near_ties"] else ""
        names = [
            record["kind"],
            f"{record['lp']}x{record['tp']}{'*' if record['oversubscribed'] else ''}",
            method(record),
        ]
        rows.append([
            *names,
            f"{record['rows_per_step']:.0f}",
            f"{record['largest_replica_rows']:.0f}",
            f"{record['tokens_per_step']:.2f}",
            f"{record['step_ms']:.1f}",
            f"{record['tokens_per_s']:.1f}",
            f"{base['ms_per_token'] / record['ms_per_token']:.2f}",
            ("yes" if record["lossless"] else "NO") + ties,
        ])  # fmt: skip
        work.append([
            *names,
            f"{record['flops_per_token'] / 1e9:.2f}",
            f"{record['bytes_moved_per_token'] / 1e6:.0f}",
            "/".join(f"{sent / 1e3:.0f}" for sent in record["communication"].values()),
            "/".join(f"{milliseconds:.1f}" for milliseconds in parts.values()),
            f"{1 - parts['forward'] / sum(parts.values()):.1%}",
        ])  # fmt: skip
    title = f"{base['model']}, {base['dtype']}, {base['threads']} thread(s) per worker, {base['num_prompts']} prompts"
    if any(record["oversubscribed"] for record in figures):
        title += "; * more threads than cores: its times mean little"
    columns = ["", "lp x tp", "sources, budget"]
    speed = ["rows", "largest part", "S", "ms/step", "tokens/s", "x one worker off", "lossless"]
    print_table(f"measured: {title}", [*columns, *speed], rows)
    sent, times = "KB sent/step: plan/result/sums/KV", "ms: plan/broadcast/forward/gather/verify"
    columns += ["GFLOP/token", "MB read/token", sent, times, "overhead"]
    print_table("work from shapes and rows; time as measured", columns, work)


def print_fits(fits: Fits) -> None:
    rows = []
    for sources, pair in fits.items():
        line, acceptance = pair["line"], pair["acceptance"]
        shown = ["-"] * 6
        if isinstance(line, LineFit):
            shown[:3] = [str(line.num_points), f"{line.slope:.3f}", f"{line.r_squared:.3f}"]
        if isinstance(acceptance, AcceptanceFit):
            shown[3:] = [f"{acceptance.alpha:.3f}", f"{acceptance.f:.2f}", f"{acceptance.rms_error:.3f}"]
        rows.append([sources, *shown])
    title = f"fits of measured S: line over log2(FLOPs per step); (f - 1 + E) / f, gamma = {NGRAM_SIZE - 1}"
    print_table(title, ["sources", "points", "S per doubling", "R^2", "alpha", "f", "rms error"], rows)


def print_projected(projected: Sequence[Figures]) -> None:
    """Per device, model and mesh: lookahead off, the paper's method at the rows of the best cell, and the best cell."""
    rows = []
    for device, model in dict.fromkeys((record["device"], record["model"]) for record in projected):
        group = [record for record in projected if (record["device"], record["model"]) == (device, model)]
        plain = [record for record in group if record["sources"] == OFF]
        smallest = min(plain, key=lambda record: record["workers"])
        for shown in shown_of(group):
            rows.append([
                shown["kind"],
                device,
                model,
                f"{shown['lp']}x{shown['tp']}",
                method(shown),
                f"{shown['largest_replica_rows']:.0f}",
                f"{shown['tokens_per_step']:.2f}",
                f"{shown['step_ms']:.2f}",
                f"{shown['parts_ms']['host']:.2f}",
                f"{shown['ms_per_token']:.2f}",
                f"{shown['tokens_per_s']:.0f}",
                f"{smallest['ms_per_token'] / shown['ms_per_token']:.2f}",
            ])  # fmt: skip
    columns = ["", "device", "model", "lp x tp", "sources, budget", "largest", "S", "step, ms", "of it host"]
    columns += ["ms/token", "tokens/s", "x off"]
    first = projected[0]
    title = f"PROJECTED, not measured: step times from benchmarks/roofline.py at {first['context']:.0f} cached tokens"
    host_paths = ", ".join(dict.fromkeys(record["host_path"] for record in projected))
    print_table(f"{title}, S from {first['tokens_per_step_measured_with']}, host path: {host_paths}", columns, rows)


def shown_of(group: Sequence[Figures]) -> list[Figures]:
    """The rows of a device's table, mesh by mesh; the whole grid is in the JSON line."""
    shown = []
    for lp, tp in dict.fromkeys((record["lp"], record["tp"]) for record in group):
        mesh = [record for record in group if (record["lp"], record["tp"]) == (lp, tp)]
        ahead = [record for record in mesh if record["sources"] != OFF]
        best = fastest(ahead) if ahead else None
        shown += [record for record in mesh if record["sources"] == OFF]
        if best is not None:
            shown += [r for r in ahead if r["sources"] == "jacobi" and r["budget"] == best["budget"] and r is not best]
            shown.append(best)
    return shown
