"""What the official client gets over HTTP is what the engine gives, streamed or not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import openai
import pytest

from tests.cluster.serving.serving import ServerThread

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

MESSAGES = [{"role": "user", "content": "abc abc abc"}]
SAMPLED = {"temperature": 0.9, "seed": 7, "top_p": 0.95, "presence_penalty": 0.5, "frequency_penalty": 0.2}


@pytest.mark.parametrize("given", [{}, SAMPLED, {"logit_bias": {"65": 5}}], ids=["greedy", "sampled", "biased"])
def test_a_chat_is_what_the_engine_answers(client: openai.OpenAI, expected: Callable, given: dict) -> None:
    (answer,) = expected(MESSAGES, **{**given, "logit_bias": {65: 5.0} if "logit_bias" in given else {}})
    got = client.chat.completions.create(model="tiny", messages=MESSAGES, **given)
    (choice,) = got.choices
    assert choice.message.content == answer.text and choice.finish_reason == str(answer.finish_reason)
    assert got.usage.prompt_tokens == len(answer.prompt_ids)
    assert got.usage.completion_tokens == len(answer.token_ids)
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def test_a_stream_joined_is_the_answer_and_its_last_chunk_has_the_usage(
    client: openai.OpenAI, expected: Callable
) -> None:
    (answer,) = expected(MESSAGES, **SAMPLED)
    options = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"return_token_ids": True}}
    *chunks, last = client.chat.completions.create(model="tiny", messages=MESSAGES, **SAMPLED, **options)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == answer.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].usage is None
    assert last.choices == [] and last.usage.completion_tokens == 16
    ours = [chunk.model_extra["outrider"] for chunk in chunks]
    assert tuple(one for each in ours for one in each["token_ids"]) == answer.token_ids
    assert sum(each["num_tokens"] for each in ours) == 16 and any(each["num_accepted"] for each in ours)
    assert [each["num_tokens"] - 1 for each in ours] == [each["num_accepted"] for each in ours]
    assert tuple(ours[0]["prompt_token_ids"]) == answer.prompt_ids
    assert ours[-1]["usage"]["num_new_tokens"] == 16 and ours[-1]["usage"]["tokens_per_step"] > 1


def test_several_prompts_have_n_choices_each(client: openai.OpenAI, expected: Callable) -> None:
    given = {"temperature": 1.0, "seed": 3, "n": 2}
    answers = [*expected("ab ab ab ab", **given), *expected([99, 100, 101], **given)]
    got = client.completions.create(model="tiny", prompt=["ab ab ab ab"], **given)
    assert [choice.text for choice in got.choices] == [answer.text for answer in answers[:2]]
    got = client.completions.create(model="tiny", prompt=[[99, 100, 101]] * 2, **given)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in got.choices] == [answer.text for answer in answers[2:]] * 2
    assert got.usage.prompt_tokens == 6


def test_a_streamed_completion_of_several_choices(client: openai.OpenAI, expected: Callable) -> None:
    texts: dict[int, str] = {}
    for chunk in client.completions.create(model="tiny", prompt="ab ab", n=3, seed=1, temperature=1.0, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert [texts[index] for index in range(3)] == [
        answer.text for answer in expected("ab ab", n=3, seed=1, temperature=1.0)
    ]


def test_what_is_in_the_cache_is_counted(client: openai.OpenAI) -> None:
    prompt = "a text of more than sixteen tokens that nobody else asks"
    counts = []
    for _ in range(2):
        usage = client.completions.create(model="tiny", prompt=prompt, max_tokens=2).usage
        counts.append(usage.prompt_tokens_details.cached_tokens)
    assert counts[0] == 0 and counts[1] >= 16


def test_models_health_and_readiness(client: openai.OpenAI, http: httpx.Client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "outrider"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    assert http.get("/health").json() == {"status": "ok"} and http.get("/ready").status_code == 200


def test_many_streams_of_all_kinds_are_each_what_it_is_alone(server: ServerThread, expected: Callable) -> None:
    """Some leave early, and the others do not notice."""
    words = [f"{'abc ' * (1 + number % 9)}{number}" for number in range(32)]
    kinds = [
        {},
        {"temperature": 1.0, "seed": 5},
        {"stop": ["6"]},
        {"presence_penalty": 1.0, "temperature": 0.7, "seed": 1},
    ]

    async def ask(client: openai.AsyncOpenAI, number: int) -> str | None:
        given = {"model": "tiny", "prompt": words[number], "max_tokens": 8 + number, **kinds[number % 4]}
        if number % 3 == 0:
            return (await client.completions.create(**given)).choices[0].text
        text = ""
        async with await client.completions.create(**given, stream=True) as stream:
            async for chunk in stream:
                text += chunk.choices[0].text
                if number % 8 == 7:
                    return None
        return text

    async def ask_all() -> list[str | None]:
        limits = httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=64), timeout=60)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", http_client=limits) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(len(words))))

    for number, text in enumerate(asyncio.run(ask_all())):
        (answer,) = expected(words[number], max_new_tokens=8 + number, **kinds[number % 4])
        assert text in (None, answer.text), number
