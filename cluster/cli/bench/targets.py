"""Servers under load: Outrider's gRPC, and any that speaks OpenAI's HTTP. One interface for both."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx2

from cluster.cli.batch.records import Record
from cluster.client.access import Access
from cluster.client.address import is_here
from cluster.client.async_client import AsyncClient
from cluster.wire.statuses import CallError
from runtime.errors import ConfigError, InvalidRequestError, OutriderError
from runtime.prompts import kind_of


@dataclass(frozen=True)
class Piece:
    """What one chunk of an answer says."""

    num_tokens: int | None
    """None: it brought some, and does not say how many."""
    is_last: bool = False
    num_prompt_tokens: int | None = None
    """As the server counts them, where the chunk says so."""
    num_new_tokens: int | None = None


class AnswerError(OutriderError):
    """A request was not answered; `kind` is what it is counted as."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class Target(Protocol):
    """A server. Its calls go on side by side in one event loop."""

    def answer(self, record: Record) -> AsyncIterator[Piece]:
        """Ask. Raises AnswerError."""

    async def close(self) -> None:
        """End the connections."""


class GrpcTarget:
    """GenerationService."""

    def __init__(self, address: str) -> None:
        """Raises ConfigError where that is no HOST:PORT."""
        self._client = AsyncClient(address)

    async def answer(self, record: Record) -> AsyncIterator[Piece]:
        kind = kind_of(record.prompt)
        given: dict[str, Any] = {"prompt" if kind == "text" else kind: record.prompt}
        try:
            async with self._client.generate(**given, sampling=record.sampling, lookahead=record.lookahead) as chunks:
                async for chunk in chunks:
                    usage = chunk.usage
                    counts = (usage.num_prompt_tokens, usage.num_new_tokens) if usage is not None else (None, None)
                    yield Piece(len(chunk.token_ids), chunk.finish_reason is not None, *counts)
        except CallError as error:
            raise AnswerError(error.code.name, str(error)) from None
        except InvalidRequestError as error:
            raise AnswerError("cannot be sent", str(error)) from None

    async def close(self) -> None:
        await self._client.close()


class HttpTarget:
    """`/v1/chat/completions` for messages, `/v1/completions` for texts and token ids."""

    def __init__(self, url: str, model: str | None) -> None:
        """`url` may end in /v1. Raises ConfigError where it is none."""
        base = url.rstrip("/").removesuffix("/v1")
        access = Access.of({"token": os.environ.get("OUTRIDER_TOKEN") or os.environ.get("OPENAI_API_KEY")})
        headers = {"Authorization": f"Bearer {access.token}"} if access.token else {}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        try:
            parsed = httpx2.URL(base)
            if parsed.scheme == "http" and access.token and not is_here(f"{parsed.host}:{parsed.port or 80}"):
                problem, remedy = "would get the token without TLS", "Give an https:// URL, or call through a tunnel."
                raise ConfigError("--url", url, problem, remedy)
            self._client = httpx2.AsyncClient(
                base_url=base, headers=headers, timeout=None, limits=limits, verify=_trusted(access)
            )
        except (httpx2.InvalidURL, OSError) as error:
            raise ConfigError("--url", url, f"cannot be called ({error})", "Write http://HOST:PORT.") from error
        self._model = model

    async def answer(self, record: Record) -> AsyncIterator[Piece]:
        path, body = _body(record)
        try:
            if self._model is None:
                self._model = await self._first_model()
            body["model"] = self._model
            async with self._client.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise AnswerError(f"HTTP {response.status_code}", response.text[:500])
                async for piece in _pieces(response):
                    yield piece
        except httpx2.ConnectError as error:
            raise AnswerError("no connection", str(error)) from None
        except httpx2.HTTPError as error:
            raise AnswerError("connection lost", f"{type(error).__name__}: {error}") from None

    async def close(self) -> None:
        await self._client.aclose()

    async def _first_model(self) -> str:
        response = await self._client.get("/v1/models")
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            problem = f"/v1/models names no model (HTTP {response.status_code}); name one with --model"
            raise AnswerError(f"HTTP {response.status_code}", problem) from None


def _trusted(access: Access) -> ssl.SSLContext:
    """Whose certificates are believed, and which is shown: the environment's, as for gRPC."""
    authority = access.tls_ca if access.tls_ca != "system" else None
    context = ssl.create_default_context(cafile=authority)
    if access.tls_cert is not None:
        context.load_cert_chain(access.tls_cert, access.tls_key)
    return context


def make_target(url: str, model: str | None) -> Target:
    """HTTP for a URL, gRPC for HOST:PORT. Raises ConfigError."""
    if url.partition("://")[0] in ("http", "https"):
        return HttpTarget(url, model)
    if model is not None:
        problem, remedy = "is for a server of many models", "Leave it out, or give --url http://HOST:PORT."
        raise ConfigError("--model", model, problem, remedy)
    return GrpcTarget(url.removeprefix("grpc://"))


def _body(record: Record) -> tuple[str, dict[str, Any]]:
    """Path and body of a call. Parameters that OpenAI's interface has go by its names, others by ours."""
    sampling: dict[str, Any] = dict(record.sampling)
    is_chat = kind_of(record.prompt) == "messages"
    body: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    body["messages" if is_chat else "prompt"] = record.prompt
    if "max_new_tokens" in sampling:
        body["max_tokens"] = sampling.pop("max_new_tokens")
    if "logit_bias" in sampling:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.pop("logit_bias").items()}
    if is_chat and "logprobs" in sampling:
        body |= {"logprobs": True, "top_logprobs": sampling.pop("logprobs")}
    if record.lookahead:
        body["lookahead"] = record.lookahead
    return f"/v1/{'chat/' if is_chat else ''}completions", body | sampling


async def _pieces(response: httpx2.Response) -> AsyncIterator[Piece]:
    """Of server-sent events."""
    ended = False
    async for line in response.aiter_lines():
        content = line.removeprefix("data:").strip()
        if not line.startswith("data:") or content == "[DONE]":  # read to the end, and the connection can be used again
            continue
        try:
            chunk = json.loads(content)
            if "error" in chunk:
                raise AnswerError("error in the stream", json.dumps(chunk["error"])[:500])
            piece = _piece(chunk)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise AnswerError("malformed", content[:500]) from None
        ended |= piece.is_last
        yield piece
    if not ended:
        raise AnswerError("cut off", "the stream ended before the answer")


def _piece(chunk: Mapping[str, Any]) -> Piece:
    usage = chunk.get("usage") or {}
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    choices = chunk.get("choices") or []
    if not choices:
        return Piece(0, False, *counts)
    choice = choices[0]
    said = choice.get("delta") or choice
    ours = chunk.get("outrider")
    has_text = any(said.get(name) for name in ("content", "text", "reasoning_content", "tool_calls"))
    number = ours["num_tokens"] if ours is not None else None if has_text else 0
    return Piece(number, choice.get("finish_reason") is not None, *counts)
