"""A model is either described completely or refused by name."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from runtime.config import CacheConfig
from runtime.errors import ConfigError
from runtime.model.directory import load_spec
from runtime.model.spec import ModelSpec
from tests.zoo import TRAINED, VARIANTS, make_config, make_model


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


def edited(directory: Path, name: str = "config.json", drop: Sequence[str] = (), **changes: Any) -> Path:
    """A tiny Llama's directory, some keys of one of its files changed."""
    make_model("llama").save_pretrained(directory)
    raw = json.loads((directory / name).read_text())
    raw = {key: value for key, value in raw.items() if key not in drop} | changes
    (directory / name).write_text(json.dumps(raw))
    return directory


END_TOKENS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, tuple[int, ...]]] = {
    "generation alone where it names any": ({"eos_token_id": 7}, {"eos_token_id": [9, 8]}, (8, 9)),
    "generation where the config is silent": ({}, {"eos_token_id": 9}, (9,)),
    "config where there is no generation": ({"eos_token_id": [7, 5]}, None, (5, 7)),
    "config where generation is silent": ({"eos_token_id": 7}, {}, (7,)),
    "config where generation says null": ({"eos_token_id": 7}, {"eos_token_id": None}, (7,)),
    "config where generation has an empty list": ({"eos_token_id": 7}, {"eos_token_id": []}, (7,)),
    "none where nobody names any": ({}, None, ()),
    "none where both say null": ({"eos_token_id": None}, {"eos_token_id": None}, ()),
}


@pytest.mark.parametrize("name", END_TOKENS)
def test_end_tokens_are_those_that_the_files_name(tmp_path: Path, name: str) -> None:
    config, generation, expected = END_TOKENS[name]
    edited(tmp_path, drop=["eos_token_id"], **config)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_spec(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize("value", ["</s>", -1, 101, [7, "8"], [7, None], 7.0, True, {"id": 7}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_token_that_is_none_is_refused(tmp_path: Path, file: str, value: Any) -> None:
    edited(tmp_path, file, eos_token_id=value)
    if file == "config.json":
        (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ConfigError, match=f"{file}.*eos_token_id"):
        load_spec(tmp_path)


ROPE = {"rope_theta": 1e4}
WRONG_VALUES: list[tuple[str, Any]] = [
    *[(key, value) for key in ("hidden_size", "num_hidden_layers", "vocab_size") for value in (None, 0, -8, "8", 8.5)],
    ("num_attention_heads", []),
    ("max_position_embeddings", "2048"),
    ("num_key_value_heads", 0),
    ("head_dim", "8"),
    ("head_dim", 9),
    ("rms_norm_eps", "1e-6"),
    ("rms_norm_eps", None),
    ("hidden_act", None),
    ("hidden_act", ["silu"]),
    ("tie_word_embeddings", "true"),
    ("tie_word_embeddings", None),
    ("attention_bias", 1),
    ("rope_theta", "10000"),
    ("rope_theta", None),
    ("partial_rotary_factor", 0.5),
    ("rope_parameters", [4.0]),
    ("rope_parameters", "linear"),
    ("rope_parameters", {"rope_theta": 0}),
    ("rope_parameters", {**ROPE, "rope_type": 3}),
    ("rope_parameters", {**ROPE, "rope_type": "linear"}),
    *[("rope_parameters", {**ROPE, "rope_type": "linear", "factor": value}) for value in (0, -2.0, 0.5, "4", None)],
    ("rope_scaling", {"type": "yarn", "factor": True}),
    ("rope_parameters", {**ROPE, "rope_type": "llama3", "factor": 4.0}),
    (
        "rope_parameters",
        {
            **ROPE,
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 4.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 16,
        },
    ),
    ("rope_parameters", {"full_attention": ROPE, "sliding_attention": ROPE}),
    ("rope_parameters", {**ROPE, "factor": 4.0}),
    ("rope_parameters", {**ROPE, "rope_type": "default", "type": "linear", "factor": 4.0}),
    ("rope_parameters", {**ROPE, "rope_type": "yarn", "factor": 4.0, "truncate": "no"}),
    ("rope_scaling", {"type": "linear", "factor": 4.0}),  # beside rope_parameters, which say default
    ("rope_theta", 2e4),
    ("num_hidden_layers", 10**12),
    ("model_type", "mistral"),
]


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES, ids=str)
def test_a_value_of_the_wrong_kind_is_refused_by_file_and_key(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json.*{key}") as caught:
        load_spec(edited(tmp_path, **{key: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps"],
)
def test_a_missing_size_is_not_made_up(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json.*{key} is missing"):
        load_spec(edited(tmp_path, drop=[key]))


def test_what_may_be_missing_or_null_is_as_in_transformers(tmp_path: Path) -> None:
    edited(tmp_path, drop=["head_dim", "tie_word_embeddings", "attention_bias"], num_key_value_heads=None)
    spec = load_spec(edited(tmp_path, drop=["head_dim", "attention_bias", "rope_parameters"], rope_scaling=None))
    assert (spec.head_dim, spec.qkv_bias) == (8, False) and spec.rope.inv_freq[0] == 1.0


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"{", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, file: str, content: bytes, problem: str) -> None:
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{file} {problem}"):
        load_spec(tmp_path)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_spec(tmp_path).num_heads == 9


ROPE_REACH: dict[str, tuple[dict[str, Any], int | None]] = {
    "default": ({"rope_type": "default"}, TRAINED),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 4 * TRAINED),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}, 4 * TRAINED),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, None),
}


@pytest.mark.parametrize("policy", ["full", "sep"])
@pytest.mark.parametrize("name", ROPE_REACH)
def test_a_cache_longer_than_the_model_was_trained_for_is_refused(name: str, policy: str) -> None:
    parameters, longest = ROPE_REACH[name]
    spec = ModelSpec.from_hf_config(make_config("llama", rope_parameters={**ROPE, **parameters}))

    def check(capacity: int, **settings: Any) -> None:
        spec.check_cache(CacheConfig(policy=policy, capacity=capacity, **settings))

    if longest is None:
        return check(100_000)
    check(longest)
    check(longest + 1, beyond_trained=True)
    with pytest.raises(ConfigError, match=rf"cache.capacity = {longest + 1}.*trained on {longest} positions"):
        check(longest + 1)
    CacheConfig(policy="sink")  # which has no such setting
    return None


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


def test_what_families_have_beyond_llama() -> None:
    assert all(ModelSpec.from_hf_config(make_config(name)).beyond_llama is None for name in ("llama", "qwen3", "phi3"))
    beyond = {name: ModelSpec.from_hf_config(make_config(name)).beyond_llama for name in ("neox", "olmo2", "gemma3")}
    assert beyond["neox"] == "layer norms" and beyond["olmo2"] == "norms behind attention and MLP"
    assert beyond["gemma3"] == "norms behind attention and MLP"
    part = ModelSpec.from_hf_config(make_config("phi3-window-part"))
    assert part.rope.num_rotated == 6 and part.rope.inv_freq[3:] == (0.0,) and part.sliding_windows == (6, 6)
    gemma = ModelSpec.from_hf_config(make_config("gemma3-ropes"))
    assert gemma.local_rope is not None and gemma.sliding_windows == (5, None)
    assert gemma.local_rope.inv_freq != gemma.rope.inv_freq and gemma.rope.reach == 4 * TRAINED


@pytest.mark.parametrize(
    ("variant", "changes", "named"),
    [
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("gemma3", {"hidden_activation": "relu"}, "hidden_activation"),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ("gemma3", {"rope_parameters": {"full_attention": {}, "sliding_attention": 3}}, "sliding_attention"),
        ("neox", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("neox", {"rotary_pct": 1.5}, "rotary_pct"),
        (
            "neox",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.25}},
            "partial",
        ),
        ("neox", {"layer_norm_eps": -1}, "layer_norm_eps"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 4, "partial_rotary_factor": 0.5}}, "rope_type"),
    ],
    ids=str,
)
def test_what_a_family_cannot_have_is_refused_by_name(tmp_path: Path, variant: str, changes: Any, named: str) -> None:
    make_config(variant).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text()) | {"architectures": [f"{VARIANTS[variant][0]}ForCausalLM"]}
    if "partial" in named or "rotary_pct" in changes:
        raw.pop("rope_parameters", None)
    path.write_text(json.dumps(raw))
    load_spec(tmp_path)  # as it is, it is fine
    path.write_text(json.dumps(raw | changes))
    with pytest.raises(ConfigError, match=named) as error:
        load_spec(tmp_path)
    assert error.value.remedy
