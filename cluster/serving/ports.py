"""Whether one can listen at an address: said before anything is loaded, and in words."""

from __future__ import annotations

import errno
import socket

from runtime.errors import ConfigError

ANOTHER_PORT = "Choose a free one; 0 lets the system choose."


def check_free(host: str, port: int, field: str = "server.port") -> None:
    """Raise ConfigError naming server.host, or `field`, the port's, if one could not listen there.

    gRPC does not say why it cannot, and is content with one of a name's several addresses.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        remedy = "Give an address or a name of this machine, or 0.0.0.0 or :: for all of its addresses."
        raise ConfigError("server.host", host, f"cannot be resolved ({error})", remedy) from error
    num_had, refused = 0, None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
                probe.listen(1)
            num_had += 1
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(field, port, f"is taken at {address[0]}", ANOTHER_PORT) from error
            if error.errno in (errno.EACCES, errno.EPERM):
                problem = "is a port that only privileged programs may listen at"
                raise ConfigError(field, port, problem, "Choose one from 1024 on, or 0.") from error
            refused = error  # a name may have an address of a kind that this machine does not use
    if not num_had:
        problem, remedy = f"is no address that this machine can listen at ({refused})", "Give one of its addresses."
        raise ConfigError("server.host", host, problem, remedy)


def listen(host: str, port: int, field: str) -> list[socket.socket]:
    """Sockets that listen at each of the host's addresses, all at one port. Raises ConfigError as `check_free` does."""
    check_free(host, port, field)
    sockets: list[socket.socket] = []
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, address in dict.fromkeys(found):
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address[0], port or address[1], *address[2:]))
            listener.setblocking(False)
        except OSError:
            listener.close()
            continue  # an address of a kind that this machine does not use; check_free has found another
        port = listener.getsockname()[1]
        sockets.append(listener)
    if not sockets:  # taken in between
        raise ConfigError(field, port, "cannot be had", ANOTHER_PORT)
    return sockets


def shown(host: str, port: int) -> str:
    """HOST:PORT."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
