"""Tiny GGUF files, laid out as llama.cpp's converter does, and the Hugging Face models whose weights they hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.zoo import make_model

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
GEMMA3_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
VOCABULARY = 262
SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|pad|>", "<|turn|>", "<|end|>"]
"""The last tokens; the bytes come before them."""


def symbols() -> list[str]:
    """How byte-level tokenizers write the bytes 0..255."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def gguf_model(variant: str = "llama", **overrides: Any) -> Any:
    """A random model that `write_gguf` can write."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64}
    sizes = {"intermediate_size": 96, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    return make_model(variant, **(heads | sizes | {"eos_token_id": None} | overrides))


def write_gguf(
    path: Path,
    model: Any,
    edit: Callable[[dict[str, Any], dict[str, Any]], object] = lambda values, tensors: None,
    kind: str = "F32",
    architecture: str | None = None,
    parts: int = 0,
) -> Path:
    """Write `model` to `path`, its matrices in type `kind`, and round its own weights in the same way.

    `edit` may change the metadata, by key, and the tensors, by name, before they are written; a list stands for an
    array. `parts`: how many files to split it into, each named as llama.cpp names them; returns the first.
    """
    config = model.config
    architecture = architecture or config.model_type.removesuffix("_text")
    is_gemma = architecture == "gemma3"
    names = NAMES | (GEMMA3_NORMS if is_gemma else {})
    values: dict[str, Any] = {
        "general.architecture": architecture,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{architecture}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*symbols(), *SPECIAL],
        "tokenizer.ggml.token_type": [1] * 256 + [3] * len(SPECIAL),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": VOCABULARY - 1,
    }
    tensors: dict[str, Any] = {}
    quantised = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stem, _, ending = name.rpartition(".")
            layer = re.match(r"model\.layers\.(\d+)\.(.*)", stem)
            short = names[layer[2] if layer else stem]
            turned = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short, 0)
            turned = turned if architecture == "llama" else 0
            stored = parameter.numpy() + np.float32(is_gemma and parameter.dim() == 1)
            if turned:  # pairs half a head apart come to stand side by side
                stored = stored.reshape(turned, 2, -1, *stored.shape[1:]).swapaxes(1, 2).reshape(stored.shape)
            raw_type = quantised if parameter.dim() == 2 else gguf.GGMLQuantizationType.F32
            stored = gguf.quants.quantize(stored, raw_type)
            tensors[f"blk.{layer[1]}.{short}.{ending}" if layer else f"{short}.{ending}"] = (stored, raw_type)
            exact = gguf.quants.dequantize(stored, raw_type) - np.float32(is_gemma and parameter.dim() == 1)
            if turned:
                exact = exact.reshape(turned, -1, 2, *exact.shape[1:]).swapaxes(1, 2).reshape(exact.shape)
            parameter.copy_(torch.from_numpy(exact.copy()))
    edit(values, tensors)
    if not parts:
        _write(path, values, tensors)
        return path
    paths = [path.with_name(f"{path.stem}-{number + 1:05d}-of-{parts:05d}.gguf") for number in range(parts)]
    names = list(tensors)
    for number, place in enumerate(paths):
        split = {"split.no": number, "split.count": parts, "split.tensors.count": len(tensors)}
        head = values if number == 0 else {"general.architecture": architecture}
        _write(place, head | split, {name: tensors[name] for name in names[number::parts]})
    return paths[0]


def _write(path: Path, values: dict[str, Any], tensors: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, values["general.architecture"])
    for key, value in values.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (stored, kind) in tensors.items():
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
