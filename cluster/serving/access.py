"""Who may call: bearer tokens, and what a server that others can reach must have. Tokens are kept as digests only."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import os
import re
import socket
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.wire.statuses import UnauthenticatedError
from runtime.config import Config, LimitsConfig, ServerConfig
from runtime.errors import ConfigError

VARIABLE = "OUTRIDER_TOKENS"
MIN_TOKEN_LENGTH = 16
REMEDY = "Make one with: openssl rand -hex 32."


@dataclass(frozen=True)
class Caller:
    """Whose token it is."""

    name: str
    limits: LimitsConfig


class Tokens:
    """The tokens that callers may have."""

    def __init__(self, known: Sequence[tuple[str, Caller]]) -> None:
        """(token, whose it is)"""
        self._known = [(_digest(token), caller) for token, caller in known]

    def caller(self, authorization: str | None) -> Caller:
        """Who presents this `authorization`: "Bearer TOKEN", or, as browsers have it, "Basic" with the token as the
        password. Raises UnauthenticatedError.

        How long it takes tells nothing of the tokens: digests are compared, with all that are known.
        """
        presented = _digest(_token_of(authorization))
        found: Caller | None = None
        for digest, caller in self._known:
            if hmac.compare_digest(digest, presented):
                found = caller
        if found is None:
            raise UnauthenticatedError("a bearer token of this server is needed")
        return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _token_of(authorization: str | None) -> str:
    kind, _, value = (authorization or "").strip().partition(" ")
    value = value.strip()
    if kind.lower() == "bearer":
        return value
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    return ""


def read_tokens(settings: ServerConfig, environment: Mapping[str, str] = os.environ) -> Tokens | None:
    """Those of server.tokens_file and OUTRIDER_TOKENS; None: neither is set, and nobody needs one.

    A line, or what stands between commas in the variable, is "[NAME] TOKEN [LIMIT=NUMBER ...]", a limit one of
    server.limits. Raises ConfigError, which shows no token.
    """
    lines: list[tuple[str, str]] = []
    if settings.tokens_file is not None:
        try:
            text = Path(settings.tokens_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            problem = f"cannot be read ({getattr(error, 'strerror', None) or 'it is no UTF-8'})"
            raise ConfigError("server.tokens_file", settings.tokens_file, problem, "Name a readable file.") from None
        lines += [(f"line {number}", line) for number, line in enumerate(text.splitlines(), 1)]
    if environment.get(VARIABLE):
        lines += [(f"{VARIABLE}, {number}", line) for number, line in enumerate(environment[VARIABLE].split(","), 1)]
    elif settings.tokens_file is None:
        return None
    known = [_read(place, line, settings.limits) for place, line in lines if line.strip() and line.lstrip()[0] != "#"]
    if not known:
        raise ConfigError("server.tokens_file", settings.tokens_file, "has no token", f"Write one a line. {REMEDY}")
    names = [caller.name for _, caller in known]
    if len({token for token, _ in known}) < len(known) or len(set(names)) < len(known):
        twice = max(names, key=names.count)
        raise ConfigError("server.tokens_file", settings.tokens_file, f"a token or a name ({twice}) is there twice", "")
    return Tokens(known)


def _read(place: str, line: str, defaults: LimitsConfig) -> tuple[str, Caller]:
    words = line.split()
    limits = [word for word in words if re.match(r"[a-z_]+=", word) and word.partition("=")[0] in _LIMITS]
    words = [word for word in words if word not in limits]
    if not 1 <= len(words) <= 2:
        raise ConfigError(place, "(not shown)", "is not [NAME] TOKEN [LIMIT=NUMBER ...]", "Mend the line.")
    token, name = words[-1], words[0] if len(words) == 2 else place
    if len(token) < MIN_TOKEN_LENGTH or not token.isascii():
        problem = f"the token is shorter than {MIN_TOKEN_LENGTH} characters, or not ASCII"
        raise ConfigError(place, "(not shown)", problem, REMEDY)
    given: dict[str, float] = {}
    for limit in limits:
        key, _, number = limit.partition("=")
        try:
            given[key] = float(number) if key != "concurrent_requests" else int(number)
        except ValueError:
            raise ConfigError(f"{place}: {key}", number, "is no number", "Write for example 60.") from None
    return token, Caller(name, LimitsConfig(**(defaults.model_dump() | given)))


_LIMITS = tuple(LimitsConfig.model_fields)


def check_reach(config: Config) -> None:
    """Raise ConfigError if others can reach the server and nothing protects what goes over the wire."""
    server = config.server
    if server.insecure or server.tls.cert is not None or is_loopback(server.host):
        return
    problem = "takes calls from other machines, and there is no TLS"
    remedy = "Set server.tls.cert and server.tls.key, or server.insecure if the network is yours alone."
    raise ConfigError("server.host", server.host, problem, remedy)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there. A name that cannot be resolved counts: listening will
    say so."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        return True
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


@dataclass(frozen=True)
class Certificates:
    """PEM, as the doors want it."""

    key: bytes
    cert: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


def read_certificates(settings: ServerConfig) -> Certificates | None:
    """Those of server.tls; None: there is no TLS. Raises ConfigError naming the file that cannot be used."""
    tls = settings.tls
    if tls.cert is None or tls.key is None:
        return None
    names = {"cert": tls.cert, "key": tls.key} | ({"client_ca": tls.client_ca} if tls.client_ca is not None else {})
    contents: dict[str, bytes] = {}
    for name, path in names.items():
        try:
            contents[name] = Path(path).expanduser().read_bytes()
        except OSError as error:
            raise ConfigError(f"server.tls.{name}", path, f"cannot be read ({error.strerror})", "Check it.") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    cert, key = (os.path.expanduser(path) for path in (tls.cert, tls.key))
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # else it asks at the terminal
    except (ssl.SSLError, OSError, ValueError) as error:
        problem = f"is no PEM certificate that fits server.tls.key ({getattr(error, 'reason', None) or error})"
        raise ConfigError("server.tls.cert", tls.cert, problem, "Give both as PEM, the key without password.") from None
    if "client_ca" in contents:
        try:
            context.load_verify_locations(os.path.expanduser(names["client_ca"]))
        except (ssl.SSLError, OSError) as error:
            problem = f"has no PEM certificates ({getattr(error, 'reason', None) or error})"
            raise ConfigError("server.tls.client_ca", names["client_ca"], problem, "Give some.") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return Certificates(contents["key"], contents["cert"], contents.get("client_ca"), context)


def authorization_of(headers: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The value of the `authorization` among gRPC's metadata or HTTP's headers, names in lower case."""
    for name, value in headers:
        if name == "authorization":
            return value if isinstance(value, str) else value.decode("latin-1")
    return None
