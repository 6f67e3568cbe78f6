"""The models of the benchmark: what each is trained under, and training them side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from runtime.training.config import TrainingConfig
from runtime.training.run import DESCRIPTION, train


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    length: int
    """T, tokens of a sample, and the trained length."""
    num_neighbors: int
    """Of `sep`: n."""
    steps: int
    batch_size: int
    learning_rate: float
    validation_samples: int
    streams: int
    stream_length: int
    """Tokens of each text that is longer than the trained length."""


SMALL = Scale(64, 176, 2, 4, 512, 128, 16, 450, 8, 4e-3, 48, 4, 1024)
FULL = Scale(128, 344, 4, 4, 512, 256, 32, 1200, 8, 2e-3, 96, 6, 2048)


@dataclass(frozen=True)
class Plan:
    """One model to train."""

    name: str
    cache: dict[str, Any]
    strided: dict[str, Any] | None = None
    sink_token: bool = False


def plans(scale: Scale, share_of: Callable[[dict[str, Any], dict[str, Any] | None], float]) -> list[Plan]:
    """The models. The window of `sink` and the stride of `strided` are those whose attended share is next to `sep`'s;
    `share_of` measures a policy's share on the corpus."""
    sep = {"policy": "sep", "num_neighbors": scale.num_neighbors}
    wanted = share_of(sep, None)

    def sink(window: int) -> dict[str, Any]:
        return {"policy": "sink", "num_sinks": 4, "window": window, "positions": "original"}

    def strided(stride: int) -> dict[str, Any]:
        return {"stride": stride, "num_initial": 4, "num_neighbors": scale.num_neighbors}

    window = min(range(8, scale.length), key=lambda w: abs(share_of(sink(w), None) - wanted))
    stride = min(range(1, scale.length), key=lambda k: abs(share_of({}, strided(k)) - wanted))
    return [
        Plan("full", {}),
        Plan("full + sink token", {}, sink_token=True),
        Plan("sep", sep),
        Plan("sink", sink(window)),
        Plan("strided", {}, strided(stride)),
    ]


def config_of(
    plan: Plan, scale: Scale, seed: int, tokenizer: Path, corpus: Path, held_out: Path, folder: Path
) -> TrainingConfig:
    return TrainingConfig.from_dict(
        {
            "model": {
                "architecture": "LlamaForCausalLM",
                "sizes": {
                    "hidden_size": scale.hidden_size,
                    "intermediate_size": scale.intermediate_size,
                    "num_hidden_layers": scale.num_layers,
                    "num_attention_heads": scale.num_heads,
                    "num_key_value_heads": scale.num_heads,
                    "tie_word_embeddings": True,
                    "initializer_range": 0.5 * scale.hidden_size**-0.5,  # such small models hardly begin at 0.02
                },
            },
            "tokenizer": {"path": str(tokenizer)},
            "data": {"files": [str(corpus)], "length": scale.length, "validation_files": [str(held_out)]},
            "cache": plan.cache,
            "strided": plan.strided,
            "sink_token": plan.sink_token,
            "training": {
                "steps": scale.steps,
                "batch_size": scale.batch_size,
                "learning_rate": scale.learning_rate,
                "warmup_steps": scale.steps // 20,
                "device": "cpu",
                "seed": seed,
            },
            "output": {
                "directory": str(folder),
                "save_every": scale.steps,
                "evaluate_every": scale.steps,
                "log_every": max(1, scale.steps // 20),
                "keep": 1,
            },
        }
    )


def train_all(configs: Sequence[TrainingConfig], jobs: int) -> list[float]:
    """Train each, unless it is there already from an earlier run; the validation losses, under the own policy."""
    if jobs == 1:
        return [_trained(config, torch.get_num_threads()) for config in configs]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_trained, configs, [threads] * len(configs)))


def _trained(config: TrainingConfig, threads: int) -> float:
    torch.set_num_threads(threads)
    folder = Path(config.output.directory)
    result, description = folder / "result.json", folder / DESCRIPTION
    if result.exists() and json.loads(description.read_text()) == config.model_dump(mode="json"):
        return float(json.loads(result.read_text())["validation_loss"])
    loss = train(config, resume=description.exists()).validation_loss
    assert loss is not None, "the benchmark's configs name validation files"
    result.write_text(json.dumps({"validation_loss": loss}))
    return loss
