"""Where a server is: HOST:PORT as people write it, and what a channel to there has to know."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

from runtime.errors import ConfigError

SCHEMES = ("dns", "ipv4", "ipv6", "unix", "unix-abstract")
"""What gRPC calls its kinds of targets, besides HOST:PORT."""
REMEDY = "Write HOST:PORT, for example localhost:50051 or [::1]:50051."


def checked(address: str) -> str:
    """The address without spaces around it. Raises ConfigError if it is neither HOST:PORT nor a target of gRPC's."""
    if not isinstance(address, str):
        raise ConfigError("address", address, f"is of type {type(address).__name__}, no text", REMEDY)
    text = address.strip()
    scheme, colon, rest = text.partition(":")
    if scheme in SCHEMES and colon and not rest.isdecimal():  # a host may be called dns
        return text
    if "://" in text:
        raise ConfigError("address", address, "is a URL", f"Leave out {text.partition('://')[0]}://. {REMEDY}")
    host, colon, port = text.rpartition(":")
    if text.endswith("]") or not colon:
        raise ConfigError("address", address, "has no port", REMEDY)
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ConfigError("address", address, "is an IPv6 address without brackets", f"Put it into [ ]. {REMEDY}")
    if not host.strip("[]"):
        raise ConfigError("address", address, "has no host", REMEDY)
    if "/" in port:
        raise ConfigError("address", address, "has a path", REMEDY)
    if not (port.isascii() and port.isdecimal() and 1 <= int(port[:6]) <= 65535):
        raise ConfigError("address", address, "has no port from 1 to 65535", REMEDY)
    return text


def channel_options(address: str) -> list[tuple[str, Any]]:
    """A proxy that the environment names is for other machines: it cannot reach what is on this one."""
    return [("grpc.enable_http_proxy", 0)] if is_here(address) else []


def is_here(address: str) -> bool:
    """Whether the address is one of this machine's, as far as that can be told without asking a name server."""
    if address.startswith("unix"):
        return True
    host = address.removeprefix("dns:").removeprefix("ipv4:").removeprefix("ipv6:").rpartition("/")[2]
    host = host.rpartition(":")[0].strip("[]").lower()
    if host == "localhost" or host.endswith(".localhost") or host == socket.gethostname().lower():
        return True
    try:
        number = ipaddress.ip_address(host.partition("%")[0])
        family = socket.AF_INET if number.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))  # only a machine's own address can be bound
    except (ValueError, OSError):
        return False
    return True
