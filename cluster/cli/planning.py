"""`outrider plan`: the measured cost of a step, the split chosen and why, and the speed to be expected."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from cluster.client.backends import open_engine
from runtime.config import Config
from runtime.tuning import choose
from runtime.tuning.choose import Choice


def show(config: Config, remeasure: bool, as_json: bool) -> None:
    """Print the plan for this config. Raises ConfigError where it cannot be run."""
    choices = choose.ranked(config, open_engine, remeasure)
    if as_json:
        print(json.dumps(_record(choices)))
        return
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
    best = choices[0]
    console.print(_curve(best))
    console.print(_ranking(choices))
    console.print(_reason(choices), soft_wrap=True)


def _curve(choice: Choice) -> Table:
    table = Table("rows", "ms", "x 1 row", "ms per further row", title=f"a step's cost, {choice.name}")
    table.caption = f"measured {choice.curve.measured_at}"
    curve = choice.curve
    before: tuple[int, float] | None = None
    for rows, seconds in zip(curve.rows, curve.table(curve.rows[-1])[list(curve.rows)], strict=True):
        slope = f"{1e3 * (seconds - before[1]) / (rows - before[0]):.3f}" if before else ""
        table.add_row(str(rows), f"{1e3 * seconds:.2f}", f"{seconds / curve.seconds[0]:.2f}", slope)
        before = rows, float(seconds)
    return table


def _ranking(choices: list[Choice]) -> Table:
    table = Table("setting", "rows/step", "tokens/s", "lookahead off", "ratio", title="expected for one typical text")
    for choice in choices:
        ratio = choice.tokens_per_s / choice.plain_tokens_per_s
        speeds = (f"{choice.tokens_per_s:.1f}", f"{choice.plain_tokens_per_s:.1f}", f"{ratio:.2f}")
        table.add_row(choice.name, str(choice.rows), *speeds)
    return table


def _reason(choices: list[Choice]) -> str:
    best = choices[0]
    text = (
        f"{best.name}: about {best.rows} rows per step are worth most on typical texts (those of Spec-Bench); the "
        "planner decides anew each step, by what it learns from the text at hand."
    )
    if len(choices) > 1:
        text += f" {choices[1].name} would give {choices[1].tokens_per_s / best.tokens_per_s:.0%} of its speed."
    return text


def _record(choices: list[Choice]) -> dict:
    return {
        "chosen": choices[0].name,
        "choices": [
            {
                "lp": choice.config.parallel.lp,
                "tp": choice.config.parallel.tp,
                "dtype": choice.config.model.dtype,
                "rows_per_step": choice.rows,
                "expected_tokens_per_s": choice.tokens_per_s,
                "plain_tokens_per_s": choice.plain_tokens_per_s,
                "curve": asdict(choice.curve),
            }
            for choice in choices
        ],
    }
