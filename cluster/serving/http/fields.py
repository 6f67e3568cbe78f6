"""The bodies of calls, field by field: OpenAI's, and ours beside them. An unknown field is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, WithJsonSchema, create_model

from cluster.serving.http.parts import Made, Part, optional
from runtime.config import MOST_STOP_CHARACTERS, LookaheadConfig, SamplingParams

C = TypeVar("C", bound="Common")

IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
)
"""Fields of OpenAI's that mean nothing here, whatever they are: they name who asks, or how others bill and store, or
propose text, which the engine does itself."""
_KNOWN_OTHERWISE = {"max_new_tokens", "n", "seed", "stop", "temperature", "top_p", "presence_penalty"}
_KNOWN_OTHERWISE |= {"frequency_penalty", "logit_bias", "logprobs"}


def _listed(value: Any) -> Any:
    """One text for a list of one."""
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


def _text_of_parts(value: Any) -> Any:
    """A content in parts, all of them text, as one text."""
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{index}: is no part of type text; the model reads text alone")
        if unknown := set(part) - {"type", "text"}:
            raise ValueError(f"{index}.{min(unknown)}: unknown field; a part has type and text")
        texts.append(part["text"])
    return "".join(texts)


Content = Annotated[
    str | None,
    BeforeValidator(_text_of_parts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
                {"type": "null"},
            ]
        }
    ),
]


class CalledFunction(Part):
    """Which function an assistant called, and with what."""

    name: str
    """The function's name."""
    arguments: str
    """JSON, as the model wrote it."""


class ToolCall(Part):
    """A call that an assistant made."""

    id: str
    """What the tool's answer names."""
    type: Literal["function"] = "function"
    """There are functions only."""
    function: CalledFunction
    """The function, and its arguments."""
    index: int | None = None
    """As a streamed answer has it; ignored."""


class Message(Part):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who speaks; developer is another name for system."""
    content: Content = None
    """What was said: a text, or parts of type text. Only an assistant that calls tools may leave it out."""
    name: str | None = None
    """Ignored: chat templates do not show it."""
    tool_calls: tuple[ToolCall, ...] | None = None
    """Of an assistant."""
    tool_call_id: str | None = None
    """Of a tool: which call it answers."""
    refused: str | None = Field(default=None, alias="refusal")
    """Ignored, as answers of other servers have it."""
    audio: None = None
    """There is text only; nor are there the next two, which earlier answers may bring along empty."""
    annotations: tuple[()] | None = None
    """Empty."""
    function_call: None = None
    """Earlier name of tool_calls."""


class Function(Part):
    """A function that the model may call."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")
    """How it is called."""
    description: str | None = None
    """What it does, for the model to read."""
    parameters: dict[str, Any] | None = None
    """A JSON schema of its arguments; none: it has none."""
    strict: bool | None = None
    """Ignored: a call that is asked for always follows the schema, one that the model chooses is as it writes it."""


class Tool(Part):
    """Something that the model may call."""

    type: Literal["function"]
    """There are functions only."""
    function: Function
    """The function."""


class NamedFunction(Part):
    """The name of a function."""

    name: str
    """One of the tools'."""


class NamedTool(Part):
    """The tool that is to be called."""

    type: Literal["function"] = "function"
    """There are functions only."""
    function: NamedFunction
    """Its name."""


class SchemaFormat(Part):
    """A form by JSON schema."""

    name: str | None = None
    """Ignored: what the caller calls it."""
    description: str | None = None
    """Ignored: the prompt is the caller's to write."""
    schema_: dict[str, Any] = Field(alias="schema")
    """The JSON schema."""
    strict: bool | None = None
    """Ignored: the answer always follows the schema."""


class ResponseFormat(Part):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    """text: any. json_object: a JSON object. json_schema: JSON of the schema."""
    json_schema: SchemaFormat | None = None
    """With type json_schema."""


class StreamOptions(Part):
    """What a stream has besides the answer."""

    include_usage: bool | None = None
    """A last chunk without choices has the usage."""
    continuous_usage_stats: bool | None = None
    """Every chunk has the usage so far."""
    include_obfuscation: bool | None = None
    """Ignored: nothing is added to chunks."""


def _extensions() -> dict[str, Any]:
    """SamplingParams' fields that OpenAI has not, by the same names; each may be left out."""
    sampling = SamplingParams.model_fields
    found = {name: optional(field) for name, field in sampling.items() if name not in _KNOWN_OTHERWISE}
    schema = Field(default=None, description=sampling["json_schema"].description)
    found["json_schema"] = (str | dict[str, Any] | None, schema)
    lookahead: Any = {name: optional(field) for name, field in LookaheadConfig.model_fields.items()}
    described = "How far to look ahead: what differs from the server's. It changes the speed, never the tokens."
    kind: Any = create_model("Lookahead", __base__=Made, __doc__=described, **lookahead)
    found["lookahead"] = (kind | None, Field(default=None, description=described))
    ignored = Field(default=None, description="Ignored: it means nothing here.")
    return found | {name: (Any, ignored) for name in IGNORED}


EXTENSIONS = tuple(name for name in SamplingParams.model_fields if name not in _KNOWN_OTHERWISE)
"""Sampling parameters that OpenAI has not."""
SHARED = ("n", "seed", "temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "stop")
"""Those that it has by the same name and meaning."""


_STOP = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MOST_STOP_CHARACTERS},
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": MOST_STOP_CHARACTERS},
            "maxItems": 64,
        },
        {"type": "null"},
    ]
}


class Common(Part):
    """What both kinds of calls have."""

    model: str | None = None
    """The model's id, as /v1/models has it; left out, it is that one."""
    stream: bool | None = None
    """Send the answer as it comes, as server-sent events."""
    stream_options: StreamOptions | None = None
    """With stream."""
    max_tokens: int | None = Field(default=None, ge=1, lt=2**62)
    """Most tokens of the answer; left out, the server's sampling.max_new_tokens."""
    max_new_tokens: int | None = Field(default=None, ge=1, lt=2**62)
    """Another name of max_tokens."""
    n: int | None = Field(default=None, ge=1, le=64)
    """Answers to each prompt."""
    stop: Annotated[tuple[str, ...] | None, BeforeValidator(_listed), WithJsonSchema(_STOP)] = Field(
        default=None, max_length=64
    )
    """Texts that end the answer, which does not include them."""
    temperature: float | None = Field(default=None, ge=0, le=100)
    """0 is greedy."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample among the likeliest tokens that together reach this probability."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Taken from the logits of tokens that the answer has."""
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Taken from the logits of tokens that the answer has, once for each time."""
    logit_bias: dict[int, float] | None = Field(default=None, max_length=1024)
    """Added to the logits of these token ids, at most 100 each way."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """The same seed gives the same tokens."""
    request_id: str | None = Field(default=None, min_length=1, max_length=128)
    """The answer's id; unique among the running requests. The server makes one up where it is left out."""
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)
    """Of requests that wait, those of the highest are admitted first; left out, 0."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Seconds from arrival after which the answer is of no use: it ends with an error then, or is refused at once."""
    return_token_ids: bool | None = None
    """Give token ids beside the text, the prompt's too."""


class Chat(Common):
    """A conversation to be answered."""

    messages: tuple[Message, ...] = Field(min_length=1)
    """What was said, oldest first, in the model's chat template."""
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**62)
    """Another name of max_tokens."""
    logprobs: bool | None = None
    """Give each token's log-probability."""
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    """With logprobs: those of so many of the likeliest tokens, too."""
    response_format: ResponseFormat | None = None
    """The answer's form."""
    tools: tuple[Tool, ...] | None = Field(default=None, max_length=128)
    """What the model may call, where its chat template shows it."""
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """auto: the model chooses, the default with tools. required: it calls one. A name: it calls that. none: no call."""
    parallel_tool_calls: bool | None = None
    """false: the answer ends behind its first call."""
    modalities: tuple[Literal["text"], ...] | None = None
    """There is text only."""


class Completion(Common):
    """Texts to be continued."""

    prompt: Annotated[
        Any,
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
                    {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                    {
                        "type": "array",
                        "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                        "minItems": 1,
                    },
                ]
            }
        ),
    ]
    """A text or token ids, or a list of such."""
    echo: bool | None = None
    """Give the prompt, too, before the answer; with logprobs, those of its tokens."""
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """Give each token's log-probability, and those of so many of the likeliest."""
    best_of: int | None = Field(default=None, ge=1)
    """Only as many as n: all answers are given."""
    suffix: Literal[""] | None = None
    """Nothing can be put behind an answer."""


def _extended(name: str, kind: type[C]) -> type[C]:
    bases: Any = (kind, Made)
    fields: Any = _extensions()
    made: type[C] = create_model(name, __base__=bases, __doc__=kind.__doc__, **fields)
    return made


ChatBody = _extended("ChatRequest", Chat)
CompletionBody = _extended("CompletionRequest", Completion)
