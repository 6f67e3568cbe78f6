"""model/: a checkpoint that serves under the policy it was trained under."""

from __future__ import annotations

from pathlib import Path

import torch

from runtime.config import CacheConfig, Config
from runtime.errors import ConfigError
from runtime.model.directory import checked_model, for_model
from runtime.model.trained_policy import KEY, TrainedPolicy
from runtime.tokenizer import Tokenizer
from runtime.training.config import TrainingConfig
from runtime.training.source import Trainee


def policy_to_serve(config: TrainingConfig, cache: CacheConfig, has_sink: bool) -> TrainedPolicy:
    """`cache`: that of `config`, separators as ids."""
    num_sinks = 1 if has_sink else None
    if config.strided is not None:
        return TrainedPolicy(trained_under="strided", num_sinks=num_sinks)
    return TrainedPolicy(cache=cache, num_sinks=num_sinks)


def export(config: TrainingConfig, trainee: Trainee, cache: CacheConfig, directory: Path) -> Path:
    """Write it, and see to it that it can be served. Returns `directory`."""
    model = trainee.model
    setattr(model.config, KEY, policy_to_serve(config, cache, trainee.sink_id is not None).to_json())
    model.config.use_cache = True
    model.config.dtype = config.output.dtype
    state = {name: tensor.to(getattr(torch, config.output.dtype)) for name, tensor in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=state)
    trainee.tokenizer.save_pretrained(directory)
    _check(config, trainee, directory)
    return directory


def _check(config: TrainingConfig, trainee: Trainee, directory: Path) -> None:
    tokenizer = Tokenizer(directory)
    if trainee.sink_id is not None and tokenizer.encode("a")[:1] != [trainee.sink_id]:
        problem = "this tokenizer's class does not put the sink token first when it is read again"
        raise ConfigError("sink_token", True, problem, "Save the tokenizer as a plain tokenizer.json, and train anew.")
    run = {"model": {"path": str(directory)}}
    if config.strided is not None:
        run["cache"] = {"policy": "full"}
    checked_model(for_model(Config.from_dict(run)))
