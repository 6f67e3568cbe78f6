"""A run from its config to a model that serves under the policy it was trained under, without being told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from runtime.config import Config
from runtime.engine.engine import Engine
from runtime.engine.scoring import Scorer
from runtime.errors import ConfigError, NumericsError
from runtime.model.directory import for_model
from runtime.training.config import TrainingConfig
from runtime.training.corpus import Samples, pack
from runtime.training.report import read_log
from runtime.training.run import train
from tests.models import save_tiny_model

pytest.importorskip("accelerate")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = "It was cold, and nobody came; so we went home. Why? " * 60
LENGTH = 48
SEP = {"policy": "sep", "num_neighbors": 8, "full_layers": [0]}
SINK = {"policy": "sink", "window": 9, "positions": "original"}


def settings_of(folder: Path, name: str = "run", steps: int = 6, **overrides):
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": TEXT[start : start + 700]}) + "\n" for start in range(0, 3000, 500)))
    return {
        "model": {"architecture": "LlamaForCausalLM", "sizes": SIZES},
        "tokenizer": {"vocab_size": 300},
        "data": {"files": [str(corpus)], "length": LENGTH, "validation_share": 0.2},
        "training": {"steps": steps, "batch_size": 4, "warmup_steps": 1, "learning_rate": 1e-3, "device": "cpu"},
        "output": {"directory": str(folder / name), "save_every": 3, "evaluate_every": 3, "log_every": 1},
        **overrides,
    }


def run(folder: Path, resume: bool = False, **options):
    return train(TrainingConfig.from_dict(settings_of(folder, **options)), resume)


def held_out_of(folder: Path, scorer: Scorer, sink: list[int]) -> Samples:
    """The validation samples of a run, packed anew."""
    end = scorer.spec.eos_token_ids[0]
    texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    documents = [[*scorer.tokenizer.encode(text, add_special_tokens=False), end] for text in texts]
    samples = pack(documents, LENGTH, end, sink[0] if sink else None)
    return samples.part(len(samples) - round(len(samples) * 0.2), len(samples))


def served_loss(scorer: Scorer, samples: Samples) -> float:
    """Nats per target, each piece of a document read by Outrider."""
    log_probs = []
    for tokens, numbers in zip(samples.tokens, samples.documents, strict=True):
        for number in np.unique(numbers[numbers >= 0]):
            log_probs.append(scorer.score(tokens[numbers == number].tolist()).log_probs)
    found = np.concatenate(log_probs)
    assert len(found) == samples.num_targets
    return float(-found.mean())


@pytest.mark.parametrize(
    ("policy", "sink_token"),
    [(SEP, False), (SINK, False), (SINK, True), ({}, True)],
    ids=["sep-H", "sink", "sink-token", "full-token"],
)
def test_a_trained_model_serves_under_its_policy_with_the_loss_of_training(tmp_path, policy, sink_token) -> None:
    """The validation loss of training, from masks, is that of Outrider's caches, to rounding."""
    trained = run(tmp_path, cache=policy, sink_token=sink_token)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("model", "checkpoints", "log.jsonl", "loss.png", "training.json")
    }
    scorer = Scorer(Config.from_dict({"model": {"path": str(trained.model)}}))
    cache = scorer.config.cache
    assert cache.policy == policy.get("policy", "full")
    assert cache.num_sinks == ((1 if sink_token else 4) if cache.policy == "sink" else None)
    assert cache.full_layers == ((0,) if cache.policy == "sep" else None)

    tokenizer = scorer.tokenizer
    sink = tokenizer.encode("")
    assert len(sink) == sink_token and tokenizer.encode("It")[: len(sink)] == sink
    held_out = held_out_of(tmp_path, scorer, sink)
    assert served_loss(scorer, held_out) == pytest.approx(trained.validation_loss, abs=2e-5)

    full = scorer.with_policy(Config.from_dict({"cache": {"policy": "full"}}).cache)
    if policy:  # the case tells something only if the policy matters
        text = held_out.tokens[0].tolist()
        assert abs(full.score(text).log_probs - scorer.score(text).log_probs).max() > 1e-4


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("GPTNeoXForCausalLM", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("Phi3ForCausalLM", {"sliding_window": 20}),
        ("Olmo2ForCausalLM", {}),
        (
            "Gemma3ForCausalLM",
            {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 12, "query_pre_attn_scalar": 8},
        ),
    ],
)
def test_every_family_is_trained_and_served_under_one_policy(tmp_path, architecture, sizes) -> None:
    """Windows of the model's own and rotations of their own included."""
    model = {"architecture": architecture, "sizes": {**SIZES, **sizes}}
    trained = run(tmp_path, steps=3, model=model, cache=SEP)
    scorer = Scorer(Config.from_dict({"model": {"path": str(trained.model)}}))
    assert scorer.config.cache.policy == "sep" and scorer.spec.architecture == architecture
    assert served_loss(scorer, held_out_of(tmp_path, scorer, [])) == pytest.approx(trained.validation_loss, abs=2e-5)


def test_an_engine_takes_the_models_policy_and_a_setting_takes_its_place(tmp_path) -> None:
    model = {"path": str(run(tmp_path, steps=2, cache=SINK, sink_token=True).model)}
    with Engine.from_config({"model": model, "lookahead": {"enabled": False}}) as engine:
        cache = engine.config.cache
        assert (cache.policy, cache.num_sinks, cache.window, cache.positions) == ("sink", 1, 9, "original")
    assert for_model(Config.from_dict({"model": model, "cache": {"policy": "full"}})).cache.policy == "full"
    other = for_model(Config.from_dict({"model": model, "cache": {"policy": "sink", "window": 20}})).cache
    assert (other.num_sinks, other.window, other.positions) == (1, 20, "slot")
    with pytest.raises(ConfigError) as error:
        for_model(Config.from_dict({"model": model, "cache": {"capacity": 99}}))
    assert error.value.field == "cache.capacity"


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(tmp_path) -> None:
    whole = run(tmp_path, name="whole")
    stopped = TrainingConfig.from_dict(settings_of(tmp_path, name="stopped"))
    newest = tmp_path / "stopped" / "checkpoints" / "checkpoint-6"
    train(stopped)
    for path in sorted(newest.rglob("*")):  # as if it had been stopped behind step 3
        path.unlink()
    newest.rmdir()
    resumed = train(stopped, resume=True)
    one, other = (load_file(trained.model / "model.safetensors") for trained in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert resumed.validation_loss == whole.validation_loss
    assert [record["step"] for record in read_log(tmp_path / "stopped") if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_another_run_is_not_resumed_and_nothing_is_written_over(tmp_path) -> None:
    run(tmp_path, steps=2)
    with pytest.raises(ConfigError, match="not empty"):
        run(tmp_path, steps=2)
    with pytest.raises(ConfigError) as error:
        run(tmp_path, resume=True, steps=3)
    assert error.value.field == "training.steps"
    with pytest.raises(ConfigError, match="no run to go on with"):
        run(tmp_path, resume=True, name="elsewhere")


def test_a_strided_model_is_not_served_unless_a_policy_is_named(tmp_path) -> None:
    model = {"path": str(run(tmp_path, steps=2, strided={"stride": 4, "num_neighbors": 8}).model)}
    with pytest.raises(ConfigError, match="strided, which is for training only") as error:
        Engine.from_config({"model": model})
    assert error.value.field == "cache.policy"
    assert for_model(Config.from_dict({"model": model, "cache": {"policy": "full"}})).cache.policy == "full"


def test_post_training_adds_a_sink_token_to_a_checkpoint_and_its_chat(tmp_path) -> None:
    base = save_tiny_model(tmp_path / "base", architecture="Qwen3", max_position_embeddings=64)
    settings = settings_of(tmp_path, steps=2, model={"path": str(base)}, cache=SINK, sink_token=True)
    del settings["tokenizer"]
    trained = train(TrainingConfig.from_dict(settings))
    scorer = Scorer(Config.from_dict({"model": {"path": str(trained.model)}}))
    (sink,) = scorer.tokenizer.encode("")
    assert sink == 262 and scorer.spec.vocab_size == 263
    chat = scorer.tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    assert chat[0] == sink and chat.count(sink) == 1
    turn = scorer.tokenizer.encode_turn([{"role": "user", "content": "Hello"}], after=None)
    assert sink not in turn
    with pytest.raises(ConfigError, match="has a token <|sink|> already"):
        train(
            TrainingConfig.from_dict(
                settings
                | settings_of(tmp_path, "again", model={"path": str(trained.model)})
                | {"tokenizer": {}, "sink_token": True, "cache": SINK}
            )
        )


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"model": {"architecture": "BloomForCausalLM", "sizes": SIZES}}, "model.architecture"),
        (
            {"model": {"architecture": "LlamaForCausalLM", "sizes": {**SIZES, "hiden_size": 3}}},
            "model.sizes.hiden_size",
        ),
        (
            {"model": {"architecture": "LlamaForCausalLM", "sizes": {**SIZES, "vocab_size": 3}}},
            "model.sizes.vocab_size",
        ),
        ({"model": {"architecture": "LlamaForCausalLM", "sizes": {"hidden_size": 3}}}, "model.sizes.intermediate_size"),
        ({"model": {"architecture": "LlamaForCausalLM", "sizes": {**SIZES, "hidden_size": "x"}}}, "model.sizes"),
        (
            {"model": {"architecture": "LlamaForCausalLM", "sizes": {**SIZES, "max_position_embeddings": 32}}},
            "data.length",
        ),
        ({"cache": {"policy": "sep", "full_layers": [5]}}, "cache.full_layers"),
        ({"cache": {"policy": "sep", "separators": ["nowhere"]}}, "cache.separators"),
        ({"data": {"files": ["/nowhere.txt"]}}, "data.files"),
        ({"training": {"batch_size": 10_000, "device": "cpu"}}, "data.files"),
        ({"training": {"attention": "flex", "device": "cpu"}}, "training.attention"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_by_field(tmp_path, overrides, field) -> None:
    with pytest.raises(ConfigError) as error:
        run(tmp_path, **overrides)
    assert error.value.field == field and error.value.remedy
    assert not (tmp_path / "run").exists()  # the next try finds nothing in its way


def test_a_loss_that_is_none_ends_the_run(tmp_path) -> None:
    with pytest.raises(NumericsError, match="learning_rate"):
        run(
            tmp_path, training={"steps": 40, "batch_size": 4, "learning_rate": 1e30, "warmup_steps": 0, "device": "cpu"}
        )


@pytest.mark.parametrize("value", [[], {"cache": {"policy": "lru"}}, {"cach": {}}, {"num_sinks": -1}], ids=str)
def test_a_checkpoint_with_a_broken_policy_is_refused(tmp_path, tiny_model, value) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"outrider": value}))
    with pytest.raises(ConfigError, match="outrider") as error:
        for_model(Config.from_dict({"model": {"path": str(tmp_path)}}))
    assert error.value.field == "model.path"
