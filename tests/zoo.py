"""Tiny random models of every architecture and rope variant, and ways to run rows through a decoder."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.mesh.group import Group
from runtime.mesh.mesh import Mesh
from runtime.model.attention import RowBatch
from runtime.model.decoder import Decoder
from runtime.model.loader import load_decoder
from runtime.retention import LayerGroup, Sliding

TRAINED = 16
"""max_position_embeddings of every zoo model; the tests run past it."""

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
}

# 9 heads over 3 and 8 over 2; 53 inner features and 101 tokens divide by nothing
NINE = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}
EIGHT = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
NEOX = {"hidden_size": 64, "num_attention_heads": 8, "hidden_act": "gelu"}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", NINE),
    "llama-tied": ("Llama", {**NINE, "tie_word_embeddings": True}),
    "llama-attention_bias": ("Llama", {**NINE, "attention_bias": True}),
    "llama-mlp_bias": ("Llama", {**EIGHT, "mlp_bias": True, "attention_bias": True}),
    "llama-head_dim": ("Llama", {**EIGHT, "head_dim": 20}),
    "llama-gelu": ("Llama", {**NINE, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-one_kv_head": ("Llama", {**EIGHT, "num_key_value_heads": 1}),
    "llama-no_groups": ("Llama", {**EIGHT, "num_key_value_heads": 8}),
    "mistral": ("Mistral", {**EIGHT, "sliding_window": None}),
    "mistral-window": ("Mistral", {**NINE, "sliding_window": 7}),
    "qwen2": ("Qwen2", EIGHT),
    "qwen2-tied-window": (
        "Qwen2",
        {**NINE, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", NINE),
    "qwen3-bias-window": (
        "Qwen3",
        {**EIGHT, "attention_bias": True, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
}
VARIANTS |= {
    "neox": ("GPTNeoX", {**NEOX, "rotary_pct": 0.25}),
    "neox-whole-rotary": ("GPTNeoX", {**NEOX, "rotary_pct": 1.0, "rotary_emb_base": 500}),
    "neox-serial": ("GPTNeoX", {**NEOX, "use_parallel_residual": False, "rotary_pct": 0.5}),
    "neox-tied": ("GPTNeoX", {**NEOX, "tie_word_embeddings": True, "attention_bias": False}),
    "phi3": ("Phi3", {**NINE, "sliding_window": None, "pad_token_id": None}),
    "phi3-window-part": (
        "Phi3",
        {
            **EIGHT,
            "sliding_window": 6,
            "pad_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        },
    ),
    "olmo2": ("Olmo2", {**NINE, "pad_token_id": None}),
    "olmo2-bias-one_kv_head": (
        "Olmo2",
        {**EIGHT, "num_key_value_heads": 1, "attention_bias": True, "pad_token_id": None},
    ),
}
GEMMA3 = {"pad_token_id": None, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
BY_LAYER = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
}
VARIANTS |= {
    "gemma3": ("Gemma3", {**NINE, **GEMMA3, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}),
    "gemma3-ropes": ("Gemma3", {**EIGHT, **GEMMA3, "query_pre_attn_scalar": 12, "rope_parameters": BY_LAYER}),
}
VARIANTS |= {
    f"{kind.lower()}-rope-{rope}": (kind, {**heads, "rope_parameters": {"rope_theta": 1e4, **parameters}})
    for kind, heads in (("Llama", NINE), ("Mistral", EIGHT), ("Qwen2", NINE), ("Qwen3", EIGHT))
    for rope, parameters in ROPES.items()
}


def make_config(variant: str, **overrides: Any) -> Any:
    import transformers

    architecture, settings = VARIANTS[variant]
    shared = {
        "vocab_size": 101,
        "intermediate_size": 53,
        "num_hidden_layers": 2,
        "max_position_embeddings": TRAINED,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": 7,
    }
    suffix = "TextConfig" if architecture == "Gemma3" else "Config"
    return getattr(transformers, f"{architecture}{suffix}")(**{**shared, **settings, **overrides})


def make_model(variant: str, **overrides: Any) -> Any:
    """A Hugging Face model with every parameter random, biases and norms too."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, f"{VARIANTS[variant][0]}ForCausalLM")(make_config(variant, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 101, count).tolist()


class Runner:
    """Rows of one or more sequences through a decoder, one cache slot each."""

    def __init__(self, decoder: Decoder, num_slots: int = 1, capacity: int = 128, max_staged: int = 64) -> None:
        self.decoder = decoder
        everything = LayerGroup(tuple(range(decoder.spec.num_layers)), lambda: Sliding(None, capacity, slot=False))
        self.caches = decoder.make_caches([everything], num_slots, max_staged=max_staged)

    def rows(
        self,
        tokens: list[int],
        parents: list[int] | None = None,
        slots: list[int] | None = None,
        rope_length: int = 0,
    ) -> torch.Tensor:
        """Logits [T, V_local] of rows behind what is committed; without `parents` one row after the other."""
        batch = self.batch(tokens, parents, slots, rope_length)
        return self.decoder.logits(self.decoder.forward(batch, self.caches))

    def batch(
        self,
        tokens: list[int],
        parents: list[int] | None = None,
        slots: list[int] | None = None,
        rope_length: int = 0,
    ) -> RowBatch:
        """Those rows, as `forward` wants them."""
        count = len(tokens)
        parents = list(range(-1, count - 1)) if parents is None else parents
        slots = [0] * count if slots is None else slots
        positions: list[int] = []
        for parent, slot in zip(parents, slots, strict=True):
            positions.append(self.caches[0].retained[slot].length if parent < 0 else positions[parent] + 1)
        arrays = (np.array(column) for column in (tokens, positions, parents, slots, [rope_length] * count))
        return RowBatch.build(*arrays, device=self.decoder.batch_device)

    def extend(self, tokens: list[int], slot: int = 0, rope_length: int = 0) -> torch.Tensor:
        """Like `rows` for a plain continuation of one sequence, which is committed."""
        logits = self.rows(tokens, slots=[slot] * len(tokens), rope_length=rope_length)
        self.commit(range(len(tokens)), tokens, slot)
        return logits

    def commit(self, staged: Sequence[int], tokens: Sequence[int], slot: int = 0) -> None:
        """Make staged rows, whose ids are `tokens`, part of the sequence."""
        for cache in self.caches:
            cache.commit(slot, staged, tokens)


def run_tensor_parallel(rank: int, tp: int, directory: Path) -> None:
    """One rank: every model under `directory`, against the logits stored with it; differences go to a file.

    Runs in a process of its own, which never imports transformers: that would take longer than the work.
    """
    import torch.distributed as dist

    torch.set_num_threads(1)
    group = Group(dist.FileStore(f"{directory}/rendezvous-{tp}", tp), "tp", rank, tp)
    mesh = Mesh(tp=tp, shard=rank, tp_group=group)
    found = {}
    for place in sorted(path for path in directory.iterdir() if path.is_dir()):
        spec, tokens, expected = pickle.loads((place / "reference.pkl").read_bytes())
        decoder = load_decoder(place, spec, mesh, torch.float32)
        runner = Runner(decoder)
        start, stop = decoder.vocab_range
        cuts = (0, len(tokens)) if "rope" in place.name else (0, len(tokens) - 1, len(tokens))
        chunks = [runner.extend(tokens[a:b], rope_length=len(tokens)) for a, b in zip(cuts, cuts[1:], strict=False)]
        difference = (torch.cat(chunks) - torch.from_numpy(expected)[:, start:stop]).abs().max().item()
        found[place.name] = (decoder.vocab_range, decoder.heads, difference)
    (directory / f"found-{tp}-{rank}.pkl").write_bytes(pickle.dumps(found))
    group.barrier()
    mesh.leave()
