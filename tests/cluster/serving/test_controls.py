"""The controls of what is generated, over gRPC and at the command line: what arrives is what the engine gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli import commands as cli
from cluster.client.client import Client
from cluster.wire.statuses import CallError
from runtime.config import Config
from runtime.engine.engine import Engine
from tests.cluster.serving.serving import serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

PROMPT = "abc abc abc abc"
CONTROLS = {
    "max_new_tokens": 20,
    "temperature": 0.9,
    "seed": 4,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "logit_bias": {97: 2.0, 98: -5.5},
    "min_new_tokens": 4,
}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    settings = [f"model.path={tiny_model}", "server.port=0", "scheduler.max_sequences=3", "model.device=cpu"]
    with Engine.from_config(Config.load(None, settings)) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[Client]:
    with serving(engine) as server, Client(server.address) as client:
        yield client


def test_controls_mean_the_same_at_every_door(client: Client, engine: Engine, tmp_path: Path, capsys) -> None:
    expected = engine.generate([PROMPT], CONTROLS)[0].token_ids
    assert expected != engine.generate([PROMPT], {"max_new_tokens": 20, "temperature": 0.9, "seed": 4})[0].token_ids
    assert client.complete(PROMPT, sampling=CONTROLS).token_ids == expected
    with client.converse() as conversation:
        assert tuple(t for chunk in conversation.ask(PROMPT, sampling=CONTROLS) for t in chunk.token_ids) == expected
    options = [f"--{name.replace('_', '-')}={value}" for name, value in CONTROLS.items() if name != "logit_bias"]
    options += [f"--logit-bias={token}:{bias}" for token, bias in CONTROLS["logit_bias"].items()]
    with pytest.raises(SystemExit):
        cli.main(["generate", PROMPT, "--raw", "--json", f"--address={client.address}", *options])
    assert tuple(json.loads(capsys.readouterr().out)["token_ids"]) == expected
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": 1, "prompt": PROMPT, **CONTROLS}) + "\n")
    with pytest.raises(SystemExit):
        cli.main(["batch", f"{tmp_path}/in.jsonl", f"{tmp_path}/out.jsonl", f"--address={client.address}"])
    assert tuple(json.loads((tmp_path / "out.jsonl").read_text())["token_ids"]) == expected


def test_stop_texts_and_log_probabilities_arrive_as_the_engine_gives_them(
    client: Client, engine: Engine, tmp_path: Path, capsys
) -> None:
    free = engine.generate([PROMPT], {"max_new_tokens": 30, "ignore_eos": True})[0].text
    stop = free[11:14]
    asked = {"max_new_tokens": 30, "ignore_eos": True, "stop": [stop, "?!?!"], "logprobs": 2, "prompt_logprobs": 1}
    expected = engine.generate([PROMPT], asked)[0]
    assert expected.text == free[: free.index(stop)] and expected.finish_reason == "stop"
    answer = client.complete(PROMPT, sampling=asked)
    for found in (answer.token_ids, answer.text, answer.finish_reason):
        assert found in (expected.token_ids, expected.text, expected.finish_reason)
    assert answer.prompt_logprobs[0] is None and len(answer.prompt_logprobs) == len(PROMPT)
    for one, other in zip(
        answer.logprobs + answer.prompt_logprobs[1:], expected.logprobs + expected.prompt_logprobs[1:], strict=True
    ):
        assert abs(one.logprob - other.logprob) < 1e-4
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
    with client.converse() as conversation:
        chunks = list(conversation.ask(PROMPT, sampling={**asked, "include_stop": True}))
    assert "".join(chunk.text for chunk in chunks) == expected.text + stop
    assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks) and chunks[0].prompt_logprobs
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": 1, "prompt": PROMPT, **asked}) + "\n")
    with pytest.raises(SystemExit):
        cli.main(["batch", f"{tmp_path}/in.jsonl", f"{tmp_path}/out.jsonl", f"--address={client.address}"])
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert record["text"] == expected.text and record["prompt_logprobs"][0] is None
    assert [len(one["top"]) for one in record["logprobs"]] == [2] * len(expected.token_ids)
    options = ["--ignore-eos", "--max-new-tokens=30", f"--stop={stop}", "--stop=?!?!", "--logprobs=0"]
    with pytest.raises(SystemExit):
        cli.main(["generate", PROMPT, "--raw", "--json", f"--address={client.address}", *options])
    told = json.loads(capsys.readouterr().out)
    assert told["text"] == expected.text and set(told["logprobs"][0]) == {"logprob"}


def test_n_answers_arrive_as_the_engine_gives_them(client: Client, engine: Engine, tmp_path: Path, capsys) -> None:
    asked = {"max_new_tokens": 10, "temperature": 1.2, "seed": 6, "n": 3, "ignore_eos": True}
    prompt = PROMPT * 3
    expected = [one.text for one in engine.generate([prompt], asked)]
    assert len(set(expected)) == 3
    answer = client.complete(prompt, sampling=asked)
    assert [answer.text, *(other.text for other in answer.others)] == expected
    assert {chunk.index for chunk in client.generate(prompt, sampling=asked)} == {0, 1, 2}
    assert answer.others[0].usage.num_reused_tokens > 0 and answer.others[0].usage.num_new_tokens == 10
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a", "prompt": prompt, **asked}) + "\n")
    with pytest.raises(SystemExit):
        cli.main(["batch", f"{tmp_path}/in.jsonl", f"{tmp_path}/out.jsonl", f"--address={client.address}"])
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert [choice["text"] for choice in record["choices"]] == expected and record["num_new_tokens"] == 30
    capsys.readouterr()
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items() if name != "ignore_eos"]
    given = ["generate", prompt, "--raw", "--ignore-eos", *options, f"--address={client.address}"]
    with pytest.raises(SystemExit):
        cli.main(given)
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)
    with client.converse() as conversation, pytest.raises(CallError, match="sampling.n"):
        list(conversation.ask(prompt, sampling=asked))


@pytest.mark.parametrize(
    "form",
    [
        {"json_schema": '{"enum": ["alpha", "beta", 7]}'},
        {"regex": "[0-9]{3}[ab]"},
        {"choice": ["one", "two"]},
        {"grammar": 'start: "x" /[yz]/ "!"'},
        {"json_object": True},
    ],
    ids=lambda form: next(iter(form)),
)
def test_a_form_of_the_text_means_the_same_at_every_door(
    client: Client, engine: Engine, tmp_path: Path, capsys, form
) -> None:
    asked = {"max_new_tokens": 12, **form}
    expected = engine.generate([PROMPT], asked)[0]
    assert client.complete(PROMPT, sampling=asked).token_ids == expected.token_ids
    ((name, value),) = form.items()
    option = f"--{name.replace('_', '-')}"
    options = (
        [option] if value is True else [f"{option}={one}" for one in ([value] if isinstance(value, str) else value)]
    )
    with pytest.raises(SystemExit):
        cli.main(
            ["generate", PROMPT, "--raw", "--json", "--max-new-tokens=12", f"--address={client.address}", *options]
        )
    assert json.loads(capsys.readouterr().out)["text"] == expected.text
    record = {"prompt": PROMPT, **asked}
    if name == "json_schema":
        record["json_schema"] = json.loads(value)  # an object is as good as its text
    (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(SystemExit):
        cli.main(["batch", f"{tmp_path}/in.jsonl", f"{tmp_path}/out.jsonl", f"--address={client.address}"])
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"] == expected.text


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"min_p": 2.0}, "sampling.min_p"),
        ({"logit_bias": {1: 1000.0}}, "sampling.logit_bias"),
        ({"logit_bias": {100_000: 1.0}}, "sampling.logit_bias"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "sampling.min_new_tokens"),
        ({"stop": [""]}, "sampling.stop"),
        ({"regex": "("}, "sampling.regex"),
        ({"regex": "a", "choice": ["b"]}, "sampling.choice"),
        ({"json_schema": '{"$ref": "https://example.org/x"}'}, "sampling.json_schema"),
        ({"stop": ["x"] * 65}, "sampling.stop"),
        ({"include_stop": True}, "sampling.include_stop"),
        ({"logprobs": 21}, "sampling.logprobs"),
        ({"prompt_logprobs": -1}, "sampling.prompt_logprobs"),
    ],
)
def test_what_cannot_be_is_refused_by_name(client: Client, sampling: dict, said: str) -> None:
    with pytest.raises(CallError, match=said):
        client.complete(PROMPT, sampling=sampling)


def test_a_bias_at_the_command_line_is_an_id_and_a_number(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "x", "--logit-bias=5"])
    assert "--logit-bias = '5': is not ID:BIAS" in capsys.readouterr().err
