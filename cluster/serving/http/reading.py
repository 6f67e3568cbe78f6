"""From a body to the engine's requests. All of it takes time that grows with what a client sends: it runs on
RequestThreads, never on the event loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from cluster.serving.http import tools
from cluster.serving.http.fields import EXTENSIONS, SHARED, Chat, ChatBody, Common, Completion, CompletionBody
from runtime.config import Config, LookaheadConfig, SamplingParams
from runtime.errors import InvalidRequestError, OutriderError
from runtime.model.gguf import EMBEDDED_FILE
from runtime.request import Prompt, Request, forks

if TYPE_CHECKING:
    from runtime.engine.engine import Engine  # which compiles when it is imported for the first time


MOST_CHOICES = 128
"""Answers that one call may ask for."""


class UnknownModelError(OutriderError):
    """The call names a model that is not served here (404)."""


@dataclass(frozen=True)
class Asked:
    """A call, read and checked: the engine's requests, one for each choice, and how their answers are to be shown."""

    answer_id: str
    is_chat: bool
    requests: tuple[Request, ...]
    """Each with the index of its choice."""
    num_prompt_tokens: int
    """Of each prompt once, however many answers it has."""
    firsts: frozenset[int]
    """The first choice of each prompt."""
    stream: bool
    include_usage: bool
    """The stream ends with the usage."""
    running_usage: bool
    """Every chunk has it."""
    return_token_ids: bool
    echoes: tuple[str, ...] = ()
    """The texts of the prompts, by choice, where they are to be given, too."""
    logprobs: int | None = None
    """Of how many of the likeliest tokens besides the chosen one."""
    tools: tools.ToolUse | None = None
    """How calls of functions are found in the answers, if there may be any."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""


def model_id(config: Config) -> str:
    """What the served model is called over HTTP. A directory's name, without where it is."""
    if config.server.model_name is not None:
        return config.server.model_name
    return PurePath(config.model.path).name if config.model.path is not None else PurePath(EMBEDDED_FILE).stem


def read_chat(content: bytes, engine: Engine, visit_id: str, arrival_s: float) -> Asked:
    """A body of /v1/chat/completions. Raises InvalidRequestError, UnknownModelError."""
    body = ChatBody.read(content)
    _check(body, engine)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs", body.top_logprobs, "is for logprobs", "Set logprobs to true.")
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    chat, use, binding = tools.prepare(body, engine.tokenizer)
    sampling = _sampling(body, num_logprobs, body.max_completion_tokens, _form(body) | binding)
    is_plain = not chat.tools and all(message.keys() == {"role", "content"} for message in chat.messages)
    prompt: Prompt = chat.messages if is_plain else chat
    return _asked(body, engine, [prompt], sampling, num_logprobs, (visit_id, arrival_s), use)


def read_completion(content: bytes, engine: Engine, visit_id: str, arrival_s: float) -> Asked:
    """A body of /v1/completions. Raises InvalidRequestError, UnknownModelError."""
    body = CompletionBody.read(content)
    _check(body, engine)
    if body.best_of not in (None, body.n or 1):
        raise InvalidRequestError("best_of", body.best_of, "is not n", "Leave it out: all answers are given.")
    sampling = _sampling(body, body.logprobs)
    if body.echo and body.logprobs is not None and "prompt_logprobs" not in sampling:
        sampling["prompt_logprobs"] = body.logprobs
    return _asked(body, engine, _prompts(body.prompt), sampling, body.logprobs, (visit_id, arrival_s))


def _check(body: Common, engine: Engine) -> None:
    known = model_id(engine.config)
    if body.model is not None and body.model != known:
        raise UnknownModelError(f"The model {body.model[:200]!r} is not served here. There is {known!r}.")
    if body.stream_options is not None and not body.stream:
        problem = "is for streams"
        raise InvalidRequestError("stream_options", "(an object)", problem, "Leave it out, or set stream to true.")


def _sampling(
    body: Common,
    num_logprobs: int | None,
    max_completion_tokens: int | None = None,
    form: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """SamplingParams' fields that the body sets."""
    given = body.given(SHARED + EXTENSIONS) | (form or {})
    if num_logprobs is not None:
        given["logprobs"] = num_logprobs
    lengths = {"max_tokens": body.max_tokens, "max_completion_tokens": max_completion_tokens}
    lengths["max_new_tokens"] = body.max_new_tokens
    named = {name: value for name, value in lengths.items() if value is not None}
    if len(set(named.values())) > 1:
        first, second = list(named)[:2]
        raise InvalidRequestError(second, named[second], f"is not {first}, {named[first]}", "Give one of them.")
    return given | ({"max_new_tokens": next(iter(named.values()))} if named else {})


def _form(body: Chat) -> dict[str, Any]:
    """What response_format says, in our fields."""
    asked = body.response_format
    if asked is None or asked.type == "text":
        return {}
    if asked.type == "json_object":
        return {"json_object": True}
    if asked.json_schema is None:
        raise InvalidRequestError(
            "response_format.json_schema", None, "is missing", "Give the schema, or another type."
        )
    return {"json_schema": asked.json_schema.schema_}


def _prompts(given: Any) -> list[Prompt]:
    """One prompt or several: a text, a list of texts, token ids, or a list of lists of them."""
    remedy = "Send a text, a list of texts, a list of token ids, or a list of such lists."
    if isinstance(given, str):
        prompts: list[Any] = [given]
    elif isinstance(given, list) and given and all(type(each) is int for each in given):
        prompts = [given]
    elif isinstance(given, list) and given and all(isinstance(each, str) for each in given):
        prompts = given
    elif isinstance(given, list) and given and all(_are_ids(each) for each in given):
        prompts = given
    else:
        raise InvalidRequestError("prompt", "(not shown)", "is no prompt, nor a list of some", remedy)
    if any(not each for each in prompts):
        raise InvalidRequestError("prompt", "", "is empty", "Send at least one character or token.")
    return prompts


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and all(type(each) is int for each in given)


def _asked(
    body: Common,
    engine: Engine,
    prompts: Sequence[Prompt],
    given: dict[str, Any],
    num_logprobs: int | None,
    arrival: tuple[str, float],
    use: tools.ToolUse | None = None,
) -> Asked:
    lookahead_given = getattr(body, "lookahead", None)
    sampling: SamplingParams = engine.config.sampling.merged(given)
    lookahead: LookaheadConfig = engine.config.lookahead
    if lookahead_given is not None:
        names = tuple(type(lookahead_given).model_fields)
        lookahead = lookahead.merged(lookahead_given.given(names), "lookahead.")
    answer_id = body.request_id or f"{'chatcmpl' if isinstance(body, Chat) else 'cmpl'}-{arrival[0]}"
    if len(prompts) * sampling.n > MOST_CHOICES:
        problem = f"with n = {sampling.n} they ask for more than {MOST_CHOICES} answers"
        raise InvalidRequestError("prompt", f"{len(prompts)} prompts", problem, "Send several calls.")
    requests: list[Request] = []
    echoes: list[str] = []
    firsts: set[int] = set()
    num_prompt_tokens = 0
    for prompt in prompts:
        name = answer_id if len(prompts) == 1 else f"{answer_id}/{len(requests)}"
        urgency = body.given(("priority", "deadline_s"))
        request = engine.make_request(prompt, sampling, lookahead, name, **urgency)
        request = replace(request, arrival_s=arrival[1])
        num_prompt_tokens += len(request.prompt_ids)
        firsts.add(len(requests))
        requests += [replace(each, index=len(requests) + each.index) for each in forks(request)]
        if isinstance(body, Completion) and body.echo:
            text = prompt if isinstance(prompt, str) else engine.tokenizer.decode(request.prompt_ids)
            echoes += [text] * sampling.n
    return Asked(
        answer_id=answer_id,
        is_chat=isinstance(body, Chat),
        requests=tuple(requests),
        num_prompt_tokens=num_prompt_tokens,
        firsts=frozenset(firsts),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options is not None and body.stream_options.include_usage),
        running_usage=bool(body.stream_options is not None and body.stream_options.continuous_usage_stats),
        return_token_ids=bool(body.return_token_ids),
        echoes=tuple(echoes),
        logprobs=num_logprobs,
        tools=use,
    )
