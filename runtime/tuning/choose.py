"""What `parallel: auto` and `dtype: auto` stand for: the fastest of the settings that this machine allows, measured.

Each setting's step cost curve (runtime.tuning.cost) is read from disk, or measured by starting its workers once. What a
curve is worth is the speed that the planner would reach on it with texts like those behind TYPICAL.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from runtime.config import Config
from runtime.errors import ConfigError
from runtime.model.directory import for_model, load_spec, resolve_model
from runtime.model.spec import ModelSpec
from runtime.progress import tell
from runtime.tuning import cost
from runtime.tuning.cost import CostCurve


class Measured(Protocol):
    """What of an engine is needed here."""

    def measure_cost(self) -> CostCurve: ...


OpenEngine = Callable[[Config], AbstractContextManager[Measured]]

TYPICAL = ((1, 1.0), (4, 1.5), (8, 1.8), (16, 2.15), (32, 2.5), (64, 2.8), (128, 3.05), (256, 3.3), (1024, 3.8))
"""(rows, tokens per step): what the candidate tree reached over the task groups of Spec-Bench with the embedded model.
Only ranks the settings; the planner goes by what it learns from the running texts."""


@dataclass(frozen=True)
class Choice:
    """One setting, and what may be expected of it."""

    config: Config
    """With lp, tp and dtype fixed."""
    curve: CostCurve
    rows: int
    """Rows per step at which it is fastest on typical texts."""
    tokens_per_s: float
    """Of one request then."""
    plain_tokens_per_s: float
    """With lookahead off."""

    @property
    def name(self) -> str:
        parallel = self.config.parallel
        return f"lp={parallel.lp} tp={parallel.tp} {self.config.model.dtype}"


def candidates(config: Config, spec: ModelSpec) -> list[Config]:
    """The settings to choose among, each with lp, tp and dtype fixed; just `config` where nothing is open."""
    parallel, model = config.parallel, config.model
    splits = [(parallel.lp, parallel.tp)]
    if parallel.split == "auto":
        count = parallel.workers or default_workers(config)
        splits = [(count // tp, tp) for tp in range(1, min(count, spec.num_heads) + 1) if count % tp == 0]
        splits = [(lp, tp) for lp, tp in splits if lp <= 30 and not (model.deterministic and tp > 2)]
        if not splits:
            problem = f"{count} workers cannot be split for a model of {spec.num_heads} query heads"
            raise ConfigError("parallel.workers", count, problem, "Give another number.")
    dtypes = ("bfloat16", "float32") if model.dtype == "auto" else (model.dtype,)
    if model.dtype == "auto" and _on_cuda(config):
        dtypes = ("bfloat16",)  # no GPU worth the name is faster in float32
    return [
        config.merged(
            {
                "model": model.merged({"dtype": dtype}),
                "parallel": parallel.merged({"split": "fixed", "workers": None, "lp": lp, "tp": tp}),
            }
        )
        for lp, tp in splits
        for dtype in dtypes
    ]


def default_workers(config: Config) -> int:
    """As many as there are devices on this machine."""
    return torch.cuda.device_count() if _on_cuda(config) else (os.cpu_count() or 1)


def _on_cuda(config: Config) -> bool:
    return config.model.device != "cpu" and torch.cuda.is_available()


def ranked(config: Config, open_engine: OpenEngine, remeasure: bool = False) -> list[Choice]:
    """All settings, fastest first. `open_engine` starts the workers of one whose curve is not on disk.

    Raises ConfigError where none can be run.
    """
    config = for_model(config)
    spec = load_spec(resolve_model(config.model.path))
    choices, errors = [], []
    for fixed in candidates(config, spec):
        curve = None if remeasure else cost.stored(fixed, spec)
        if curve is None or curve.provisional:
            parallel = fixed.parallel
            tell(f"measuring lp={parallel.lp} tp={parallel.tp} {fixed.model.dtype} (once per machine and model) ...")
            try:
                # Without lookahead nothing is measured at the start, nor are bigrams asked for.
                with open_engine(fixed.merged({"lookahead": fixed.lookahead.merged({"enabled": False})})) as engine:
                    curve = engine.measure_cost()
            except ConfigError as error:
                errors.append(error)
                continue
        choices.append(_judged(fixed, curve))
    if not choices:
        raise errors[0]
    return sorted(choices, key=lambda choice: -choice.tokens_per_s)


def resolved(config: Config, open_engine: OpenEngine) -> Config:
    """`config` with what is `auto` in it fixed; the same where nothing is."""
    return ranked(config, open_engine)[0].config if config.is_open else config


def _judged(config: Config, curve: CostCurve) -> Choice:
    seconds = curve.table(config.scheduler.max_rows)[1:]
    rows = np.arange(1, len(seconds) + 1)
    tokens = np.interp(np.log(rows), np.log([count for count, _ in TYPICAL]), [tokens for _, tokens in TYPICAL])
    rate = tokens / seconds
    best = int(rate.argmax())
    return Choice(config, curve, int(rows[best]), float(rate[best]), float(1 / seconds[0]))
