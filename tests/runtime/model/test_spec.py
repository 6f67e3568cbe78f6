"""A model is either described completely or refused by name."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.model.loader import load_spec
from runtime.model.spec import ModelSpec
from tests.zoo import TRAINED, make_config, make_model


def test_fields_of_each_architecture() -> None:
    spec = ModelSpec.from_hf_config(make_config("llama-mlp_bias"))
    assert (spec.architecture, spec.num_heads, spec.num_kv_heads, spec.head_dim) == ("LlamaForCausalLM", 8, 2, 8)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.qk_norm) == (True, True, True, False)
    assert spec.sliding_windows == (None, None) and spec.max_positions == TRAINED
    assert ModelSpec.from_hf_config(make_config("mistral-window")).sliding_windows == (7, 7)
    qwen2 = ModelSpec.from_hf_config(make_config("qwen2-tied-window"))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.tie_embeddings, qwen2.sliding_windows) == (True, False, True, (None, 5))
    assert ModelSpec.from_hf_config(make_config("qwen3")).qk_norm


def test_older_rope_scaling_field_is_read(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"]
    raw |= {"rope_theta": 5000.0, "rope_scaling": {"type": "dynamic", "factor": 3.0}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    dynamic = load_spec(tmp_path).rope.dynamic
    assert dynamic is not None and (dynamic.theta, dynamic.factor, dynamic.max_positions) == (5000.0, 3.0, TRAINED)


def test_end_tokens_come_from_both_configs(tmp_path: Path) -> None:
    model = make_model("llama")
    model.generation_config.eos_token_id = [9, 7]
    model.save_pretrained(tmp_path)
    assert load_spec(tmp_path).eos_token_ids == (7, 9)


def test_config_without_architectures_is_known_by_its_model_type(tmp_path: Path) -> None:
    make_config("qwen3").save_pretrained(tmp_path)
    assert load_spec(tmp_path).architecture == "Qwen3ForCausalLM"


REFUSALS = {
    "architectures": ({"architectures": ["GPT2LMHeadModel"]}, "GPT2", "LlamaForCausalLM, MistralForCausalLM"),
    "hidden_act": ({"hidden_act": "relu"}, "relu", "silu"),
    "quantization_config": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq", "GGUF"),
    "rope_parameters.rope_type": (
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 2.0,
                "long_factor": [1.0] * 4,
                "short_factor": [1.0] * 4,
                "original_max_position_embeddings": TRAINED,
            }
        },
        "longrope",
        "default, linear, dynamic, llama3, yarn",
    ),
    "num_key_value_heads": ({"num_key_value_heads": 2}, "2", "config.json"),
}


@pytest.mark.parametrize("field", REFUSALS)
def test_refusal_names_field_value_and_what_is_supported(tmp_path: Path, field: str) -> None:
    change, value, remedy = REFUSALS[field]
    make_config("llama").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError) as caught:
        load_spec(tmp_path)
    assert caught.value.field == field
    assert value in str(caught.value) and remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("change", "problem"), [({"hidden_size": 70}, "hidden size"), ({"num_hidden_layers": "two"}, "num_hidden_layers")]
)
def test_config_that_transformers_refuses_is_refused(tmp_path: Path, change: dict, problem: str) -> None:
    make_config("llama").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=f"config.json.*{problem}"):
        load_spec(tmp_path)


def test_tp_beyond_the_query_heads_is_refused() -> None:
    spec = ModelSpec.from_hf_config(make_config("llama"))
    spec.check_tp(9)
    with pytest.raises(ConfigError, match="parallel.tp = 10.*9 query heads"):
        spec.check_tp(10)


@pytest.mark.slow
def test_running_a_spec_needs_no_transformers() -> None:
    """A worker gets its spec pickled; importing transformers would add seconds to its start."""
    spec = ModelSpec.from_hf_config(make_config("llama"))
    code = (
        "import pickle, sys; import runtime.model.loader; "
        f"spec = pickle.loads({pickle.dumps(spec)!r}); print(spec.num_heads, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["9", "False"]
