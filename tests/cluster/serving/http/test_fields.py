"""Every field is heeded, refused by name, or documented as ignored; and calls made of the schema do no harm."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest

from cluster.serving.http.fields import IGNORED, ChatBody, CompletionBody
from runtime.config import LookaheadConfig, SamplingParams
from tests.cluster.serving.serving import ServerThread

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

PAGE = (Path(__file__).resolve().parents[4] / "docs" / "http.md").read_text()
MESSAGES = [{"role": "user", "content": "abc abc abc"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def ask(http: httpx.Client, path: str, **body: object) -> httpx.Response:
    given = {"messages": MESSAGES} if path == CHAT else {"prompt": "abc abc abc"}
    return http.post(path, json=given | {"max_tokens": 8} | body)


def test_every_sampling_parameter_can_be_given_by_its_name() -> None:
    for body in (ChatBody, CompletionBody):
        missing = set(SamplingParams.model_fields) - set(body.model_fields)
        assert missing == set()
        (lookahead,) = [kind for kind in body.model_fields["lookahead"].annotation.__args__ if kind is not type(None)]
        assert set(lookahead.model_fields) == set(LookaheadConfig.model_fields)
        assert all(field.description for field in body.model_fields.values())


def test_the_page_names_every_field() -> None:
    named = set(re.findall(r"`([a-z_.]+)`", PAGE))
    fields = (set(ChatBody.model_fields) | set(CompletionBody.model_fields)) - {"stream_options"}
    assert fields - named == set()
    (ignored,) = re.findall(r"Ignored, since they mean nothing here: (.*?);", PAGE, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", ignored)) == set(IGNORED)


@pytest.mark.parametrize("name", IGNORED)
def test_what_means_nothing_here_changes_nothing(http: httpx.Client, name: str) -> None:
    for path in (CHAT, TEXT):
        texts = [ask(http, path, **given).json()["choices"][0] for given in ({}, {name: "x"}, {name: {"a": [1]}})]
        del texts[0]["outrider"], texts[1]["outrider"], texts[2]["outrider"]
        assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    "name, given, path",
    [
        ("top_k", {"top_k": 3, "temperature": 1.0, "seed": 4}, CHAT),
        ("min_p", {"min_p": 0.3, "temperature": 1.0, "seed": 4}, TEXT),
        ("repetition_penalty", {"repetition_penalty": 3.0}, CHAT),
        ("min_new_tokens", {"min_new_tokens": 8}, TEXT),
        ("stop_token_ids", {"stop_token_ids": [20, 32, 11, 66, 67]}, CHAT),
        ("ignore_eos", {"ignore_eos": True, "max_new_tokens": 8}, TEXT),
        ("regex", {"regex": "[0-9]{4}"}, CHAT),
        ("choice", {"choice": ["yes", "no"]}, TEXT),
        ("json_schema", {"json_schema": {"enum": ["a", "b"]}}, CHAT),
        ("grammar", {"grammar": 'start: "one" | "two"'}, TEXT),
        ("json_object", {"json_object": True, "max_tokens": 12}, CHAT),
        ("include_stop", {"stop": ["5"], "include_stop": True}, CHAT),
        ("lookahead", {"lookahead": {"enabled": False}}, CHAT),
        ("seed", {"seed": 11, "temperature": 1.2, "top_p": 0.8}, TEXT),
    ],
)
def test_a_parameter_does_what_the_engines_does(
    http: httpx.Client, expected: Callable, name: str, given: dict, path: str
) -> None:
    sampling = {key: value for key, value in given.items() if key not in ("lookahead", "max_tokens")}
    sampling["max_new_tokens"] = given.get("max_tokens", 8)
    (answer,) = expected(MESSAGES if path == CHAT else "abc abc abc", **sampling)
    got = ask(http, path, **given | {"return_token_ids": True}).json()["choices"][0]
    assert tuple(got["outrider"]["token_ids"]) == answer.token_ids, name
    assert (got["message"]["content"] if path == CHAT else got["text"]) == answer.text
    if name == "lookahead":
        assert got["outrider"]["usage"]["num_steps"] == got["outrider"]["usage"]["num_new_tokens"]


def test_a_deadline_that_cannot_be_met_is_told(http: httpx.Client) -> None:
    assert ask(http, TEXT, deadline_s=1000.0, priority=3).status_code == 200
    answer = ask(http, TEXT, deadline_s=1e-6, max_tokens=400)
    assert answer.status_code == 504 and answer.json()["error"]["param"] == "deadline_s"
    assert ask(http, TEXT, deadline_s=0).status_code == 400


def test_response_formats_bind_the_answer(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    got = client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=given, max_tokens=40)
    assert json.loads(got.choices[0].message.content)["a"] in (1, 2) and got.choices[0].finish_reason == "stop"
    got = client.chat.completions.create(model="tiny", messages=MESSAGES, response_format={"type": "json_object"})
    assert got.choices[0].message.content.startswith("{")


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_stop_texts_end_streams_before_them(http: httpx.Client, path: str) -> None:
    whole = ask(http, path, max_tokens=16).json()["choices"][0]
    text = whole["message"]["content"] if path == CHAT else whole["text"]
    stop = next(text[at] for at in range(len(text) // 2, len(text)) if text[at].isascii())
    with http.stream(
        "POST",
        path,
        json={"messages": MESSAGES, "stop": stop, "stream": True, "max_tokens": 16}
        if path == CHAT
        else {"prompt": "abc abc abc", "stop": [stop], "stream": True, "max_tokens": 16},
    ) as r:
        lines = [line[6:] for line in r.iter_lines() if line]
    assert lines[-1] == "[DONE]" and r.headers["content-type"].startswith("text/event-stream")
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    shown = "".join(each["delta"]["content"] if path == CHAT else each["text"] for each in choices)
    assert shown == text[: text.index(stop)] and choices[-1]["finish_reason"] == "stop"


def test_log_probabilities_in_both_forms(client: openai.OpenAI, expected: Callable) -> None:
    (answer,) = expected(MESSAGES, logprobs=2, max_new_tokens=8)
    got = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=8, logprobs=True, top_logprobs=2
    ).choices[0]
    assert [one.logprob for one in got.logprobs.content] == [one.logprob for one in answer.logprobs]
    assert [len(one.top_logprobs) for one in got.logprobs.content] == [2] * 8
    joined = b"".join(bytes(one.bytes) for one in got.logprobs.content)
    assert joined.decode("utf-8", "replace") == got.message.content
    streamed = [
        one
        for chunk in client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=8, logprobs=True, stream=True
        )
        for one in chunk.choices[0].logprobs.content
    ]
    assert [one.logprob for one in streamed] == [one.logprob for one in answer.logprobs]
    assert streamed[0].top_logprobs == []

    (answer,) = expected("abc é abc", logprobs=1, prompt_logprobs=1, max_new_tokens=8)
    got = client.completions.create(model="tiny", prompt="abc é abc", max_tokens=8, logprobs=1, echo=True).choices[0]
    found = [*answer.prompt_logprobs, *answer.logprobs]
    assert got.text == "abc é abc" + answer.text
    assert got.logprobs.token_logprobs == [None if one is None else one.logprob for one in found]
    assert got.logprobs.text_offset[:10] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert got.logprobs.tokens[:6] == ["a", "b", "c", " ", "\\xc3", "\\xa9"]
    assert got.logprobs.top_logprobs[0] is None and len(got.logprobs.top_logprobs[1]) == 1
    got = ask_prompt_logprobs(client)
    assert got[0] is None and all(one["logprob"] <= 0 for one in got[1:]) and len(got) == 3


def ask_prompt_logprobs(client: openai.OpenAI) -> list:
    got = client.completions.create(model="tiny", prompt="abc", max_tokens=1, extra_body={"prompt_logprobs": 1})
    return got.choices[0].model_extra["outrider"]["prompt_logprobs"]


@pytest.mark.parametrize(
    "path, param, body",
    [
        (CHAT, "nonsense", {"nonsense": 1}),
        (CHAT, "messages[0].nonsense", {"messages": [{"role": "user", "content": "x", "nonsense": 1}]}),
        (CHAT, "functions", {"functions": []}),
        (CHAT, "lookahead.nonsense", {"lookahead": {"nonsense": 1}}),
        (CHAT, "lookahead.window_size", {"lookahead": {"window_size": 0}}),
        (CHAT, "messages", {"messages": []}),
        (CHAT, "messages[0].role", {"messages": [{"role": "bishop", "content": "x"}]}),
        (CHAT, "messages[0].content[0]", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        (CHAT, "temperature", {"temperature": "hot"}),
        (CHAT, "n", {"n": True}),
        (CHAT, "n", {"n": 65}),
        (CHAT, "top_k", {"top_k": 2**63}),
        (TEXT, "max_tokens", {"max_tokens": 2**62}),
        (TEXT, "min_new_tokens", {"min_new_tokens": 2**70}),
        (CHAT, "lookahead.row_budget", {"lookahead": {"row_budget": 2**63}}),
        (CHAT, "max_completion_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
        (CHAT, "max_tokens", {"max_tokens": 0}),
        (CHAT, "top_logprobs", {"top_logprobs": 2}),
        (CHAT, "top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        (CHAT, "stream_options", {"stream_options": {"include_usage": True}}),
        (CHAT, "response_format.json_schema", {"response_format": {"type": "json_schema"}}),
        (CHAT, "json_schema", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}),
        (CHAT, "regex", {"regex": "a", "json_object": True}),
        (CHAT, "logit_bias", {"logit_bias": {"100000": 1}}),
        (CHAT, "logit_bias.5", {"logit_bias": {"5": 101}}),
        (CHAT, "tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (TEXT, "prompt", {"prompt": []}),
        (TEXT, "prompt", {"prompt": ""}),
        (TEXT, "prompt", {"prompt": [1, "a"]}),
        (TEXT, "prompt", {"prompt": None}),
        (TEXT, "prompt", {"prompt": ["a"] * 3, "n": 64}),
        (TEXT, "prompt", {"prompt": "a" * 600}),
        (TEXT, "token_ids", {"prompt": [5000]}),
        (TEXT, "best_of", {"best_of": 2}),
        (TEXT, "suffix", {"suffix": "x"}),
        (TEXT, "seed", {"seed": -1}),
        (TEXT, "messages", {"messages": MESSAGES}),
        (TEXT, "stop", {"stop": [""]}),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(http: httpx.Client, path: str, param: str, body: dict) -> None:
    answer = ask(http, path, **body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error", answer.text
    assert error["param"] == param and error["message"], answer.text


@pytest.mark.parametrize(
    "status, call",
    [
        (404, lambda http: http.get("/v2")),
        (405, lambda http: http.get(CHAT)),
        (405, lambda http: http.delete("/v1/models")),
        (404, lambda http: http.post(TEXT, json={"prompt": "a", "model": "other"})),
        (415, lambda http: http.post(TEXT, content=b"prompt=a")),
        (413, lambda http: http.post(TEXT, content=b" " * (2**24 + 1), headers={"content-type": "application/json"})),
        (400, lambda http: http.post(TEXT, content=b"{", headers={"content-type": "application/json"})),
        (
            400,
            lambda http: http.post(TEXT, content=b'{"prompt": "\xff"}', headers={"content-type": "application/json"}),
        ),
        (400, lambda http: http.post(TEXT, content=b'"\\ud800"', headers={"content-type": "application/json"})),
        (400, lambda http: http.post(TEXT, content=b"[" * 9999, headers={"content-type": "application/json"})),
        (400, lambda http: http.post(TEXT, json=["prompt"])),
        (400, lambda http: http.get("/health", headers={"x": "y" * 40_000})),
    ],
)
def test_what_is_no_call_is_told_so_in_the_same_form(http: httpx.Client, status: int, call: Callable) -> None:
    answer = call(http)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_schema_is_a_schema(http: httpx.Client) -> None:
    from jsonschema import Draft202012Validator

    document = http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    whole = {"$ref": "#/components/schemas/ChatCompletion", "components": document["components"]}
    Draft202012Validator(whole).validate(ask(http, CHAT, logprobs=True).json())
    whole["$ref"] = "#/components/schemas/Error"
    Draft202012Validator(whole).validate(ask(http, CHAT, x=1).json())
    refused = {"$ref": "#/components/schemas/ChatRequest", "components": document["components"]}
    Draft202012Validator(refused).validate({"messages": MESSAGES, "stop": "x", "top_k": 3, "user": 1})
    assert not Draft202012Validator(refused).is_valid({"messages": MESSAGES, "nonsense": 3})


@pytest.mark.slow
def test_calls_made_of_the_schema_do_no_harm(server: ServerThread) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.generation import GenerationMode

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    counts: dict[int, int] = {}
    limits = settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for result in schema.get_all_operations():
        operation = result.ok()
        cases = [
            operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        ]
        for strategy in cases:

            @limits
            @given(case=strategy)
            def check(case) -> None:
                if isinstance(case.body, dict):  # long answers show nothing more
                    case.body = {
                        k: v for k, v in case.body.items() if k not in ("n", "max_new_tokens", "max_completion_tokens")
                    }
                    case.body["max_tokens"] = 2
                response = case.call()
                counts[response.status_code] = counts.get(response.status_code, 0) + 1
                assert response.status_code < 500, response.text
                if response.status_code >= 400:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}

            try:
                check()
            except Exception as error:
                if "Unsatisfiable" not in type(error).__name__:
                    raise
    assert counts.get(400, 0) > 10 and counts.get(200, 0) > 0, counts
