"""Which published orders hold: a table, the verdicts, a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import mean_and_error, print_table
from benchmarks.training.runs import Plan
from benchmarks.training.serving import OWN, SINKS, Served

Losses = Mapping[str, Sequence[Mapping[Served, float]]]
"""By model, per seed: loss by way of serving."""
CLOSE = 0.01
"""Nats: what is not worse than this is as good."""


@dataclass(frozen=True)
class Order:
    """A claim that one loss is above another, or not below it."""

    claim: str
    worse: tuple[str, Served]
    better: tuple[str, Served]
    strict: bool = True
    """False: `better` is at least as good, up to CLOSE or two standard errors."""


ORDERS = (
    Order("sep is better than sink at an equal share", ("sink", "sink"), ("sep", "sep")),
    Order("sep is not worse than strided at an equal share", ("strided", "strided"), ("sep", "sep"), strict=False),
    Order("under sep, training under sep beats training under full", ("full", "sep"), ("sep", "sep")),
    Order(
        "with a sink token, 1 + rest is as good as 4 + rest",
        ("full + sink token", "4 + rest"),
        ("full + sink token", "1 + rest"),
        strict=False,
    ),
    Order(
        "with a sink token, 0 + rest is worse than 1 + rest",
        ("full + sink token", "0 + rest"),
        ("full + sink token", "1 + rest"),
    ),
    Order("without a sink token, 0 + rest is worse than 4 + rest", ("full", "0 + rest"), ("full", "4 + rest")),
)


def verdict(order: Order, loss: Callable[[str, Served], np.ndarray]) -> dict[str, Any]:
    """Whether it holds: the difference is taken seed by seed."""
    mean, error = mean_and_error(loss(*order.worse) - loss(*order.better))
    margin = 0.0 if math.isnan(error) else 2 * error
    holds = mean - margin > 0 if order.strict else mean > -max(CLOSE, margin)
    return {"claim": order.claim, "difference": mean, "error": error, "holds": bool(holds)}


def report(
    found: Losses, trained: Mapping[tuple[str, int], float], plans: Sequence[Plan], out: Path | None
) -> dict[str, Any]:
    """Print tables, write the plot. `trained`: the validation loss in training, under the own policy."""

    def loss(model: str, served: Served) -> np.ndarray:
        if (model, served) == ("strided", "strided"):  # which nobody serves
            return np.array([value for (name, _), value in sorted(trained.items()) if name == model])
        return np.array([losses[served] for losses in found[model]])

    def shown(model: str, served: Served) -> str:
        try:
            mean, error = mean_and_error(np.exp(loss(model, served)))
        except KeyError:
            return "-"
        return f"{mean:.2f} ± {error:.2f}"

    within = [plan.name for plan in plans if not plan.sink_token]
    columns = ("trained under", *(f"served under {name}" for name in within))
    rows = [(plan.name, *(shown(plan.name, served) for served in within)) for plan in plans]
    print_table("Perplexity within the trained length, mean and standard error over seeds", columns, rows)
    sinks = [f"{count} + rest" for count in SINKS]
    print_table(
        "Perplexity behind the trained length, a cache of that length",
        ("trained under", *sinks),
        [(plan.name, *(shown(plan.name, served) for served in sinks)) for plan in plans],
    )
    verdicts = [verdict(order, loss) for order in ORDERS]
    print_table(
        "Orders",
        ("claim", "difference, nats", "holds"),
        [(v["claim"], f"{v['difference']:+.4f} ± {v['error']:.4f}", "yes" if v["holds"] else "no") for v in verdicts],
    )
    apart = {
        plan.name: max(abs(losses[OWN] - trained[plan.name, seed]) for seed, losses in enumerate(found[plan.name]))
        for plan in plans
        if plan.strided is None
    }
    print_table(
        "The same policy in training and in serving: largest difference of the loss",
        ("trained under", "nats"),
        [(name, f"{value:.1e}") for name, value in apart.items()],
    )
    if out is not None:
        plot(out / "training.png", within, sinks, [plan.name for plan in plans], loss)
    named = {
        f"{model} | {served}": [round(x, 5) for x in loss(model, served)]
        for model in found
        for served in (*within, *sinks)
        if _has(loss, model, served)
    }
    return {"losses": named, "orders": verdicts, "training_to_serving": apart}


def _has(loss: Callable[[str, Served], np.ndarray], model: str, served: Served) -> bool:
    try:
        loss(model, served)
    except KeyError:
        return False
    return True


def plot(
    path: Path,
    within: Sequence[Served],
    sinks: Sequence[Served],
    models: Sequence[str],
    loss: Callable[..., np.ndarray],
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    titles = "within the trained length, served under", "behind it, in a cache of that length"
    for axes, served_under, title in zip(panels, (within, sinks), titles, strict=True):
        width = 0.8 / len(models)
        for index, model in enumerate(models):
            places, means, errors = [], [], []
            for column, served in enumerate(served_under):
                if _has(loss, model, served):
                    mean, error = mean_and_error(np.exp(loss(model, served)))
                    places.append(column + (index - (len(models) - 1) / 2) * width)
                    means.append(mean)
                    errors.append(0 if math.isnan(error) else error)
            axes.errorbar(places, means, yerr=errors, fmt="o", capsize=3, label=f"trained under {model}")
        axes.set(
            xticks=range(len(served_under)), xticklabels=served_under, title=title, ylabel="perplexity", yscale="log"
        )
        axes.yaxis.set_major_formatter("{x:.1f}")
        axes.yaxis.set_minor_formatter("{x:.1f}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside lower center", ncols=5
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
