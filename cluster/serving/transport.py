"""How gRPC carries the service: the size of messages, compression, keepalive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from cluster.wire.transport import COMPRESSIONS, MAX_MESSAGE_BYTES
from runtime.config import ServerConfig

INT_MAX = 2**31 - 1


def server(config: ServerConfig, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> grpc.aio.Server:
    """A server without services or ports, whose calls pass the interceptors. It must be made in the event loop that it
    is to run in."""
    compression = COMPRESSIONS[config.compression]
    return grpc.aio.server(interceptors=interceptors, options=options(config), compression=compression)


def options(config: ServerConfig) -> list[tuple[str, Any]]:
    """gRPC's own names for what the config says."""
    keepalive = config.keepalive
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # Otherwise a second server on the same port is not an error, and takes half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        # Finds clients that vanished without a word, whose sequences would run on.
        ("grpc.keepalive_time_ms", _milliseconds(keepalive.time_s)),
        ("grpc.keepalive_timeout_ms", _milliseconds(keepalive.timeout_s)),
        # Clients do the same with nothing to say, and that is no reason to end what they wait for.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", 2 if keepalive.least_interval_s else 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(keepalive.least_interval_s)),
        ("grpc.max_connection_idle_ms", _milliseconds(keepalive.max_connection_idle_s)),
        ("grpc.max_connection_age_ms", _milliseconds(keepalive.max_connection_age_s)),
    ]


def _milliseconds(seconds: float | None) -> int:
    """As gRPC takes them; none is without end."""
    return INT_MAX if seconds is None else int(min(1e3 * seconds, INT_MAX))
