"""The tree of a training run: what contradicts itself is refused by field and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.training.config import TrainingConfig

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "configs" / "train").glob("*.yaml"))
LEAST = {
    "model": {"architecture": "LlamaForCausalLM"},
    "data": {"files": ["a.txt"]},
    "output": {"directory": "out"},
}


def config(**settings) -> TrainingConfig:
    return TrainingConfig.from_dict({**LEAST, **settings})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_that_come_with_it_load(path) -> None:
    assert TrainingConfig.load(path).data.files


def test_sizes_are_read_as_numbers(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model:\n  architecture: LlamaForCausalLM\n  sizes: {hidden_size: 64, hidden_act: silu, mlp_bias: false, "
        "rope_parameters: {rope_type: default, rope_theta: 1e4}}\ndata: {files: [a.txt]}\noutput: {directory: out}\n"
    )
    loaded = TrainingConfig.load(file, ["model.sizes.num_hidden_layers=3", "training.learning_rate=1e-3"])
    sizes = loaded.model.sizes
    assert (sizes["hidden_size"], sizes["hidden_act"], sizes["mlp_bias"]) == (64, "silu", False)
    assert sizes["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000} and sizes["num_hidden_layers"] == 3
    assert loaded.training.learning_rate == 1e-3


def test_with_a_sink_token_one_sink_is_enough() -> None:
    assert config(sink_token=True, cache={"policy": "sink", "window": 12}).cache.num_sinks == 1
    assert config(sink_token=True, cache={"policy": "sink", "window": 12, "num_sinks": 4}).cache.num_sinks == 4
    assert config(cache={"policy": "sink", "window": 12}).cache.num_sinks == 4


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"model": {"architecture": "LlamaForCausalLM", "path": "x"}}, "model.architecture"),
        ({"model": {"path": "x", "sizes": {"hidden_size": 3}}}, "model.sizes"),
        ({"model": {"path": "x"}, "tokenizer": {"vocab_size": 300}}, "tokenizer"),
        ({"tokenizer": {"path": "x", "vocab_size": 300}}, "tokenizer.vocab_size"),
        ({"data": {"files": []}}, "data.files"),
        ({"data": {}}, "data.files"),
        ({"data": {"files": ["a"], "length": 4}}, "data.length"),
        ({"output": {"directory": ""}}, "output.directory"),
        ({"cache": {"policy": "sep", "design": "streaming"}}, "cache.design"),
        ({"cache": {"policy": "sink", "evict": "turn"}}, "cache.evict"),
        ({"cache": {"policy": "sink"}, "strided": {"stride": 4}}, "strided"),
        ({"cache": {"policy": "sink", "num_sinks": 0}, "sink_token": True}, "cache.num_sinks"),
        ({"strided": {"stride": 0}}, "strided.stride"),
        ({"training": {"steps": 0}}, "training.steps"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate"),
        ({"training": {"schedule": "none"}}, "training.schedule"),
        ({"train": {}}, "train"),
    ],
    ids=str,
)
def test_contradictions_name_the_field_and_the_remedy(settings, field) -> None:
    with pytest.raises(ConfigError) as error:
        config(**settings)
    assert error.value.field == field and error.value.remedy
