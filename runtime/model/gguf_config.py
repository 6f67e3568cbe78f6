"""What a GGUF file's metadata and tensor names mean in Hugging Face's terms.

A key of the architecture that is not known here may change what the model computes, so it is refused by name.
"""

from __future__ import annotations

import math
import re
from typing import Any

from runtime.errors import ConfigError
from runtime.model.gguf_file import GGUFFile, refused

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
"""By general.architecture. Mistral's files say llama."""
SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
KNOWN = {
    *SIZES,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "context_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
    "tensor_data_layout",
    "vocab_size",
}
NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "embedding_scale": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 1.0,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
    "residual_scale": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "use_parallel_residual": False,
}
"""Keys that may be there with the one value under which they change nothing."""

ORIGINAL = "Name the model's original safetensors checkpoint instead."
BROKEN = "Fetch the file again, or convert the model anew."
FREQUENCIES = "rope_freqs.weight"
END_TOKENS = ("eos", "eot", "eom")
"""tokenizer.ggml.*_token_id: end of text, of a turn, of a message to a tool."""

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA3_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA3_WINDOWS, GEMMA3_LOCAL_THETA = 6, 10000.0
"""What llama.cpp has of its own for these files: each sixth layer sees everything, the others rotate by this base."""
GEMMA3_27B_LAYERS = 62
"""The one size whose scores are scaled by the hidden size per head."""
LEFT_OVER = re.compile(r"(blk\.\d+\.)?attn_rot_embd(\.weight)?")
"""Plain frequencies, which early files have and nobody reads."""


def hugging_face_name(name: str, architecture: str) -> str | None:
    """What the tensor `name` is called in a Hugging Face checkpoint; None if no model of the architecture has it."""
    in_layer = IN_LAYER | (GEMMA3_NORMS if architecture == "gemma3" else {})
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        part = in_layer.get(layer[2])
        return f"model.layers.{layer[1]}.{part}.{kind}" if part else None
    return f"{TOP[stem]}.{kind}" if stem in TOP else None


class Metadata:
    """The values of one architecture, each checked for its type when it is read."""

    def __init__(self, file: GGUFFile) -> None:
        self.file, self.values = file, file.metadata
        self.architecture = str(self.values.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            supported = ", ".join(sorted(ARCHITECTURES))
            problem = f"cannot be converted: unsupported architecture {self.architecture}"
            raise refused(file.paths[0], problem, f"Supported in GGUF files: {supported}.")
        for key, value in self.values.items():
            short = key.removeprefix(f"{self.architecture}.")
            if short == key or short in KNOWN:
                continue
            if short not in NEUTRAL or value != NEUTRAL[short]:
                raise self.wrong(short, "is not supported", ORIGINAL)

    def wrong(
        self, key: str, problem: str, remedy: str = "Fetch the file again, or convert the model anew."
    ) -> ConfigError:
        """An error about the value of a key."""
        full = key if key in self.values and "." in key else f"{self.architecture}.{key}"
        shown = f" = {self.values[full]!r:.60}" if full in self.values else ""
        return refused(self.file.paths[0], f"its {full}{shown} {problem}", remedy)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.values.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise self.wrong(key, "is missing")
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # one per layer, all the same
        if isinstance(value, list):
            raise self.wrong(key, "differs from layer to layer, which is not supported", ORIGINAL)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.wrong(key, "is not a positive number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.number(key, default)
        if value != int(value):
            raise self.wrong(key, "is not a whole number")
        return int(value)

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """tokenizer.ggml.NAME_token_id, where it is set."""
        key = f"tokenizer.ggml.{name}_token_id"
        value = self.values.get(key)
        if value is None or value in (-1, 0xFFFFFFFF):  # llama.cpp's "none"
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise self.wrong(key, f"is no token: the model has {vocab_size}")
        return value


def hugging_face_config(file: GGUFFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json of the model in `file`. Raises ConfigError naming what cannot be run."""
    data = Metadata(file)
    config: dict[str, Any] = {name: data.count(key) for key, name in SIZES.items()}
    heads = config["num_attention_heads"]
    head_dim = data.count("attention.key_length", config["hidden_size"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if data.count(key, head_dim) != head_dim:
            raise data.wrong(key, f"is not the size of a head, {head_dim}, which is not supported", ORIGINAL)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise refused(file.paths[0], "it has no tensor token_embd.weight", "Fetch it again.")
    vocab_size = embedding.shape[0]
    special = {name: data.token_id(name, vocab_size) for name in ("bos", "padding", "unknown", *END_TOKENS)}
    ends = list(dict.fromkeys(special[name] for name in END_TOKENS if special[name] is not None))
    names = {hugging_face_name(name, data.architecture) for name in file.tensors}
    architecture = ARCHITECTURES[data.architecture]
    config |= {
        "architectures": [architecture],
        "model_type": data.architecture,
        "num_key_value_heads": data.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "max_position_embeddings": data.count("context_length"),
        "rms_norm_eps": data.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(data, head_dim),
        "tie_word_embeddings": "lm_head.weight" not in names,
        "bos_token_id": special["bos"],
        "eos_token_id": ends or None,
        "pad_token_id": special["padding"],
        "dtype": "float32",
    }
    if data.architecture != "qwen2":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in names
    if data.architecture == "llama":
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in names
    tokens = {"bos_token_id": special["bos"], "eos_token_id": ends or None, "pad_token_id": special["padding"]}
    generation = {name: value for name, value in tokens.items() if value is not None}
    if data.architecture == "gemma3":
        return config | _gemma3(data, config), generation
    has_window = data.values.get(f"{data.architecture}.attention.sliding_window")  # zero is none
    window = data.count("attention.sliding_window") if has_window else config["max_position_embeddings"]
    if window < config["max_position_embeddings"]:
        if data.architecture != "llama" or config["attention_bias"] or config["mlp_bias"]:
            raise data.wrong("attention.sliding_window", "is not supported: which layers have it is not said", ORIGINAL)
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
        del config["attention_bias"], config["mlp_bias"]
    return config, generation


def _gemma3(data: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """What config.json has of a Gemma 3 beside what all have."""
    layers, per_head = config["num_hidden_layers"], config["hidden_size"] // config["num_attention_heads"]
    rope = config["rope_parameters"]
    if rope["rope_type"] not in ("default", "linear"):
        raise data.wrong("rope.scaling.type", "is not supported", ORIGINAL)
    return {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": per_head if layers == GEMMA3_27B_LAYERS else config["head_dim"],
        "sliding_window": data.count("attention.sliding_window"),
        "layer_types": [
            "full_attention" if layer % GEMMA3_WINDOWS == GEMMA3_WINDOWS - 1 else "sliding_attention"
            for layer in range(layers)
        ],
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": GEMMA3_LOCAL_THETA},
        },
    }


def _rope(data: Metadata, head_dim: int) -> dict[str, Any]:
    """rope_parameters; llama.cpp's defaults where the file says nothing."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": data.number("rope.freq_base", 10000.0)}
    scaling = data.values.get(f"{data.architecture}.rope.scaling.type", "linear")
    if scaling not in ("none", "linear", "yarn"):
        raise data.wrong("rope.scaling.type", "is not supported", ORIGINAL)
    for name in data.file.tensors:
        if name.startswith("rope_factors_"):
            raise refused(data.file.paths[0], f"its tensor {name} (longrope) is not supported", ORIGINAL)
    # Zero is how some files say "none".
    key = next(
        (k for k in ("rope.scaling.factor", "rope.scale_linear") if data.values.get(f"{data.architecture}.{k}")), ""
    )
    factor = 1.0 if scaling == "none" or not key else float(data.number(key))
    has_frequencies = FREQUENCIES in data.file.tensors
    if scaling == "yarn":
        if has_frequencies:
            raise data.wrong("rope.scaling.type", f"and the tensor {FREQUENCIES} together are not supported", ORIGINAL)
        return parameters | _yarn(data, factor)
    for name in ("attn_factor", "yarn_attn_factor"):
        if data.number(f"rope.scaling.{name}", 1.0) != 1.0:
            raise data.wrong(f"rope.scaling.{name}", "is not supported without yarn", ORIGINAL)
    if has_frequencies:
        # Transformers' name for a factor per frequency; with both lists equal it does not depend on the length.
        factors = [factor * divisor for divisor in _divisors(data, head_dim)]
        if any(divisor != 1.0 for divisor in factors):
            context = data.count("context_length")
            return parameters | {
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
                "factor": 1.0,
                "original_max_position_embeddings": context,
            }
    elif factor != 1.0:
        parameters |= {"rope_type": "linear", "factor": factor}
    return parameters


def _yarn(data: Metadata, factor: float) -> dict[str, Any]:
    if data.values.get(f"{data.architecture}.rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise data.wrong("rope.scaling.yarn_ext_factor", "is not supported", ORIGINAL)
    attention = data.number("rope.scaling.attn_factor", 1.0) * data.number("rope.scaling.yarn_attn_factor", 1.0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": data.count(
            "rope.scaling.original_context_length", data.count("context_length")
        ),
        "attention_factor": attention * (1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0),
        "beta_fast": float(data.number("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(data.number("rope.scaling.yarn_beta_slow", 1.0)),
    }


def _divisors(data: Metadata, head_dim: int) -> list[float]:
    """By how much each frequency is divided: Llama 3.1's scaling, as llama.cpp's converter writes it."""
    import numpy as np

    stored = data.file.tensors[FREQUENCIES]
    if stored.kind != 0 or stored.shape != (head_dim // 2,):
        problem = f"its tensor {FREQUENCIES} is not float32 of shape ({head_dim // 2},)"
        raise refused(data.file.paths[0], problem, ORIGINAL)
    values = np.fromfile(stored.path, np.float32, stored.shape[0], offset=stored.offset)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise refused(
            data.file.paths[0], f"its tensor {FREQUENCIES} has values that are not positive", "Fetch it again."
        )
    return [float(value) for value in values]
