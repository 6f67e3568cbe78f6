"""What a run says while it goes on: lines on stderr, a record per line in log.jsonl, and the curve in loss.png."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from runtime.errors import NumericsError
from runtime.progress import tell

TRAINING, VALIDATION = "loss", "eval_loss"


class Reporter(TrainerCallback):
    def __init__(self, directory: Path, tokens_per_step: int) -> None:
        self.directory, self.tokens_per_step = directory, tokens_per_step
        self._started: tuple[int, float] | None = None
        """Of this process: the step it began at, and when."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._started is None:
            self._started = state.global_step, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Raises NumericsError where the loss is none."""
        record = {"step": state.global_step, **(logs or {})}
        loss = record.get(TRAINING, record.get(VALIDATION))
        if loss is None or not state.is_world_process_zero:
            return  # a summary at the end, which says nothing new; or another process says it
        with (self.directory / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if not math.isfinite(loss):
            remedy = "Lower training.learning_rate, or lengthen training.warmup_steps, and begin anew."
            raise NumericsError(f"the loss is {loss} at step {state.global_step}. {remedy}")
        tell(self._line(state, record))

    def _line(self, state: Any, record: dict[str, Any]) -> str:
        head = f"step {state.global_step}/{state.max_steps}"
        if VALIDATION in record:
            return f"{head}: validation loss {record[VALIDATION]:.4f}, perplexity {math.exp(record[VALIDATION]):.2f}"
        first, started = self._started or (state.global_step, time.monotonic())
        steps, seconds = state.global_step - first, time.monotonic() - started
        line = f"{head}: loss {record[TRAINING]:.4f}, learning rate {record.get('learning_rate', 0):.2e}"
        if steps and seconds:
            left = (state.max_steps - state.global_step) * seconds / steps
            line += f", {steps * self.tokens_per_step / seconds:,.0f} tokens/s, {_duration(left)} left"
        return line

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            plot(self.directory)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def read_log(directory: Path) -> list[dict[str, float]]:
    """The records of log.jsonl; of a step that a resumed run took again, the newest."""
    newest: dict[tuple[int, bool], dict[str, float]] = {}
    for line in (directory / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        newest[int(record["step"]), VALIDATION in record] = record
    return [newest[key] for key in sorted(newest)]


def plot(directory: Path) -> None:
    """loss.png from log.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_log(directory)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for key, name, marker in ((TRAINING, "training", ""), (VALIDATION, "validation", "o")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=3)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=directory.name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(directory / "loss.png", dpi=120)
    pyplot.close(figure)
