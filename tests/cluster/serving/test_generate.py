"""Real models behind a real server: what arrives over gRPC is what the engine gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.client.client import Client
from cluster.serving.generation import SERVICE_NAME
from cluster.wire.statuses import CallError
from runtime.config import Config, SamplingParams
from runtime.engine.engine import Engine
from runtime.model.directory import load_spec
from runtime.request import FinishReason
from tests.cluster.serving.serving import serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

PROMPT = "abc abc abc abc"
LOOKAHEAD = [
    "lookahead.planner=false",
    "lookahead.window_size=4",
    "lookahead.ngram_size=3",
    "lookahead.guess_set_size=4",
]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    settings = [f"model.path={tiny_model}", "server.port=0", "scheduler.max_sequences=3", "scheduler.max_waiting=1"]
    with Engine.from_config(Config.load(None, [*settings, *LOOKAHEAD, "model.device=cpu"])) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[Client]:
    with serving(engine) as server, Client(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> Callable[..., tuple[tuple[int, ...], str]]:
    """Tokens and text that another engine, in no server and without lookahead, gives for a prompt."""
    settings = [f"model.path={tiny_model}", "lookahead.enabled=false", "model.device=cpu"]
    engine = Engine.from_config(Config.load(None, settings))

    def run(prompt: object, **sampling: object) -> tuple[tuple[int, ...], str]:
        (completion,) = engine.generate([prompt], SamplingParams(**sampling))
        return completion.token_ids, completion.text

    return run


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_concurrent_streams_give_what_each_gives_alone(client: Client, expected: Callable) -> None:
    prompts = [PROMPT, "some other text", "and a third, longer than the others, é 漢字 👋"]
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda text: client.complete(text, sampling={"max_new_tokens": 40}), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert (answer.token_ids, answer.text) == expected(prompt, max_new_tokens=40)
        assert sum(answer.run_lengths) == answer.usage.num_new_tokens == len(answer.token_ids)


def test_accepted_tokens_are_counted_per_step(client: Client) -> None:
    chunks = list(client.generate(PROMPT, sampling={"max_new_tokens": 60, "ignore_eos": True}))
    usage = chunks[-1].usage
    assert usage is not None
    assert sum(chunk.num_accepted for chunk in chunks) == usage.num_new_tokens - usage.num_steps > 0
    assert len(chunks) == usage.num_steps < 60


def test_lookahead_off_gives_the_same_tokens_one_by_one(client: Client) -> None:
    ahead = client.complete(PROMPT, sampling={"max_new_tokens": 40})
    plain = client.complete(PROMPT, sampling={"max_new_tokens": 40}, lookahead={"enabled": False})
    assert plain.token_ids == ahead.token_ids and plain.text == ahead.text
    assert set(plain.run_lengths) == {1} and len(ahead.run_lengths) < len(plain.run_lengths)


def test_a_stop_token_inside_an_accepted_run_ends_the_text_there(client: Client) -> None:
    chunks = list(client.generate(PROMPT, sampling={"max_new_tokens": 60, "ignore_eos": True}))
    ids = [token for chunk in chunks for token in chunk.token_ids]
    start = 0
    for chunk in chunks:
        for offset, token in enumerate(chunk.token_ids[:-1]):
            if token not in ids[: start + offset]:  # first seen inside a run: it stops the text exactly there
                answer = client.complete(
                    PROMPT, sampling={"max_new_tokens": 60, "ignore_eos": True, "stop_token_ids": [token]}
                )
                assert list(answer.token_ids) == ids[: start + offset + 1]
                assert answer.finish_reason is FinishReason.STOP
                return
        start += len(chunk.token_ids)
    pytest.fail("no run of accepted tokens brought a new token: choose another prompt")


def test_max_new_tokens_is_exact(client: Client) -> None:
    whole = client.complete(PROMPT, sampling={"max_new_tokens": 30, "ignore_eos": True}).token_ids
    for count in range(1, 30, 4):
        answer = client.complete(PROMPT, sampling={"max_new_tokens": count, "ignore_eos": True})
        assert answer.token_ids == whole[:count] and answer.finish_reason is FinishReason.LENGTH


def test_seeds_reproduce_and_differ(client: Client, expected: Callable) -> None:
    def sample(seed: int) -> tuple[int, ...]:
        sampling = {"max_new_tokens": 24, "temperature": 0.9, "top_p": 0.95, "seed": seed}
        return client.complete(PROMPT, sampling=sampling).token_ids

    assert sample(1) == sample(1) != sample(2)
    assert sample(2**62 + 1) == expected(PROMPT, max_new_tokens=24, temperature=0.9, top_p=0.95, seed=2**62 + 1)[0]


def test_text_messages_and_ids_are_the_same_prompt(client: Client, engine: Engine) -> None:
    messages = [{"role": "user", "content": "hi"}]
    ids = engine.tokenizer.encode_chat(messages)
    assert client.complete(messages=messages).token_ids == client.complete(token_ids=ids).token_ids
    assert client.complete("hi").token_ids == client.complete(token_ids=engine.tokenizer.encode("hi")).token_ids


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompt": ""}, "text"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"token_ids": [262]}, "token_ids"),
        ({"token_ids": [-1]}, "token_ids"),
        ({"prompt": "a" * 600}, "prompt"),
        ({"prompt": "a", "sampling": {"max_new_tokens": 0}}, "sampling.max_new_tokens"),
        ({"prompt": "a", "sampling": {"stop_token_ids": [262]}}, "sampling.stop_token_ids"),
        (
            {"prompt": "a", "lookahead": {"window_size": 256, "ngram_size": 16, "planner": False}},
            "lookahead.window_size",
        ),
    ],
)
def test_bad_requests_name_the_field(client: Client, arguments: dict, field: str) -> None:
    with pytest.raises(CallError) as caught:
        client.complete(**arguments)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details.startswith(field)


def test_cancellation_frees_the_slot_for_those_that_wait(client: Client, engine: Engine) -> None:
    forever = {"max_new_tokens": 480, "ignore_eos": True}
    streams = [client.generate("a", sampling=forever, lookahead={"enabled": False}) for _ in range(3)]
    for stream in streams:
        next(stream)
    assert engine.num_running == 3
    for stream in streams:
        stream.close()
    eventually(lambda: engine.num_running == 0)
    assert client.complete("b", sampling={"max_new_tokens": 3}).usage.num_new_tokens == 3


def test_a_full_server_says_so(client: Client) -> None:
    forever = {"max_new_tokens": 480, "ignore_eos": True}
    streams = [client.generate("a", sampling=forever, lookahead={"enabled": False}) for _ in range(5)]
    refused = 0
    for stream in streams:
        try:
            next(stream)
        except CallError as error:
            assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            refused += 1
    for stream in streams:
        stream.close()
    assert refused == 1


def test_a_deadline_frees_the_slot(client: Client, engine: Engine) -> None:
    eventually(lambda: engine.num_running == 0)
    sampling = {"max_new_tokens": 480, "ignore_eos": True}
    with pytest.raises(CallError) as caught:
        client.complete("a", sampling=sampling, lookahead={"enabled": False}, timeout_s=0.2)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: engine.num_running == 0)


def test_a_full_cache_ends_the_text(client: Client) -> None:
    answer = client.complete("a" * 500, sampling={"max_new_tokens": 100, "ignore_eos": True})
    assert (answer.finish_reason, answer.usage.num_new_tokens) == (FinishReason.LENGTH, 12)


def test_health_and_reflection_are_there(client: Client) -> None:
    assert client.is_serving()
    database = ProtoReflectionDescriptorDatabase(client._channel)
    assert SERVICE_NAME in database.get_services()
    assert "grpc.health.v1.Health" in database.get_services()
    service = DescriptorPool(database).FindServiceByName(SERVICE_NAME)
    assert {"Generate", "GetServerInfo"} <= {method.name for method in service.methods}


def test_server_info_counts(client: Client, engine: Engine) -> None:
    before = client.server_info().counters
    answer = client.complete(PROMPT, sampling={"max_new_tokens": 10, "ignore_eos": True})
    after = client.server_info()
    assert after.counters.num_tokens - before.num_tokens == len(answer.token_ids) == 10
    assert after.counters.num_steps - before.num_steps == answer.usage.num_steps
    assert after.counters.requests_by_outcome["length"] - before.requests_by_outcome["length"] == 1
    assert after.counters.seconds_by_phase["forward"] > before.seconds_by_phase["forward"]
    assert (after.counters.num_running, after.counters.num_waiting) == (0, 0)
    assert after.model.capacity == engine.capacity == 512
    assert after.model.num_parameters == num_parameters(engine)
    assert after.lookahead.window_size == 4


def num_parameters(engine: Engine) -> int:
    from safetensors import safe_open

    assert engine.config.model.path is not None
    assert load_spec(Path(engine.config.model.path)) == engine.spec
    with safe_open(Path(engine.config.model.path) / "model.safetensors", framework="np") as weights:
        return sum(weights.get_tensor(name).size for name in weights.keys())


def test_the_embedded_model_answers_a_chat() -> None:
    settings = ["server.port=0", "model.device=cpu", "sampling.max_new_tokens=12"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    with Engine.from_config(Config.load(None, settings)) as engine:
        (alone,) = engine.generate([messages], lookahead=engine.config.lookahead.merged({"enabled": False}))
        with serving(engine) as server, Client(server.address) as client:
            answer = client.complete(messages=messages)
            model = client.server_info().model
    assert (answer.token_ids, answer.text) == (alone.token_ids, alone.text)
    assert "Paris" in answer.text
    assert model.name.startswith("SmolLM2-135M-Instruct") and model.num_parameters == 134_515_008
