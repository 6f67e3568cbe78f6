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
from runtime.model.layout import GPT_NEOX, LLAMA, PHI3, Layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from runtime.config import CacheConfig


Norm = Literal["rms", "layer"]
Norms = Literal["before", "after", "around"]
"""Where a layer's norms stand: before attention and MLP, behind them, or both."""
NORM_NAMES: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "around": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


@dataclass(frozen=True)
class Architecture:
    """How a Hugging Face architecture differs from plain Llama.

    A bias is there always, never, or as the named config field says.
    """

    model_type: str
    layout: Layout = LLAMA
    """Where its checkpoints have which tensor."""
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    """RMS norm over each query and key head, before the rotation."""
    qk_norm_whole: bool = False
    """The same over all heads together."""
    norm: Norm = "rms"
    norm_eps: str = "rms_norm_eps"
    """The config's field."""
    norms: Norms = "before"
    norm_offset: bool = False
    """Checkpoints have norms' weights less 1."""
    embedding_scaled: bool = False
    """Token vectors are multiplied by the root of their size."""
    activation: str = "hidden_act"
    """The config's field."""
    query_scalar: str | None = None
    """The config's field whose inverse root scales the scores; None: that of the head's size does."""
    local_rope: bool = False
    """Layers with a sliding window have a rotation of their own."""
    refused: tuple[str, ...] = ()
    """Fields of the config that must be null or false."""
    gated: bool = True
    """The MLP is down(act(gate(x)) * up(x)); else down(act(up(x)))."""
    parallel: bool | str = False
    """Attention and MLP have the same input, and are added together."""
    grouped: bool = True
    """Several query heads may share a key head."""
    partial_rotary: bool = False
    """Its heads may be rotated in part."""
    windows: Literal["none", "every_layer", "layer_types"] = "none"
    """Which layers `sliding_window` bounds."""


def _with_attention_bias(model_type: str, **differences: Any) -> Architecture:
    return Architecture(model_type, qkv_bias="attention_bias", o_bias="attention_bias", **differences)


ARCHITECTURES = {
    "LlamaForCausalLM": _with_attention_bias("llama", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Architecture("mistral", windows="every_layer"),
    "Qwen2ForCausalLM": Architecture("qwen2", qkv_bias=True, windows="layer_types"),
    "Qwen3ForCausalLM": _with_attention_bias("qwen3", qk_norm=True, windows="layer_types"),
    "Phi3ForCausalLM": Architecture("phi3", layout=PHI3, windows="every_layer", partial_rotary=True),
    "Olmo2ForCausalLM": _with_attention_bias("olmo2", qk_norm_whole=True, norms="after"),
    "Gemma3ForCausalLM": _with_attention_bias(
        "gemma3_text",
        qk_norm=True,
        norms="around",
        norm_offset=True,
        embedding_scaled=True,
        activation="hidden_activation",
        query_scalar="query_pre_attn_scalar",
        windows="layer_types",
        local_rope=True,
        refused=("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"),
    ),
    "GPTNeoXForCausalLM": _with_attention_bias(
        "gpt_neox",
        layout=GPT_NEOX,
        mlp_bias=True,
        norm="layer",
        norm_eps="layer_norm_eps",
        gated=False,
        parallel="use_parallel_residual",
        grouped=False,
        partial_rotary=True,
    ),
}


def beyond_llama(model: Architecture | ModelSpec) -> str | None:
    """What a family, or a model of it, has that kernels written for the Llama family do not; None: nothing."""
    reasons = {
        "layer norms": model.norm != "rms",
        "norms behind attention and MLP": model.norms != "before",
        "token vectors that are scaled": model.embedding_scaled,
        "rotations that differ from layer to layer": model.local_rope,
        "norms over all heads together": model.qk_norm_whole,
        "an MLP without a gate": not model.gated,
        "attention and MLP side by side": model.parallel,
    }
    return next((name for name, is_so in reasons.items() if is_so), None)


LAYER_TYPES = ("full_attention", "sliding_attention")
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

    @property
    def num_rotated(self) -> int:
        """Features of a head that are rotated, the first ones; frequencies of the others are 0."""
        return 2 * sum(frequency > 0 for frequency in self.inv_freq)


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
    """Of layer norms, too."""
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
    qk_norm_whole: bool = False
    norm: Norm = "rms"
    norms: Norms = "before"
    norm_offset: bool = False
    embedding_scaled: bool = False
    query_factor: float = 1.0
    """By which scores differ from those scaled by head_dim ** -0.5."""
    local_rope: RopeSpec | None = None
    """Of layers with a sliding window; None: theirs is that of all."""
    gated: bool = True
    parallel: bool = False

    @property
    def norm_names(self) -> tuple[str | None, str | None, str | None, str | None]:
        """Of a layer: before attention and behind it, before the MLP and behind it; None where there is none."""
        return NORM_NAMES[self.norms]

    @property
    def beyond_llama(self) -> str | None:
        """What a layer has that kernels written for the Llama family do not; None: nothing."""
        return beyond_llama(self)

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
        activation = getattr(config, kind.activation)
        if activation not in ACTIVATIONS:
            raise _unsupported(kind.activation, activation, "activation", ACTIVATIONS)
        for field in kind.refused:
            if getattr(config, field):
                raise ConfigError(field, getattr(config, field), "is not supported", "Use a model that has none.")

        def switch(value: bool | str) -> bool:
            return bool(getattr(config, value)) if isinstance(value, str) else value

        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if kv_heads != heads and not kind.grouped:
            problem = f"is not num_attention_heads = {heads}, and {name} has a key head for each"
            raise ConfigError("num_key_value_heads", kv_heads, problem, "Mend the model's config.json.")
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
            rms_eps=getattr(config, kind.norm_eps),
            tie_embeddings=bool(config.tie_word_embeddings),
            qkv_bias=switch(kind.qkv_bias),
            o_bias=switch(kind.o_bias),
            mlp_bias=switch(kind.mlp_bias),
            qk_norm=kind.qk_norm,
            sliding_windows=_sliding_windows(config, kind),
            max_positions=config.max_position_embeddings,
            eos_token_ids=eos_token_ids,
            activation=activation,
            rope=_rope_spec(config, head_dim, kind, "full_attention" if kind.local_rope else None),
            qk_norm_whole=kind.qk_norm_whole,
            norm=kind.norm,
            norms=kind.norms,
            norm_offset=kind.norm_offset,
            embedding_scaled=kind.embedding_scaled,
            query_factor=1.0 if kind.query_scalar is None else (head_dim / getattr(config, kind.query_scalar)) ** 0.5,
            local_rope=_rope_spec(config, head_dim, kind, "sliding_attention") if kind.local_rope else None,
            gated=kind.gated,
            parallel=switch(kind.parallel),
        )


def read_spec(raw: Mapping[str, Any], generation: Mapping[str, Any], source: Path) -> ModelSpec:
    """The model that config.json and generation_config.json of `source` describe, `raw` and `generation`.

    End tokens: where generation_config.json names any, those alone, as in transformers' generate; else those that
    config.json itself names, never the default of a class. (What ends a turn of a chat beyond these, its template
    says: `Tokenizer.turn_end_id`.)

    Raises ConfigError naming what is wrong with a value, or what Outrider cannot run.
    """
    architecture = architecture_name(raw)  # before transformers, whose import is slow and whose refusals are vague
    kind = ARCHITECTURES[architecture]
    values = Values(raw, "config.json", source)
    if raw.get("model_type", kind.model_type) != kind.model_type:
        raise values.refused("model_type", f"is not that of {architecture}, {kind.model_type}")
    values.check(kind.norm_eps, kind.partial_rotary, LAYER_TYPES if kind.local_rope else ())
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
        if layer_type not in LAYER_TYPES:
            raise _unsupported("layer_types", layer_type, "layer type", LAYER_TYPES)
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in config.layer_types)


def _rope_spec(config: PretrainedConfig, head_dim: int, kind: Architecture, layer_type: str | None = None) -> RopeSpec:
    """`layer_type`: where rotations differ from layer to layer, of which layers."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    of_layers = {} if layer_type is None else {"layer_type": layer_type}
    rope_type = parameters["rope_type"]
    # A factor for each frequency, whatever the length, goes by this name; converted GGUF files have it.
    is_static = parameters.get("short_factor") == parameters.get("long_factor") and "attention_factor" in parameters
    if rope_type not in ROPE_TYPES and not (rope_type == "longrope" and is_static):
        raise _unsupported("rope_parameters.rope_type", rope_type, "RoPE scaling", ROPE_TYPES)
    share = parameters.get("partial_rotary_factor", 1.0)
    rotated = int(head_dim * share)
    if share != 1.0 and (not kind.partial_rotary or rope_type == "dynamic" or rotated % 2 or not rotated):
        problem = f"rotating {rotated} of the {head_dim} features of a head, with {rope_type} scaling, is not supported"
        raise ConfigError("rope_parameters.partial_rotary_factor", share, problem, "Use a model that has 1.0.")
    theta = parameters["rope_theta"]
    dynamic, reach = None, None
    if rope_type == "default":
        inv_freq, scaling = 1.0 / (theta ** (torch.arange(0, rotated, 2, dtype=torch.float) / rotated)), 1.0
    else:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), **of_layers)
    if rope_type == "dynamic" and kind.local_rope:
        remedy = "Use a model with another scaling."
        raise ConfigError("rope_parameters.rope_type", rope_type, "differs from layer to layer", remedy)
    if rope_type == "dynamic":
        dynamic = DynamicRope(theta, parameters["factor"], config.max_position_embeddings)
    elif rope_type in ("linear", "yarn", "llama3"):
        unscaled = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        reach = int(unscaled * parameters["factor"])
    if share != 1.0 and scaling != 1.0:
        problem = f"with a share of a head rotated, the factor {scaling} on its length is not supported"
        raise ConfigError("rope_parameters.rope_type", rope_type, problem, "Use a model that has 1.0.")
    still = (0.0,) * ((head_dim - rotated) // 2)  # turned by nothing
    return RopeSpec((*inv_freq.tolist(), *still), scaling, dynamic, reach)
