"""ModelSpec: what one decoder looks like, read from a Hugging Face config.

One line of `ARCHITECTURES` describes one architecture; one decoder runs them all. A spec pickles,
and running it needs no transformers, whose import takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runtime.errors import ConfigError
from runtime.model.config_file import Values

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from runtime.config import CacheConfig


@dataclass(frozen=True)
class Architecture:
    """How a Hugging Face architecture differs from plain Llama.

    A bias is there always, never, or as the named config field says.
    """

    model_type: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    """RMS norm over each query and key head, before the rotation."""
    windows: Literal["none", "every_layer", "layer_types"] = "none"
    """Which layers `sliding_window` bounds."""


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", "attention_bias", "attention_bias", "mlp_bias"),
    "MistralForCausalLM": Architecture("mistral", windows="every_layer"),
    "Qwen2ForCausalLM": Architecture("qwen2", qkv_bias=True, windows="layer_types"),
    "Qwen3ForCausalLM": Architecture("qwen3", "attention_bias", "attention_bias", qk_norm=True, windows="layer_types"),
}

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class DynamicRope:
    """Dynamic NTK scaling: the base grows with the length once it exceeds `max_positions`."""

    theta: float
    factor: float
    max_positions: int


@dataclass(frozen=True)
class RopeSpec:
    inv_freq: tuple[float, ...]
    """head_dim / 2 inverse frequencies, radians per token."""
    attention_scaling: float = 1.0
    """Factor on cos and sin (yarn)."""
    dynamic: DynamicRope | None = None
    reach: int | None = None
    """Positions that the scaling is made for, where they are more than the model's trained length."""


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of one model, whole (not one rank's share)."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    """Per layer: a query at position p sees keys at positions > p - window; None sees all."""
    max_positions: int
    """Trained context, tokens."""
    eos_token_ids: tuple[int, ...]
    activation: str
    rope: RopeSpec

    def check_tp(self, tp: int) -> None:
        """Raises ConfigError if the model cannot be split over `tp` ranks."""
        if tp > self.num_heads:
            problem = f"the model has {self.num_heads} query heads, and every tensor-parallel rank needs one"
            remedy = f"Use at most {self.num_heads}; give further devices to parallel.lp."
            raise ConfigError("parallel.tp", tp, problem, remedy)

    def check_cache(self, cache: CacheConfig) -> None:
        """Raises ConfigError if the model cannot be run under this cache policy."""
        most = max(self.max_positions, self.rope.reach or 0)
        if cache.bounded and not cache.beyond_trained and self.rope.dynamic is None and (cache.capacity or 0) > most:
            problem = f"the model was trained on {most} positions, and says nothing sensible behind them"
            remedy = f"Use at most {most}, or cache.policy = sink; cache.beyond_trained = true runs it all the same."
            raise ConfigError("cache.capacity", cache.capacity, problem, remedy)
        for layer in cache.full_layers or ():
            if not -self.num_layers <= layer < self.num_layers:
                remedy = f"Name layers from {-self.num_layers} to {self.num_layers - 1}."
                problem = f"the model has {self.num_layers} layers"
                raise ConfigError("cache.full_layers", list(cache.full_layers or ()), problem, remedy)
        if cache.positions != "slot" or cache.size is None:
            return
        remedy = "Set cache.positions to original."
        if self.rope.dynamic is not None:
            problem = "dynamic RoPE scaling depends on positions in the text"
            raise ConfigError("cache.positions", "slot", problem, remedy)
        windows = [window for window in self.sliding_windows if window is not None]
        most = cache.size + (cache.compact_at == "after")
        if windows and most > min(windows):
            problem = f"the {most} tokens that one may see exceed the model's own sliding window of {min(windows)}"
            raise ConfigError("cache.positions", "slot", problem, f"Make the cache smaller. {remedy}")

    @classmethod
    def from_hf_config(cls, config: PretrainedConfig, eos_token_ids: tuple[int, ...] | None = None) -> ModelSpec:
        """Read a text model's config; `eos_token_ids` None: the end tokens are those of `config`.

        Raises ConfigError naming the field that Outrider cannot run, and what it can.
        """
        name = architecture_name(config.to_dict())
        kind = ARCHITECTURES[name]
        if config.hidden_act not in ACTIVATIONS:
            raise _unsupported("hidden_act", config.hidden_act, "activation", ACTIVATIONS)

        def switch(value: bool | str) -> bool:
            return bool(getattr(config, value)) if isinstance(value, str) else value

        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads or heads
        if heads % kv_heads:
            problem = f"does not divide num_attention_heads = {heads}"
            raise ConfigError("num_key_value_heads", kv_heads, problem, "Mend the model's config.json.")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        if eos_token_ids is None:
            eos_token_ids = Values(config.to_dict(), "config.json", Path()).end_tokens(config.vocab_size)
        return cls(
            architecture=name,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            rms_eps=config.rms_norm_eps,
            tie_embeddings=bool(config.tie_word_embeddings),
            qkv_bias=switch(kind.qkv_bias),
            o_bias=switch(kind.o_bias),
            mlp_bias=switch(kind.mlp_bias),
            qk_norm=kind.qk_norm,
            sliding_windows=_sliding_windows(config, kind),
            max_positions=config.max_position_embeddings,
            eos_token_ids=eos_token_ids,
            activation=config.hidden_act,
            rope=_rope_spec(config, head_dim),
        )


def read_spec(raw: Mapping[str, Any], generation: Mapping[str, Any], source: Path) -> ModelSpec:
    """The model that config.json and generation_config.json of `source` describe, `raw` and `generation`.

    End tokens: where generation_config.json names any, those alone, as in transformers' generate; else those that
    config.json itself names, never the default of a class. (What ends a turn of a chat beyond these, its template
    says: `Tokenizer.turn_end_id`.)

    Raises ConfigError naming what is wrong with a value, or what Outrider cannot run.
    """
    architecture = architecture_name(raw)
    kind = ARCHITECTURES[architecture]
    values = checked_values(raw, source)
    eos_token_ids = Values(generation, "generation_config.json", source).end_tokens(raw["vocab_size"])
    eos_token_ids = eos_token_ids or values.end_tokens(raw["vocab_size"])
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[kind.model_type].from_dict({**raw, "architectures": [architecture]})
        return ModelSpec.from_hf_config(config, eos_token_ids)
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        problem = f"cannot be read ({' '.join(str(error).split())})"
        raise ConfigError("config.json", str(source), problem, "Mend the file.") from error


def checked_values(raw: Mapping[str, Any], source: Path) -> Values:
    """What config.json of `source` says, `raw`, each value on its own. Raises ConfigError for what Outrider cannot run.

    Needs no transformers, whose import is slow and whose refusals are vague.
    """
    architecture = architecture_name(raw)
    kind, values = ARCHITECTURES[architecture], Values(raw, "config.json", source)
    if raw.get("model_type", kind.model_type) != kind.model_type:
        raise values.refused("model_type", f"is not that of {architecture}, {kind.model_type}")
    values.check()
    return values


def architecture_name(config: Mapping[str, Any]) -> str:
    """The key of ARCHITECTURES that a config.json asks for; raises ConfigError if there is none.

    Quantised checkpoints are refused here too: their weights are not plain tensors.
    """
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", quantization) if isinstance(quantization, Mapping) else quantization
        remedy = "Name an unquantised safetensors checkpoint, or a GGUF file, which is dequantised on loading."
        raise ConfigError("quantization_config", method, "quantised Hugging Face checkpoints are not supported", remedy)
    names = config.get("architectures") or [
        name for name, kind in ARCHITECTURES.items() if kind.model_type == config.get("model_type")
    ]
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and name in ARCHITECTURES:
            return name
    raise _unsupported("architectures", names or config.get("model_type"), "architecture", ARCHITECTURES)


def _unsupported(field: str, value: Any, what: str, supported: Any) -> ConfigError:
    return ConfigError(field, value, f"unsupported {what}", f"Supported: {', '.join(supported)}.")


def _sliding_windows(config: PretrainedConfig, kind: Architecture) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if kind.windows == "none" or window is None:
        return (None,) * config.num_hidden_layers
    if kind.windows == "every_layer":
        return (window,) * config.num_hidden_layers
    for layer_type in config.layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise _unsupported("layer_types", layer_type, "layer type", ("full_attention", "sliding_attention"))
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in config.layer_types)


def _rope_spec(config: PretrainedConfig, head_dim: int) -> RopeSpec:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    rope_type = parameters["rope_type"]
    # A factor for each frequency, whatever the length, goes by this name; converted GGUF files have it.
    is_static = parameters.get("short_factor") == parameters.get("long_factor") and "attention_factor" in parameters
    if rope_type not in ROPE_TYPES and not (rope_type == "longrope" and is_static):
        raise _unsupported("rope_parameters.rope_type", rope_type, "RoPE scaling", ROPE_TYPES)
    rotated = parameters.get("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        problem = "rotating a part of each head is not supported"
        raise ConfigError("rope_parameters.partial_rotary_factor", rotated, problem, "Use a model that has 1.0.")
    theta = parameters["rope_theta"]
    dynamic, reach = None, None
    if rope_type == "default":
        inv_freq, scaling = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim)), 1.0
    else:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    if rope_type == "dynamic":
        dynamic = DynamicRope(theta, parameters["factor"], config.max_position_embeddings)
    elif rope_type in ("linear", "yarn", "llama3"):
        unscaled = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        reach = int(unscaled * parameters["factor"])
    return RopeSpec(tuple(inv_freq.tolist()), scaling, dynamic, reach)
