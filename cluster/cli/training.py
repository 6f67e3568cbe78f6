"""`outrider train`: the run itself is runtime/training; here it meets the terminal."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.cli import streams
from runtime.progress import tell
from runtime.training.config import TrainingConfig


def run(config: Path, settings: Sequence[str], resume: bool, as_json: bool) -> None:
    """Train, and print where the model is. Raises ConfigError, NumericsError."""
    loaded = TrainingConfig.load(config, settings)
    from runtime.training.run import is_first_process, train

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s %(levelname)s %(message)s")
    trained = train(loaded, resume)
    if not is_first_process():
        return
    if as_json:
        streams.print_json({**dataclasses.asdict(trained), "model": str(trained.model)})
        return
    figures = f"{trained.steps} steps, loss {trained.loss:.4f}"
    if trained.validation_loss is not None:
        figures += f", validation loss {trained.validation_loss:.4f}"
    tell(f"{figures}; serve it: outrider serve --set model.path={trained.model}")
    print(trained.model)
