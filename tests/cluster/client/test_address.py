"""Addresses as people write them; proxies are for other machines."""

from __future__ import annotations

import pytest

from cluster.client.address import channel_options, checked, is_here
from cluster.client.client import Client
from runtime.errors import ConfigError


@pytest.mark.parametrize(
    "address",
    ["localhost:50051", "[::1]:50051", "0.0.0.0:1", "dns:50051", "dns:///host:1", "ipv4:127.0.0.1:1", "unix:/tmp/a"],
)
def test_addresses_that_are_taken(address: str) -> None:
    assert checked(f" {address} ") == address


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("::1", "without brackets"),
        ("::1:50051", "without brackets"),
        ("[::1]", "no port"),
        ("localhost", "no port"),
        ("", "no port"),
        ("localhost:", "1 to 65535"),
        ("localhost:0", "1 to 65535"),
        ("localhost:99999", "1 to 65535"),
        ("localhost:9999999999", "1 to 65535"),
        ("localhost:grpc", "1 to 65535"),
        (":50051", "no host"),
        ("localhost:50051/path", "path"),
        ("http://localhost:50051", "URL"),
        ("grpc://localhost:50051", "Leave out grpc://"),
    ],
)
def test_addresses_that_are_refused_in_words(address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        Client(address)
    assert error.value.field == "address" and "HOST:PORT" in error.value.remedy


def test_no_proxy_on_the_way_to_this_machine() -> None:
    for address in ("localhost:1", "127.0.0.1:1", "127.1.2.3:1", "0.0.0.0:1", "ipv4:127.0.0.1:1", "unix:/a"):
        assert is_here(address) and channel_options(address) == [("grpc.enable_http_proxy", 0)]
    for address in ("192.0.2.1:1", "somewhere.example:1", "[2001:db8::1]:1"):
        assert not is_here(address) and channel_options(address) == []
