"""One frozen config tree, read from YAML and `key.path=value` overrides; unknown keys are refused.

Every section is a frozen pydantic model. `SamplingParams` and `LookaheadConfig` serve twice: as the
defaults of a run, and (merged with a request's own values) as the parameters of one request.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from runtime import yaml_text
from runtime.errors import ConfigError, FieldError, InvalidRequestError
from runtime.yaml_text import NULLS, Plain

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

S = TypeVar("S", bound="Section")


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation}.union(*map(_kinds, get_args(annotation)))


class _Refusing(ModelMetaclass):
    """Of sections: what Python code calls them with is refused as all else is, by field, value and remedy."""

    def __call__(cls, *arguments: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*arguments, **fields)
        except ValidationError as error:
            section: type[Section] = cls  # type: ignore[assignment]
            raise _refusal(section, error, "", section.refusal) from None


class Section(BaseModel, metaclass=_Refusing):
    """A frozen part of the tree; unknown keys are errors."""

    refusal: ClassVar[type[FieldError]] = ConfigError
    """What calling the class with wrong values raises."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts True as 1; who writes it means something else."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        members = value if isinstance(value, list | tuple) else (value,)
        members = (*value, *value.values()) if isinstance(value, Mapping) else members
        if kinds & {int, float} and bool not in kinds and any(isinstance(member, bool) for member in members):
            raise PydanticCustomError("number_type", "input should be a number, neither true nor false")
        return value

    def merged(self, overrides: Mapping[str, Any], prefix: str = "") -> Self:
        """A copy with `overrides` in place; raises InvalidRequestError naming the field."""
        for name, value in overrides.items():
            kinds = _kinds(type(self).model_fields[name].annotation) if name in type(self).model_fields else set()
            if isinstance(value, str) and kinds & {int, float, bool}:  # as on the wire
                problem, remedy = "is a text", "Give a value of the field's type, without quotes."
                raise InvalidRequestError(f"{prefix}{name}", value, problem, remedy)
        return _validated(type(self), {**self.model_dump(), **overrides}, prefix, InvalidRequestError)


class ModelConfig(Section):
    path: str | None = None
    """Directory, GGUF file or hub id; null is the embedded SmolLM2-135M-Instruct."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type to compute in and to cache; auto is the faster of float32 and bfloat16, by measurement. With lookahead on or
    off the tokens are the same to the last bit in every type where `deterministic` can be had."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes cuda where torch finds one."""
    kernels: Literal["auto", "native", "triton", "torch"] = "auto"
    """auto takes our own where they can be had: native ones on a CPU, compiled once on the machine, triton's on a GPU,
    for which no row's attention depends on what other rows a step has. torch: torch's operations, everywhere."""
    cuda_graphs: bool = True
    """Of a worker on a GPU: steps are captured as CUDA graphs, in a few sizes."""
    deterministic: bool = False
    """Lookahead on and off give the same bits by construction: by native kernels on CPUs; on GPUs by triton's, every
    step filled up to scheduler.max_rows rows, at most 64, which costs time. Ranks' sums are added up in rank order.
    Refused where that cannot be had."""

    @field_validator("path", mode="before")
    @classmethod
    def _as_text(cls, path: Any) -> Any:
        return str(path) if isinstance(path, PurePath) else path

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.deterministic and self.kernels == "torch":
            raise ValueError("deterministic: needs our own kernels; leave kernels out, or set this to false")
        return self


class ParallelConfig(Section):
    split: Literal["fixed", "auto"] = "fixed"
    """auto: lp and tp are what is fastest among the splits of `workers`, by measurement. `parallel: auto` is short for
    it."""
    workers: int | None = Field(default=None, ge=1, le=256)
    """How many workers an auto split divides; null: as many as there are GPUs, or else CPU cores, on this machine."""
    lp: int = Field(default=1, ge=1, le=30)
    """Lookahead-parallel replicas: each holds the whole model, each step's rows are divided among them."""
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel ranks per replica; at most the model's query heads."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads per worker; null divides the machine's cores among the workers on it."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.split == "auto" and self.num_workers != 1:
            raise ValueError("split: auto chooses lp and tp itself; leave them out, or set split to fixed")
        if self.split == "fixed" and self.workers is not None and self.workers != self.lp * self.tp:
            raise ValueError("workers: is not lp * tp; leave it out, or set split to auto")
        return self

    @property
    def num_workers(self) -> int:
        return self.lp * self.tp

    def threads_each(self, num_cores: int, num_workers: int) -> int:
        """CPU threads of each of the workers that share a machine's cores."""
        return self.threads or max(1, num_cores // num_workers)


class LookaheadConfig(Section):
    """Lookahead decoding with the paper's names: W = window_size, N = ngram_size, G = guess_set_size."""

    refusal = InvalidRequestError

    enabled: bool = True
    """false is plain autoregressive decoding through the same code."""
    window_size: int = Field(default=15, ge=1, le=256)
    """W, columns of the Jacobi window; with the planner, the most it may take. The default is the paper's for a model
    of 7 billion parameters on one A100."""
    ngram_size: int = Field(default=5, ge=2, le=16)
    """N, tokens per n-gram; the window has N-1 rows. With the planner, the most it may take."""
    guess_set_size: int = Field(default=15, ge=1, le=256)
    """G, n-grams kept per first token."""
    planner: bool = True
    """Choose window and tree anew each step, from the measured cost of rows and the learned worth of guesses.
    false: what the settings below say, whether it pays or not."""
    sources: tuple[Literal["jacobi", "suffix", "recycle", "grammar"], ...] = ("jacobi", "suffix", "recycle", "grammar")
    """Who proposes candidates: the n-gram pool fed by the window, repeats of the text so far, what the model gave
    the last time it stood behind the same tokens, and what the request's grammar forces."""
    share: bool = True
    """Learn from, and for, the engine's other sequences: `recycle`'s tables and the acceptance probabilities. One
    client's text then influences how many steps another's takes, never its tokens."""
    row_budget: int | None = Field(default=None, ge=1, lt=2**62)
    """Most rows of one sequence in a step (current token, window and tree). null: with the planner, as many as pay;
    without it, the window and G candidates of N-1 tokens."""
    pool_from_prompt: bool = True
    """Put the prompt's n-grams into the pool."""
    pool_from_output: bool = True
    """Put the generated text's n-grams into the pool."""

    @property
    def window_rows(self) -> int:
        """Most rows the window takes in a step where no planner sizes it, the current token included: W*(N-1) when
        full, more for a moment while a narrow, tall one fills."""
        if not (self.enabled and "jacobi" in self.sources):
            return 1
        width, height = self.window_size + self.ngram_size - 2, self.ngram_size - 1
        return max((width - filled) * (filled + 1) for filled in range(height))

    @property
    def fixed_rows(self) -> int:
        """Rows of a step where no planner chooses them."""
        return self.row_budget or self.window_rows + self.guess_set_size * (self.ngram_size - 1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.sources)) != len(self.sources):
            raise ValueError("sources: each source once; remove the repeated name")
        if not self.planner and self.row_budget is not None and self.row_budget < self.window_rows:
            raise ValueError(
                f"row_budget: {self.row_budget} rows cannot hold a window of {self.window_rows} (W*(N-1)); "
                "raise it, lower window_size or ngram_size, or drop 'jacobi' from sources"
            )
        return self


class CacheConfig(Section):
    """What a sequence keeps: one of three policies, sharded over the tensor-parallel ranks by KV head.

    Each policy has settings of its own; those of another are refused. Their defaults are filled in, so a
    validated config has a value for every setting of its policy, and null for the others.
    """

    policy: Literal["full", "sink", "sep"] = "full"
    """full keeps every token, and the request ends with `length` when its slot is full. sink (StreamingLLM, Xiao et
    al., 2023) keeps initial tokens and a recent window. sep (SepLLM, Chen et al., 2024) keeps separators, too."""
    capacity: int | None = Field(default=None, ge=16)
    """full, sep fundamental: most tokens kept per sequence; null is the model's trained length, at most 8192.
    sep streaming: c, most tokens stored; when they are reached, the past window is compacted (800)."""
    beyond_trained: bool | None = None
    """full, sep fundamental: let `capacity` exceed what the model was trained on. What it says there is seldom of use;
    a measurement may want it (false)."""
    positions: Literal["slot", "original"] | None = None
    """slot: a token's position is its place in the cache, which never exceeds the cache's size (the default of sink and
    sep streaming). original: its place in the text, which soon exceeds the trained length."""
    evict: Literal["token", "turn"] | None = None
    """sink, sep streaming. token: as each new token demands it. turn: only before a turn, to make room for the whole of
    it, as StreamingLLM's demo does."""
    num_sinks: int | None = Field(default=None, ge=0)
    """sink: initial tokens kept for ever (4)."""
    window: int | None = Field(default=None, ge=8)
    """sink: recent tokens seen, the current one included (1020)."""
    design: Literal["fundamental", "streaming"] | None = None
    """sep. fundamental keeps every separator (section 3.1 of the paper); streaming the newest (section 3.3)."""
    num_initial: int | None = Field(default=None, ge=0)
    """sep: a, initial tokens kept for ever (4)."""
    separators: Literal["paper"] | tuple[int, ...] | tuple[str, ...] | None = None
    """sep: the tokens that separate segments, as texts of single tokens or as ids; `paper` is . , ? ! ; : space, tab
    and newline."""
    merged_separators: bool | None = None
    """sep: tokens made of nothing but separators' characters (".\\n", " ,") are separators, too (false)."""
    num_neighbors: int | None = Field(default=None, ge=8)
    """sep fundamental: n, recent tokens seen, the current one included (256)."""
    full_layers: tuple[int, ...] | None = None
    """sep fundamental: layers that keep every token, negative ones counted from the last: [0] is the paper's H,
    [-1] its T, [0, -1] its H/T. With any, `capacity` bounds the whole sequence."""
    max_separators: int | None = Field(default=None, ge=0)
    """sep streaming: s, most separators kept besides those in the recent run (64)."""
    local: int | None = Field(default=None, ge=8)
    """sep streaming: w, recent tokens that a compaction keeps (256)."""
    compact_at: Literal["before", "after"] | None = None
    """sep streaming: compact once c tokens are stored, before the next one's attention (the paper), or after the
    attention of one that came on top of them (the reference code)."""

    @model_validator(mode="wrap")
    @classmethod
    def _of_one_policy(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Fill in the policy's defaults, and refuse what belongs to another. `model_fields_set` has what was given."""
        if not isinstance(given, Mapping):
            return handler(given)
        cache = handler(cls._completed(given))
        object.__setattr__(cache, "__pydantic_fields_set__", {key for key, value in given.items() if value is not None})
        return cache

    @classmethod
    def _completed(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        policy = given.get("policy", "full")
        design = (given.get("design") or "fundamental") if policy == "sep" else None
        defaults = next((settings for kind, settings in CACHE_DEFAULTS.items() if kind == (policy, design)), None)
        if defaults is None:
            return given  # not a policy or design: the field's own check says so
        separators = given.get("separators")
        if separators not in (None, "paper"):
            alike = isinstance(separators, (list, tuple)) and len({type(separator) for separator in separators}) == 1
            if not alike or type(separators[0]) not in (str, int):
                raise ValueError(
                    "separators: is neither a list of texts nor one of token ids; "
                    'write paper, or for example [".", ","], or [30, 28]'
                )
        for key, value in given.items():
            if key in cls.model_fields and key != "policy" and key not in defaults and value is not None:
                owners = [" ".join(filter(None, kind)) for kind, settings in CACHE_DEFAULTS.items() if key in settings]
                kind = " ".join(filter(None, (policy, design)))
                raise ValueError(f"{key}: means nothing to {kind}; leave it out, or choose {' or '.join(owners)}")
        return {**defaults, **{key: value for key, value in given.items() if value is not None}}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.design == "fundamental" and self.positions == "slot":
            raise ValueError(
                "positions: the fundamental design has original ones; leave it out, or set design to streaming"
            )
        if self.design == "streaming":
            assert self.num_initial is not None and self.max_separators is not None and self.local is not None
            assert self.capacity is not None
            least = self.num_initial + self.max_separators + self.local
            if self.capacity <= least:
                raise ValueError(
                    f"capacity: {self.capacity} is not more than num_initial + max_separators + local = {least}; "
                    "raise it, or lower one of them"
                )
        if self.full_layers is not None and len(set(self.full_layers)) != len(self.full_layers):
            raise ValueError("full_layers: each layer once; remove the repeated one")
        return self

    @property
    def bounded(self) -> bool:
        """Whether a sequence ends when its slot is full; else it may go on for ever."""
        return self.policy == "full" or self.design == "fundamental"

    def given(self) -> dict[str, Any]:
        """The settings that were given, not filled in."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    @property
    def size(self) -> int | None:
        """Most tokens that one may see, itself included, where the policy sets that; null for bounded ones."""
        if self.policy == "sink":
            assert self.num_sinks is not None and self.window is not None
            return self.num_sinks + self.window
        return self.capacity if self.design == "streaming" else None

    def slot_capacity(self, max_positions: int) -> int:
        """Tokens one slot keeps for a model trained on `max_positions`."""
        return self.size or self.capacity or min(max_positions, 8192)


_SEP_DEFAULTS: dict[str, Any] = {"num_initial": 4, "separators": "paper", "merged_separators": False}
CACHE_DEFAULTS: dict[tuple[str, str | None], dict[str, Any]] = {
    ("full", None): {"capacity": None, "beyond_trained": False},
    ("sink", None): {"num_sinks": 4, "window": 1020, "positions": "slot", "evict": "token"},
    ("sep", "fundamental"): _SEP_DEFAULTS
    | {
        "design": "fundamental",
        "num_neighbors": 256,
        "capacity": None,
        "beyond_trained": False,
        "full_layers": (),
        "positions": "original",
    },
    ("sep", "streaming"): _SEP_DEFAULTS
    | {
        "design": "streaming",
        "max_separators": 64,
        "local": 256,
        "capacity": 800,
        "positions": "slot",
        "compact_at": "before",
        "evict": "token",
    },
}
"""The settings of each (policy, design), with their defaults."""


MOST_SLOTS = 64
"""Sequences at a time where nothing else is said."""


class SchedulerConfig(Section):
    max_sequences: int | None = Field(default=None, ge=1, le=256)
    """Sequences decoded at the same time, each in a cache slot of its own; null is 64, or half of max_rows where that
    is fewer. On CPUs a slot takes memory as it fills, and slots beyond the first 8 are given away while all together
    take at most half of the machine's memory."""
    max_rows: int = Field(default=512, ge=16, le=8192)
    """Most rows in one step over all sequences, prefill included."""
    max_stall: float = Field(default=2.0, gt=1.0, le=1000.0)
    """A step in which a prompt is read beside running answers may take this many times as long as one without: less
    keeps answers even, more begins new ones sooner."""
    max_waiting: int = Field(default=1024, ge=0)
    """Requests that may wait for a slot; one more is refused (RESOURCE_EXHAUSTED)."""
    prefix_reuse: bool = True
    """A request whose prompt begins as a text that is in the cache goes on from there: where the cache policy is full,
    on CPUs. How soon it answers then tells what others have asked; false: none is served of another's cache."""
    max_sessions: int | None = Field(default=None, ge=1)
    """Conversations that may hold a slot between their turns; null is one fewer than max_sequences, but at least 1."""

    @property
    def num_slots(self) -> int:
        """`max_sequences`, its default filled in."""
        return self.max_sequences or min(MOST_SLOTS, self.max_rows // 2)

    @property
    def session_limit(self) -> int:
        """`max_sessions`, its default filled in."""
        return self.max_sessions or max(1, self.num_slots - 1)


MOST_BARRED = 512
"""Stop tokens of a request that `min_new_tokens` can keep from being chosen."""


MOST_STOP_CHARACTERS = 1024
STRUCTURES = ("json_schema", "json_object", "regex", "choice", "grammar")
"""Fields that give a text its form."""


class SamplingParams(Section):
    """How one request's tokens are chosen and when it ends."""

    refusal = InvalidRequestError

    max_new_tokens: int = Field(default=128, ge=1, lt=2**62)
    """Most tokens to generate."""
    min_new_tokens: int = Field(default=0, ge=0, lt=2**62)
    """Before so many tokens no end token of the model and no stop token is chosen."""
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    """0 is greedy."""
    top_k: int = Field(default=0, ge=0, lt=2**63)
    """Sample among the k likeliest tokens; 0 is off."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample among the likeliest tokens that together reach this probability."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Sample among the tokens that are at least this many times as likely as the likeliest; 0 is off. It comes before
    top_k and top_p, as in vLLM."""
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    """Logits of tokens that prompt or answer has are divided by it where positive, else multiplied; 1 is off."""
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Taken from the logits of tokens that the answer has."""
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Taken from the logits of tokens that the answer has, once for each time."""
    logit_bias: dict[int, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(default_factory=dict, max_length=1024)
    """Added to the logits of these token ids, before penalties."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """With the position, the only source of randomness: the same seed gives the same tokens."""
    n: int = Field(default=1, ge=1, le=64)
    """Answers to one prompt, which is read once. The first has the seed, each further one a seed that is made of it
    (runtime.request.derived_seed)."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer, besides the model's own end tokens. The one that does so is the last of
    the answer's token ids, but not part of its text."""
    ignore_eos: bool = False
    """Go on past the model's own end tokens."""
    stop: tuple[str, ...] = Field(default=(), max_length=64)
    """Texts that end the answer, wherever in it they are complete first, across tokens too. They are looked for behind
    its first min_new_tokens tokens."""
    include_stop: bool = False
    """The answer's text ends behind the text that ended it; false: before it."""
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """Give each token's log-probability and those of so many of the likeliest tokens, 0: its own alone. They are the
    model's own, before all that is set here. null: none."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    """The same of the prompt's tokens, each given those before it."""

    json_schema: str | None = None
    """The answer is JSON of this schema, given as a text or as a mapping."""
    json_object: bool = False
    """The answer is a JSON object."""
    regex: str | None = None
    """The answer matches this regular expression, from its beginning to its end."""
    choice: tuple[str, ...] = ()
    """The answer is one of these texts."""
    grammar: str | None = None
    """The answer is of this grammar, in Lark's notation as llguidance reads it."""

    @field_validator("json_schema", mode="before")
    @classmethod
    def _as_text(cls, schema: Any) -> Any:
        return json.dumps(schema) if isinstance(schema, Mapping) else schema

    @property
    def structure(self) -> tuple[str, str] | None:
        """What is asked of the text's form, if anything: the field, and a text of what it says."""
        given = {
            "json_schema": self.json_schema,
            "json_object": '{"type": "object"}' if self.json_object else None,
            "regex": self.regex,
            "choice": json.dumps(self.choice) if self.choice else None,
            "grammar": self.grammar,
        }
        return next(((name, text) for name, text in given.items() if text is not None), None)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        asked = [name for name in STRUCTURES if getattr(self, name) not in (None, False, ())]
        if len(asked) > 1:
            raise ValueError(f"{asked[1]}: stands beside {asked[0]}; an answer has one form, leave one of them out")
        for name in ("min_new_tokens", "ignore_eos"):
            if asked and getattr(self, name):
                raise ValueError(
                    f"{name}: contradicts {asked[0]}, whose text ends where it is whole; leave one of them out"
                )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: is more than max_new_tokens, {self.max_new_tokens}; lower it, or raise the other"
            )
        if self.min_new_tokens and len(self.stop_token_ids) > MOST_BARRED:
            raise ValueError(
                f"stop_token_ids: are more than min_new_tokens can keep back, {MOST_BARRED}; "
                "name fewer, or set min_new_tokens to 0"
            )
        if any(not 1 <= len(text) <= MOST_STOP_CHARACTERS for text in self.stop):
            raise ValueError(f"stop: a text has 1 to {MOST_STOP_CHARACTERS} characters; shorten it, or leave it out")
        if self.include_stop and not self.stop:
            raise ValueError("include_stop: there is no stop text to include; name one in stop, or leave this out")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """The most that rows are to give."""
        asked = [count for count in (self.logprobs, self.prompt_logprobs) if count is not None]
        return max(asked, default=None)

    @property
    def has_penalties(self) -> bool:
        """Whether what the text has had counts."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class TlsConfig(Section):
    cert: str | None = None
    """PEM file of the server's certificate, those that vouch for it behind it. null: no TLS."""
    key: str | None = None
    """PEM file of its private key, without a password."""
    client_ca: str | None = None
    """PEM file of the authorities whose certificates clients must show (mutual TLS); null: they show none."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.cert is None) != (self.key is None):
            missing = "key" if self.key is None else "cert"
            raise ValueError(f"{missing}: is missing beside the other; give both, or neither")
        if self.client_ca is not None and self.cert is None:
            raise ValueError("client_ca: is for TLS; give cert and key, too")
        return self


class LimitsConfig(Section):
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Requests that one token may begin, on average; as many may come at once. null: no limit."""
    concurrent_requests: int | None = Field(default=None, ge=1)
    """Answers that one token may have running; null: no limit."""
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """Tokens of prompts and answers that one token may use, on average; as many may come at once. null: no limit."""


class KeepaliveConfig(Section):
    """Pings that find a client which has vanished without a word, and how long a connection may last."""

    time_s: float = Field(default=30.0, gt=0, le=1e6)
    """Silence on a connection after which the server pings the client."""
    timeout_s: float = Field(default=10.0, gt=0, le=1e6)
    """How long it waits for the answer; then the connection's calls are cancelled."""
    least_interval_s: float = Field(default=0.0, ge=0, le=1e6)
    """A client that pings more often than this, three times, is cut off (`too_many_pings`); 0: none is."""
    max_connection_idle_s: float | None = Field(default=None, gt=0, le=1e6)
    """A connection without calls is closed after so long; null: never."""
    max_connection_age_s: float | None = Field(default=None, gt=0, le=1e6)
    """After so long a client is asked to connect anew, so that a balancer can send it elsewhere; its calls end
    first. null: never."""


class ServerConfig(Section):
    host: str = Field(default="127.0.0.1", min_length=1)
    """An address or a name of this machine. 0.0.0.0 and :: are all of its addresses. Where others can reach it, it
    wants `tls`, or `insecure`."""
    port: int = Field(default=50051, ge=0, le=65535)
    """Of gRPC. 0 lets the system choose; the chosen port is printed."""
    http_port: int | None = Field(default=8000, ge=0, le=65535)
    """Of HTTP (docs/http.md). 0 lets the system choose; null: no HTTP."""
    model_name: str | None = Field(default=None, min_length=1)
    """What the model is called over HTTP; null: the last part of model.path."""
    write_timeout_s: float = Field(default=60.0, gt=0)
    """How long a client may leave unread what it was sent; then its request is withdrawn."""
    tls: TlsConfig = TlsConfig()
    """Encryption, of both doors."""
    insecure: bool = False
    """Take calls from other machines without TLS: whoever is in between reads prompts, answers and tokens."""
    tokens_file: str | None = None
    """File of the bearer tokens that callers may have, one a line (docs/security.md); those of OUTRIDER_TOKENS count,
    too. Without any, whoever can reach the server may use it."""
    limits: LimitsConfig = LimitsConfig()
    """Of each token, where its line says nothing else; without tokens, of all callers together."""
    log_format: Literal["text", "json"] = "text"
    """Of the server's log: lines for people, or one JSON object a line."""
    log_prompts: bool = False
    """Write prompts and answers into the log."""
    max_connections: int = Field(default=1024, ge=1)
    """Open connections of each door."""
    max_prompt_tokens: int = Field(default=1_000_000, ge=1)
    """Of one request; the cache may hold fewer."""
    session_idle_timeout_s: float = Field(default=600.0, gt=0)
    """How long a conversation may hold its slot without a turn."""
    state_dir: str | None = Field(default=None, min_length=1)
    """Directory that keeps the token ids of open conversations, so that a client may go on with one after the server
    was started again; null keeps none. Whoever can read it can read what was said."""
    state_bytes: int = Field(default=1 << 30, ge=1 << 12)
    """Most bytes in server.state_dir, 4 for each token; beyond, the conversations left longest ago are forgotten."""
    restarts: int = Field(default=10, ge=0)
    """How often in a row, with growing pauses, `outrider serve` starts the server again when it ends unasked; 0: it
    runs without a supervisor."""
    compression: Literal["none", "deflate", "gzip"] = "none"
    """Of gRPC's responses. One step's are too small to gain; compressed requests are taken always."""
    keepalive: KeepaliveConfig = KeepaliveConfig()
    """gRPC's pings and the age of connections."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.http_port and self.http_port == self.port:
            raise ValueError("http_port: is server.port, too; give each its own")
        return self

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, host: str) -> str:
        return host[1:-1] if host.startswith("[") and host.endswith("]") else host


class RayConfig(Section):
    address: str | None = None
    """Cluster to join; null joins RAY_ADDRESS if set, else starts a local Ray."""
    startup_timeout_s: float = Field(default=120.0, gt=0)
    """How long to wait for the placement groups before the missing resources are named in an error."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs reserved per worker on a CPU mesh (GPU workers reserve one GPU each)."""


class Tree(Section):
    """A whole tree of settings. `load` is the way in."""

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Iterable[str] = ()) -> Self:
        """Read YAML (or nothing), then apply `key.path=value` overrides. Both mean the same: a value is read as the
        type of its field (runtime.yaml_text), lists as [a, b] or a,b.

        Raises ConfigError naming the field, its value and the remedy.
        """
        tree: dict[str, Any] = {}
        if path is not None:
            try:
                loaded = yaml_text.load(Path(path).read_bytes())
            except OSError as error:
                raise ConfigError(
                    "config", str(path), error.strerror or "cannot be read", "Name a readable YAML file."
                ) from error
            except yaml.YAMLError as error:
                raise ConfigError("config", str(path), f"is not YAML ({error})", "Mend the file.") from error
            if loaded is not None and not isinstance(loaded, dict):
                raise ConfigError("config", str(path), "is not a mapping of sections", "See configs/ for examples.")
            empty = {key for key, value in (loaded or {}).items() if key in cls.model_fields and value in NULLS}
            tree = yaml_text.for_field(
                {key: {} if key in empty else value for key, value in (loaded or {}).items()}, cls
            )
        for override in overrides:
            _apply_override(cls, tree, override)
        return cls.from_dict(tree)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        return _validated(cls, tree, "", ConfigError)


class Config(Tree):
    """The whole run. `Config.load` is the way in."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    lookahead: LookaheadConfig = LookaheadConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    sampling: SamplingParams = SamplingParams()
    server: ServerConfig = ServerConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="before")
    @classmethod
    def _auto_split(cls, given: Any) -> Any:
        """`parallel: auto` is short for its setting of that name."""
        if isinstance(given, Mapping) and given.get("parallel") == "auto":
            return {**given, "parallel": {"split": "auto"}}
        return given

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.scheduler.max_rows < 2 * self.scheduler.num_slots:
            raise ValueError(
                f"scheduler.max_rows: {self.scheduler.max_rows} rows are too few for "
                f"{self.scheduler.max_sequences} sequences; raise it to at least twice scheduler.max_sequences"
            )
        rows = self.lookahead.window_rows
        if not self.lookahead.planner and self.scheduler.max_rows < rows:
            raise ValueError(
                f"scheduler.max_rows: {self.scheduler.max_rows} rows cannot hold a window of {rows} (W*(N-1)); "
                "raise it, or lower lookahead.window_size or lookahead.ngram_size"
            )
        return self

    @property
    def is_open(self) -> bool:
        """Whether something is `auto` that measuring decides: the split of the workers, or the dtype."""
        return self.parallel.split == "auto" or self.model.dtype == "auto"


def _apply_override(cls: type[Tree], tree: dict[str, Any], override: str) -> None:
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not key:
        raise ConfigError("--set", override, "is not key.path=value", "Write for example --set parallel.lp=2.")
    value: Any = Plain(text)
    kind = _annotation(cls, key)
    # A text may begin with a bracket: server.host=[::1]
    if text[:1] in ("'", '"') or text[:1] in ("[", "{") and not _is_text(kind):
        try:
            value = yaml_text.load(text)
        except yaml.YAMLError as error:
            raise ConfigError(key, text, "is not a YAML value", "Quote it, or write a list as [a, b].") from error
    *parents, leaf = key.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        child = node.setdefault(parent, {})
        if depth == 0 and parent == "parallel" and child == "auto":
            child = node[parent] = {"split": "auto"}
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(key, text, f"{parent} is a value, not a section", "Check the key's path.")
        node = child
    node[leaf] = yaml_text.for_field(value, str if kind is None else kind)


def _annotation(section: type[Section], key: str) -> Any:
    """The type of what `key.path` names; None where it names nothing."""
    kind: Any = section
    for part in key.split("."):
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
            continue
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, Section) else {}
        kind = fields[part].annotation if part in fields else None
    return kind


def _is_text(kind: Any) -> bool:
    return all(option in (str, type(None)) for option in get_args(kind) or (kind,))


def _validated(cls: type[S], tree: Mapping[str, Any], prefix: str, error_type: type[FieldError]) -> S:
    try:
        return cls.model_validate(dict(tree))
    except ValidationError as error:
        raise _refusal(cls, error, prefix, error_type) from None


def _refusal(cls: type[S], error: ValidationError, prefix: str, error_type: type[FieldError]) -> FieldError:
    first = error.errors()[0]
    field = prefix + ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        parent: Any = cls
        for part in first["loc"][:-1]:
            parent = parent.model_fields[part].annotation
        known = ", ".join(parent.model_fields)
        near = _like(str(first["loc"][-1]), field.removeprefix(prefix), parent, cls, prefix)
        return error_type(field, first["input"], "unknown key", f"{near}Known here: {known}.")
    problem = first["msg"].removeprefix("Value error, ")
    value = first["input"] if first["type"] != "value_error" else "(section)"
    if first["type"] == "value_error" and ": " in problem:
        name, problem = problem.split(": ", 1)
        field = f"{field.rstrip('.')}.{name}" if field else name
        problem, _, remedy = problem.partition("; ")
        return error_type(field, _lookup(first["input"], name), problem, remedy[:1].upper() + remedy[1:] + ".")
    remedy = "Give a value of that kind." if first["type"].endswith(("_type", "_parsing")) else "Give another value."
    remedy = "Give a value in that range." if "than" in first["type"] else remedy
    return error_type(field, value, problem[:1].lower() + problem[1:], remedy)


def _like(name: str, key: str, parent: type[Section], root: type[Section], prefix: str) -> str:
    """A question for who wrote an unknown key, if it looks like a known one or stands in another section."""
    elsewhere = {
        leaf: f"{section}.{leaf}"
        for section, field in root.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        for leaf in field.annotation.model_fields
    }
    here = {leaf: f"{key[: len(key) - len(name)]}{leaf}" for leaf in parent.model_fields}
    near = difflib.get_close_matches(name.replace("-", "_"), here) or [leaf for leaf in elsewhere if leaf == name]
    return f"Did you mean {prefix}{(elsewhere | here)[near[0]]}? " if near else ""


def _lookup(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else getattr(tree, part, None)
    return tree
