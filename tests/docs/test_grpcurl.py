"""The page's grpcurl commands, carried out as grpcurl does it: names, types and JSON through the server's reflection
alone, none of our generated code."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.serving.generation import SERVICE_NAME
from runtime.config import Config
from runtime.engine.engine import Engine
from tests.cluster.serving.serving import serving

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.system


def commands(page: str) -> list[list[str]]:
    """The words of each grpcurl command in a page's blocks and in its text."""
    text = (ROOT / page).read_text()
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`(grpcurl [^`]+)`", text)
    return [shlex.split(line) for line in lines if line.startswith("grpcurl ")]


COMMANDS = commands("README.md") + commands("docs/grpc.md")


class Grpcurl:
    """What grpcurl does with `list`, `describe` and a method, over one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        self._pool = descriptor_pool.DescriptorPool()

    def list(self) -> list[str]:
        answer = self._ask(list_services="")
        return [service.name for service in answer.list_services_response.service]

    def describe(self, name: str) -> Any:
        """The descriptor of a service. Raises LookupError if the server has no such."""
        answer = self._ask(file_containing_symbol=name)
        if answer.HasField("error_response"):
            raise LookupError(answer.error_response.error_message)
        files = [descriptor_pb2.FileDescriptorProto.FromString(file) for file in self._files(answer)]
        for file in reversed(files):  # what they depend on comes last
            try:
                self._pool.Add(file)
            except TypeError:  # has been added
                pass
        return self._pool.FindServiceByName(name)

    def call(self, method: str, data: str) -> list[dict[str, Any]]:
        """The responses to the messages in `data`, JSON objects one behind the other."""
        service, _, name = method.rpartition("/")
        about = self.describe(service).methods_by_name[name]
        kind, answer = (message_factory.GetMessageClass(each) for each in (about.input_type, about.output_type))
        requests = [json_format.ParseDict(value, kind()) for value in _objects(data)]
        shape = ("stream" if about.client_streaming else "unary", "stream" if about.server_streaming else "unary")
        start = getattr(self._channel, "_".join(shape))(
            f"/{method}", request_serializer=kind.SerializeToString, response_deserializer=answer.FromString
        )
        if not about.client_streaming:
            assert len(requests) <= 1
        given = iter(requests) if about.client_streaming else (requests or [kind()])[0]
        found = start(given, timeout=30)
        return [json_format.MessageToDict(each) for each in (found if about.server_streaming else [found])]

    def _files(self, answer: Any) -> list[bytes]:
        return list(answer.file_descriptor_response.file_descriptor_proto)

    def _ask(self, **what: str) -> Any:
        (answer,) = self._reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**what)]))
        return answer


def _objects(text: str) -> Iterator[Any]:
    decoder, place = json.JSONDecoder(), 0
    while text[place:].strip():
        place += len(text[place:]) - len(text[place:].lstrip())
        value, place = decoder.raw_decode(text, place)
        yield value


@pytest.fixture(scope="module")
def grpcurl(tiny_model: Path) -> Iterator[Grpcurl]:
    settings = [f"model.path={tiny_model}", "server.port=0", "sampling.max_new_tokens=4", "lookahead.enabled=false"]
    with Engine.from_config(Config.load(None, [*settings, "model.device=cpu"])) as engine:
        with serving(engine) as server, grpc.insecure_channel(server.address) as channel:
            yield Grpcurl(channel)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:80])
def test_the_command_does_what_the_page_says(words: list[str], grpcurl: Grpcurl) -> None:
    data = words.pop(words.index("-d") + 1) if "-d" in words else ""
    program, *options = [word for word in words if word != "-d"]
    assert (program, options.pop(0), options.pop(0)) == ("grpcurl", "-plaintext", "localhost:50051")
    if options[0] == "list":
        assert {SERVICE_NAME, "grpc.health.v1.Health"} <= set(grpcurl.list())
    elif options[0] == "describe":
        assert {"Generate", "Converse", "GetServerInfo"} <= {*grpcurl.describe(options[1]).methods_by_name}
    else:
        if data == "@":  # the page says what standard input may have
            (data,) = re.findall(r"`(\{\"turn\".*?)`", (ROOT / "docs/grpc.md").read_text())
        found = grpcurl.call(options[0], data)
        if options[0].startswith(SERVICE_NAME) and not options[0].endswith("GetServerInfo"):
            assert found[-1]["finishReason"] == "FINISH_REASON_LENGTH" and found[-1]["usage"]["numNewTokens"] in (4, 32)
        else:
            assert found[0].get("status", "SERVING") == "SERVING" and found[0]


def test_the_pages_show_every_method_and_a_field_that_is_not_there_is_refused(grpcurl: Grpcurl) -> None:
    shown = {word for words in COMMANDS for word in words if word.startswith(f"{SERVICE_NAME}/")}
    assert shown == {f"{SERVICE_NAME}/{name}" for name in grpcurl.describe(SERVICE_NAME).methods_by_name}
    with pytest.raises(json_format.ParseError, match="no field named"):
        grpcurl.call(f"{SERVICE_NAME}/Generate", '{"words": "Once"}')
    with pytest.raises(LookupError):
        grpcurl.describe("outrider.v1.NoService")
