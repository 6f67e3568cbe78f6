"""The door's description in OpenAPI 3.1: bodies from the fields that read them, answers as they are made."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from cluster.serving.http.fields import ChatBody, CompletionBody

Json = dict[str, Any]
_REFERENCE = "#/components/schemas/{model}"


def document(needs_token: bool) -> Json:
    """The whole description."""
    schemas = _schemas()
    paths: Json = {
        "/v1/chat/completions": {"post": _answered("Answer a conversation", "ChatRequest", "ChatCompletion")},
        "/v1/completions": {"post": _answered("Continue texts or token ids", "CompletionRequest", "Completion")},
        "/v1/models": {"get": _asked("The models that are served", "Models")},
        "/v1/models/{model}": {
            "get": _asked("One of them", "Model")
            | {"parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]}
        },
        "/health": {"get": _asked("Whether the process can still answer", "Status")},
        "/ready": {"get": _asked("Whether requests are taken", "Status")},
        "/metrics": {"get": _responses("Metrics for Prometheus", {"text/plain": {"schema": {"type": "string"}}})},
        "/live": {"get": _responses("What the engine does now", {"application/json": {"schema": {"type": "object"}}})},
        "/openapi.json": {"get": _responses("This description", {"application/json": {"schema": {"type": "object"}}})},
    }
    components: Json = {"schemas": schemas}
    whole: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "Outrider",
            "version": version("outrider"),
            "description": "OpenAI's API, and ours beside it.",
        },
        "paths": paths,
        "components": components,
    }
    if needs_token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        whole["security"] = [{"token": []}]
        for open_path in ("/health", "/ready"):
            paths[open_path]["get"]["security"] = []
    return whole


def _responses(summary: str, content: Json) -> Json:
    error = {"description": "What is wrong", "content": {"application/json": {"schema": _to("Error")}}}
    return {"summary": summary, "responses": {"200": {"description": summary, "content": content}, "default": error}}


def _asked(summary: str, schema: str) -> Json:
    return _responses(summary, {"application/json": {"schema": _to(schema)}})


def _answered(summary: str, body: str, schema: str) -> Json:
    content = {
        "application/json": {"schema": _to(schema)},
        "text/event-stream": {"schema": {"type": "string", "description": f"data: {schema}Chunk, then data: [DONE]"}},
    }
    sent = {"required": True, "content": {"application/json": {"schema": _to(body)}}}
    return _responses(summary, content) | {"requestBody": sent}


def _to(schema: str) -> Json:
    return {"$ref": _REFERENCE.format(model=schema)}


def _object(required: Json, optional: Json | None = None) -> Json:
    return {"type": "object", "properties": required | (optional or {}), "required": sorted(required)}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _schemas() -> Json:
    schemas: Json = {}
    for body in (ChatBody, CompletionBody):
        made = body.model_json_schema(ref_template=_REFERENCE)
        schemas |= made.pop("$defs", {})
        schemas[body.__name__] = made
    text, whole, number = {"type": "string"}, {"type": "integer"}, {"type": "number"}
    usage = _object(
        {"prompt_tokens": whole, "completion_tokens": whole, "total_tokens": whole},
        {"prompt_tokens_details": _object({"cached_tokens": whole})},
    )
    ours = _object(
        {},
        {
            "num_tokens": whole,
            "num_accepted": whole,
            "token_ids": _list(whole),
            "prompt_token_ids": _list(whole),
            "prompt_logprobs": {"type": "array"},
            "run_lengths": _list(whole),
            "usage": {"type": "object", "additionalProperties": number},
        },
    )
    call = _object({"index": whole, "function": {"type": "object"}}, {"id": text, "type": {"const": "function"}})
    made_call = _object(
        {"id": text, "type": {"const": "function"}, "function": _object({"name": text, "arguments": text})}
    )
    spoken = {"role": {"const": "assistant"}, "content": _or_null(text), "refusal": {"type": "null"}}
    message = _object(spoken, {"tool_calls": _list(made_call)})
    delta = _object({}, {"role": text, "content": text, "tool_calls": _list(call)})
    logprobs = _or_null({"type": "object"})
    end = _or_null({"enum": ["stop", "length", "tool_calls"]})
    choice = {"index": whole, "logprobs": logprobs, "finish_reason": end}
    head = {"id": text, "object": text, "created": whole, "model": text}

    def answer(own: Json) -> Json:
        return _object(head | {"choices": _list(_object(choice | own, {"outrider": ours})), "usage": usage})

    def chunk(own: Json) -> Json:
        optional = {"usage": _or_null(usage), "outrider": ours}
        return _object(head | {"choices": _list(_object(choice | own))}, optional)

    described = _object({"id": text, "object": {"const": "model"}, "created": whole, "owned_by": text})
    told = {"message": text, "type": text, "param": _or_null(text), "code": _or_null(text)}
    return schemas | {
        "ChatCompletion": answer({"message": message}),
        "ChatCompletionChunk": chunk({"delta": delta}),
        "Completion": answer({"text": text}),
        "CompletionChunk": chunk({"text": text}),
        "Model": described,
        "Models": _object({"object": {"const": "list"}, "data": _list(_to("Model"))}),
        "Status": _object({"status": text}),
        "Error": _object({"error": _object(told)}),
    }
