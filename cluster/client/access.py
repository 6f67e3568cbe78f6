"""How a client is let in: its token, and TLS."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc

from cluster.client.address import is_here
from runtime.errors import ConfigError

Options = list[tuple[str, Any]]
VARIABLES = {
    "token": "OUTRIDER_TOKEN",
    "tls_ca": "OUTRIDER_TLS_CA",
    "tls_cert": "OUTRIDER_TLS_CERT",
    "tls_key": "OUTRIDER_TLS_KEY",
}
REMEDY = "Name the file of the server's authority (tls_ca, --tls-ca, OUTRIDER_TLS_CA), or call through a tunnel."


@dataclass(frozen=True)
class Access:
    """Each is None where it is not needed."""

    token: str | None = field(default=None, repr=False)
    """The bearer token. It is sent over TLS, or to this machine; elsewhere only with `insecure`."""
    tls_ca: str | None = None
    """PEM file of the authority that vouches for the server; with it, the connection is TLS. "system": the system's."""
    tls_cert: str | None = None
    """PEM file of the client's own certificate, where the server wants one."""
    tls_key: str | None = None
    """PEM file of its key."""
    insecure: bool = False
    """Send the token in the clear to another machine."""

    @classmethod
    def of(cls, given: Mapping[str, str | None] | None = None, insecure: bool = False) -> Self:
        """What is given, and the rest from the environment: OUTRIDER_TOKEN, OUTRIDER_TLS_CA, OUTRIDER_TLS_CERT,
        OUTRIDER_TLS_KEY."""
        named = {name: value for name, value in (given or {}).items() if value is not None}
        others = {name: os.environ.get(variable) or None for name, variable in VARIABLES.items()}
        return cls(**(others | named), insecure=insecure)

    def credentials(self, address: str) -> grpc.ChannelCredentials | None:
        """Of a channel to there; None: it is not encrypted. Raises ConfigError."""
        if self.tls_ca is None:
            if self.token is not None and not is_here(address) and not self.insecure:
                raise ConfigError("address", address, "would get the token without TLS", REMEDY)
            if self.tls_cert is not None or self.tls_key is not None:
                raise ConfigError("tls_cert", self.tls_cert, "is for TLS", REMEDY)
            return None
        root = None if self.tls_ca == "system" else _read("tls_ca", self.tls_ca)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert", self.tls_cert, "goes with tls_key", "Give both, or neither.")
        cert = _read("tls_cert", self.tls_cert) if self.tls_cert is not None else None
        key = _read("tls_key", self.tls_key) if self.tls_key is not None else None
        return grpc.ssl_channel_credentials(root, key, cert)

    def channel(self, address: str, options: Options) -> grpc.Channel:
        """A channel whose calls bring the token. Raises ConfigError."""
        credentials = self.credentials(address)
        if credentials is None:
            channel = grpc.insecure_channel(address, options=options)
        else:
            channel = grpc.secure_channel(address, credentials, options=options)
        return grpc.intercept_channel(channel, _Bearer(self.token)) if self.token is not None else channel

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """What each call brings."""
        return [("authorization", f"Bearer {self.token}")] if self.token is not None else []


def read_token(path: Path) -> str:
    """The token that a file holds. Raises ConfigError."""
    try:
        token = path.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        problem = f"cannot be read ({getattr(error, 'strerror', None) or 'it is no UTF-8'})"
        raise ConfigError("--token-file", str(path), problem, "Name a file with the token alone.") from None
    if not token or len(token.split()) > 1:
        raise ConfigError("--token-file", str(path), "does not hold one token", "Name a file with the token alone.")
    return token


def _read(name: str, path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(name, path, f"cannot be read ({error.strerror})", "Name a PEM file.") from None


class _Details(
    collections.namedtuple(
        "_Details", ("method", "timeout", "metadata", "credentials", "wait_for_ready", "compression")
    ),
    grpc.ClientCallDetails,
):
    """A call's, with other metadata."""


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Puts the token into every call."""

    def __init__(self, token: str) -> None:
        self._line = ("authorization", f"Bearer {token}")

    def _intercept(self, go_on: Callable[..., Any], details: grpc.ClientCallDetails, request: Any) -> Any:
        metadata = [*(details.metadata or ()), self._line]
        timeout, credentials = details.timeout, details.credentials
        ready, compression = details.wait_for_ready, details.compression
        return go_on(_Details(details.method, timeout, metadata, credentials, ready, compression), request)

    intercept_unary_unary = _intercept
    intercept_unary_stream = _intercept
    intercept_stream_unary = _intercept
    intercept_stream_stream = _intercept
