"""Where training begins: the model and the tokenizer, from a checkpoint or from nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.errors import ConfigError
from runtime.model.directory import load_spec, resolve_model
from runtime.model.spec import ARCHITECTURES, ModelSpec
from runtime.model.trained_policy import KEY
from runtime.progress import doing
from runtime.tokenizer import Tokenizer
from runtime.training import attention
from runtime.training.config import TrainingConfig

END, SINK = "<|end|>", "<|sink|>"
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DERIVED = ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id", "architectures", "model_type", KEY)
"""Keys of config.json that follow from the tokenizer and the architecture."""


@dataclass
class Trainee:
    model: Any
    """A transformers model in float32, its attention that of runtime.training.attention."""
    tokenizer: Any
    """transformers' own."""
    spec: ModelSpec
    end_id: int | None
    """Behind every document of the corpus; None where the tokenizer has none."""
    sink_id: int | None
    """The sink token, where the run has one."""


def open_trainee(config: TrainingConfig, texts: Iterable[str]) -> Trainee:
    """The model to train; `texts` is what a tokenizer of its own learns from. Raises ConfigError."""
    attention.register()
    torch.manual_seed(config.training.seed)
    if config.model.architecture is None:
        model, tokenizer, end_id, spec = _from_checkpoint(config)
    else:
        model, tokenizer, end_id, spec = _from_scratch(config, texts)
    sink_id = _add_sink(model, tokenizer) if config.sink_token else None
    model.config.use_cache = False
    return Trainee(model, tokenizer, spec, end_id, sink_id)


def _from_checkpoint(config: TrainingConfig) -> tuple[Any, Any, int | None, ModelSpec]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = resolve_model(config.model.path)
    spec = load_spec(directory)
    _check_length(config, spec)
    Tokenizer(directory)  # its refusals are typed
    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    with doing("reading the model"):
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=_attention(type_of(spec.architecture))
        )
    known = [token_id for token_id in (tokenizer.eos_token_id, *spec.eos_token_ids) if token_id is not None]
    return model, tokenizer, (known[0] if known else None), spec


def _from_scratch(config: TrainingConfig, texts: Iterable[str]) -> tuple[Any, Any, int | None, ModelSpec]:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

    name, sizes = config.model.architecture, dict(config.model.sizes)
    if name not in ARCHITECTURES:
        raise ConfigError("model.architecture", name, "is not served", f"Choose among {', '.join(ARCHITECTURES)}.")
    kind = CONFIG_MAPPING[ARCHITECTURES[name].model_type]
    known = set(kind().to_dict()) - set(DERIVED)
    for key in sizes:
        if key not in known:
            problem = "is not a key of this architecture's config.json, or follows from the tokenizer"
            raise ConfigError(f"model.sizes.{key}", sizes[key], problem, f"Known here: {', '.join(sorted(known))}.")
    for key in NEEDED:
        if key not in sizes:
            raise ConfigError(f"model.sizes.{key}", None, "is missing", "Say how large the model is to be.")
    if config.tokenizer.path is None:
        with doing("training a tokenizer"):
            tokenizer = train_tokenizer(texts, config.tokenizer.vocab_size)
    else:
        Tokenizer(config.tokenizer.path)
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer.path, local_files_only=True)
    end_id = tokenizer.eos_token_id
    sizes.setdefault("max_position_embeddings", config.data.length)
    try:
        made = kind(
            **sizes,
            vocab_size=len(tokenizer),
            eos_token_id=end_id,
            bos_token_id=None,
            pad_token_id=None,
            architectures=[name],
        )
        spec = ModelSpec.from_hf_config(made)
        _check_length(config, spec)
        model = AutoModelForCausalLM.from_config(made, attn_implementation=_attention(type_of(name)))
    except ConfigError:
        raise
    except Exception as error:  # each config class refuses in its own way
        problem = f"cannot be made a model ({' '.join(str(error).split())})"
        raise ConfigError("model.sizes", dict(config.model.sizes), problem, "Mend the sizes.") from error
    return model.float(), tokenizer, end_id, spec


def type_of(architecture: str) -> Any:
    """transformers' class of this name."""
    import transformers

    return getattr(transformers, architecture)


def _attention(kind: Any) -> str:
    """The name of our attention; raises ConfigError for a class that takes none but its own."""
    if not getattr(kind, "_supports_attention_backend", False):
        problem = "transformers' code of it takes no attention function but its own, so no policy can be trained"
        raise ConfigError("model.architecture", kind.__name__, problem, "Choose another architecture.")
    return attention.NAME


def _check_length(config: TrainingConfig, spec: ModelSpec) -> None:
    if config.data.length > spec.max_positions:
        problem = f"is more than the model's {spec.max_positions} positions"
        raise ConfigError("data.length", config.data.length, problem, "Lower it, or raise max_position_embeddings.")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Byte-level BPE, so that every text can be written."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def _add_sink(model: Any, tokenizer: Any) -> int:
    """Add the token, its vector and its place before every text, that of a chat template included."""
    from tokenizers import processors

    if SINK in tokenizer.get_vocab():
        problem = f"the tokenizer has a token {SINK} already"
        raise ConfigError("sink_token", True, problem, "Set it to false: the model was trained with one.")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        problem = "the tokenizer has no tokenizer.json, into which the sink token is written"
        raise ConfigError("sink_token", True, problem, "Save it as a fast tokenizer, or set this to false.")
    tokenizer.add_special_tokens({"additional_special_tokens": [SINK]}, replace_extra_special_tokens=False)
    sink_id = tokenizer.convert_tokens_to_ids(SINK)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    before = processors.TemplateProcessing(single=f"{SINK} $A", pair=f"{SINK} $A $B", special_tokens=[(SINK, sink_id)])
    steps = [before] if backend.post_processor is None else [backend.post_processor, before]
    backend.post_processor = processors.Sequence(steps)
    if tokenizer.chat_template is not None:
        tokenizer.chat_template = "{{- '" + SINK + "' -}}" + tokenizer.chat_template
    return int(sink_id)


def encode(tokenizer: Any, texts: Iterable[str]) -> Iterable[list[int]]:
    """Token ids of each text, no special tokens among them."""
    for text in texts:
        yield tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def directory_of(config: TrainingConfig) -> Path:
    return Path(config.output.directory).expanduser()
