"""What the clients share, the one that waits and the one for asyncio: channels, arguments, whole answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from cluster.client.address import channel_options
from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.wire.answers import Answer, Chunk
from cluster.wire.transport import COMPRESSIONS, MAX_MESSAGE_BYTES, Compression
from runtime.errors import ConfigError, InvalidRequestError
from runtime.prompts import check_unicode

SERVICE_CONFIG: dict[str, Any] = {
    "methodConfig": [
        {
            "name": [{"service": pb.DESCRIPTOR.services_by_name["GenerationService"].full_name}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}
"""What gRPC's own retries do: a call is sent again where the server could not take it, before any response of it has
come. Any language's client takes it as it stands (docs/grpc.md)."""


def options(
    address: str, compression: Compression, keepalive_s: float | None, retries: bool = True
) -> list[tuple[str, Any]]:
    """Of a channel to `address`. `retries`: gRPC's own, for a client that does not send again by itself. Raises
    ConfigError."""
    found: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # A server that is started again is found within seconds; gRPC by itself waits up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.enable_retries", int(retries)),
        *channel_options(address),
    ]
    if retries:
        found.append(("grpc.service_config", json.dumps(SERVICE_CONFIG)))
    if compression not in COMPRESSIONS:
        remedy = f"Choose among {', '.join(COMPRESSIONS)}."
        raise ConfigError("compression", compression, "is no kind of compression", remedy)
    if compression != "none":
        found.append(("grpc.default_compression_algorithm", int(COMPRESSIONS[compression])))
    if keepalive_s is not None:
        if isinstance(keepalive_s, bool) or not isinstance(keepalive_s, int | float) or not 0 < keepalive_s < 1e6:
            problem, remedy = "is no number of seconds above 0", "Give one, or None for no pings."
            raise ConfigError("keepalive_s", keepalive_s, problem, remedy)
        found += [
            ("grpc.keepalive_time_ms", int(1e3 * keepalive_s)),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),
        ]
    return found


def checked_id(field: str, given: Any) -> str:
    """An id as it can be sent. Raises InvalidRequestError."""
    if not isinstance(given, str):
        raise InvalidRequestError(field, given, f"is of type {type(given).__name__}", "Give a text, or leave it out.")
    check_unicode(field, given)
    return given


def checked_timeout(given: Any) -> float | None:
    """Seconds as gRPC takes them; infinity is none. Raises InvalidRequestError."""
    if given is None or given == math.inf:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not given >= 0:
        raise InvalidRequestError("timeout_s", given, "is no number of seconds", "Give one, or None for no limit.")
    return float(given)


def whole(chunks: Sequence[Chunk]) -> Answer:
    """The answer that these chunks, all of one index, are."""
    last = chunks[-1]
    assert last.finish_reason is not None and last.usage is not None
    return Answer(
        request_id=last.request_id,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        finish_reason=last.finish_reason,
        usage=last.usage,
        run_lengths=tuple(len(chunk.token_ids) for chunk in chunks if chunk.token_ids),
        logprobs=tuple(one for chunk in chunks for one in chunk.logprobs),
        prompt_logprobs=tuple(one for chunk in chunks for one in chunk.prompt_logprobs),
    )
