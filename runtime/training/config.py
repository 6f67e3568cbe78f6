"""The tree of settings of `outrider train`. `TrainingConfig.load` is the way in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from runtime.config import CacheConfig, Section, Tree

Scalar = int | float | bool | str | None
SETTINGS_MAY_CHANGE = {"output.save_every", "output.keep", "output.evaluate_every", "output.log_every"}
"""What a run that is resumed may have changed; all else would make another run of it."""


class ModelSource(Section):
    """Where training begins: from a checkpoint, or from nothing."""

    path: str | None = None
    """Post-training: directory, GGUF file or hub id; null, with `architecture` null as well, is the embedded model."""
    architecture: str | None = None
    """From scratch: an architecture that Outrider serves, e.g. LlamaForCausalLM."""
    sizes: dict[str, Scalar | dict[str, Scalar]] = {}
    """From scratch: keys of the architecture's config.json. hidden_size, intermediate_size, num_hidden_layers and
    num_attention_heads must be there. max_position_embeddings is data.length where it is not; vocab_size and end
    tokens follow from the tokenizer."""

    @field_validator("path", mode="before")
    @classmethod
    def _as_text(cls, path: Any) -> Any:
        return str(path) if isinstance(path, PurePath) else path

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.path is not None and self.architecture is not None:
            raise ValueError("architecture: a model is made from scratch or read from path; leave one of the two out")
        if self.sizes and self.architecture is None:
            raise ValueError("sizes: are for a model from scratch; leave them out, or name its architecture")
        return self


class TokenizerSource(Section):
    path: str | None = None
    """Directory of a tokenizer, for a model from scratch; null trains one on the corpus."""
    vocab_size: int = Field(default=4096, ge=260, le=1_000_000)
    """Tokens of a byte-level BPE tokenizer that is trained on the corpus."""


class DataConfig(Section):
    files: tuple[str, ...] = Field(min_length=1)
    """The corpus: UTF-8 text files, each a document, and JSON-lines files (.jsonl), each line a document."""
    text_field: str = Field(default="text", min_length=1)
    """The field of a JSON line that has the text."""
    length: int = Field(default=512, ge=8)
    """Tokens of a sample, into which documents are packed. A token sees its own document only, and positions count from
    the document's beginning in the sample."""
    validation_files: tuple[str, ...] = ()
    """What is measured as validation loss; empty takes validation_share of the samples."""
    validation_share: float = Field(default=0.02, ge=0, lt=1)
    """Of the samples, the last ones, kept apart for validation; 0 measures none."""


class StridedConfig(Section):
    """SepLLM's baseline with fixed intervals (FixLLM): initial tokens, every stride-th token, and the newest."""

    stride: int = Field(ge=1)
    """Of each document, tokens at multiples of it are kept."""
    num_initial: int = Field(default=4, ge=0)
    """Initial tokens kept."""
    num_neighbors: int = Field(default=256, ge=1)
    """Recent tokens seen, the current one included."""


class OptimizationConfig(Section):
    steps: int = Field(default=1000, ge=1)
    """Updates of the weights."""
    batch_size: int = Field(default=8, ge=1)
    """Samples at a time on each device."""
    accumulate: int = Field(default=1, ge=1)
    """Batches that one step adds up."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """The highest, behind the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's, on matrices."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Longer gradients are shortened to it."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's, of the mean of gradients."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's, of the mean of their squares."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of products; bfloat16 keeps the weights themselves, and their sums, in float32."""
    attention: Literal["auto", "dense", "flex"] = "auto"
    """dense: a mask per batch and torch's scaled_dot_product_attention. flex: flex_attention, which skips what nobody
    sees. auto takes flex on CUDA."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes cuda where torch finds one."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of a new model's weights, of a sink token's vector, and of the order of samples."""


class OutputConfig(Section):
    directory: str = Field(min_length=1)
    """Gets model/ (what is served), checkpoints/, log.jsonl, loss.png and training.json."""
    save_every: int = Field(default=500, ge=1)
    """Steps between checkpoints, from which a run can be resumed."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that stay."""
    evaluate_every: int = Field(default=250, ge=1)
    """Steps between measurements of the validation loss."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of progress."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in model/."""

    @field_validator("directory", mode="before")
    @classmethod
    def _as_text(cls, path: Any) -> Any:
        return str(path) if isinstance(path, PurePath) else path


class TrainingConfig(Tree):
    """A training run."""

    model: ModelSource = ModelSource()
    tokenizer: TokenizerSource = TokenizerSource()
    data: DataConfig
    cache: CacheConfig = CacheConfig()
    """What a token sees: the section of the same name of a serving config. `capacity` bounds nothing in training."""
    strided: StridedConfig | None = None
    """A baseline for training alone, in place of `cache`: it cannot be served."""
    sink_token: bool = False
    """Put a token of its own before every document, on which attention can rest (StreamingLLM, section 3.3). It is
    added to tokenizer and embedding, and cache.num_sinks becomes 1."""
    training: OptimizationConfig = OptimizationConfig()
    output: OutputConfig

    @model_validator(mode="before")
    @classmethod
    def _one_sink(cls, given: Any) -> Any:
        """With a sink token, one sink is enough."""
        if not isinstance(given, Mapping) or given.get("sink_token") is not True:
            return given
        cache = given.get("cache")
        settings = cache.given() if isinstance(cache, CacheConfig) else cache
        if isinstance(settings, Mapping) and settings.get("policy") == "sink":
            return {**given, "cache": {"num_sinks": 1, **settings}}
        return given

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.strided is not None and self.cache.given():
            raise ValueError("strided: takes the place of cache; leave one of the two out")
        if self.cache.design == "streaming":
            raise ValueError(
                "cache.design: streaming compacts what is stored, which no mask can say; set it to fundamental"
            )
        if self.cache.evict == "turn":
            raise ValueError("cache.evict: there are no turns in training; set it to token")
        if self.model.architecture is None and self.tokenizer.model_fields_set:
            raise ValueError("tokenizer: a model from a checkpoint has its own; leave this section out")
        if self.tokenizer.path is not None and "vocab_size" in self.tokenizer.model_fields_set:
            raise ValueError("tokenizer.vocab_size: is for a tokenizer that is trained; leave it or tokenizer.path out")
        if self.sink_token and self.cache.policy == "sink" and self.cache.num_sinks == 0:
            raise ValueError("cache.num_sinks: 0 would drop the sink token; set it to 1, or sink_token to false")
        return self

    @property
    def policy(self) -> str:
        """The policy's name, for people."""
        return "strided" if self.strided else " ".join(filter(None, (self.cache.policy, self.cache.design)))
