"""The rules of docs/security.md, one test each: who may call, over what, how much; and that secrets stay secret."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.client.access import Access
from cluster.client.client import Client
from cluster.serving.access import Tokens, check_reach, read_certificates, read_tokens
from cluster.serving.limits import Account, LimitError
from cluster.wire.statuses import CallError, UnauthenticatedError
from runtime.config import Config, LimitsConfig
from runtime.errors import ConfigError
from tests.cluster.serving.scripted_engine import ScriptedEngine
from tests.cluster.serving.serving import ServerThread, serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]

TOKEN, OTHER = "right-token-0123456789", "other-token-0123456789"
LINES = f"# who\nann {TOKEN}\nbob {OTHER} concurrent_requests=1 requests_per_minute=2\n"
BODY = {"prompt": "A", "max_tokens": 3}


def settings(*given: str) -> Config:
    return Config.load(None, ["server.port=0", "server.http_port=0", "server.model_name=letters", *given])


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(LINES)
    return path


@pytest.fixture
def server(tokens_file: Path) -> Iterator[ServerThread]:
    engine = ScriptedEngine(settings(), step_s=0.002)
    with serving(engine, http=True, tokens_file=str(tokens_file)) as server:
        yield server


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


# Tokens


def test_without_a_token_nothing_but_health_answers_over_http(server: ServerThread) -> None:
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        assert http.get("/health").status_code == http.get("/ready").status_code == 200
        for headers in ({}, bearer("wrong"), bearer(TOKEN[:-1]), {"authorization": TOKEN}, {"authorization": "Bearer"}):
            for path in ("/v1/models", "/v1/models/x", "/nothing", "/", "/metrics", "/openapi.json", "/health/x"):
                answer = http.get(path, headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", path
                assert "Bearer" in answer.headers["www-authenticate"]
            for path in ("/v1/completions", "/v1/chat/completions"):
                assert http.post(path, json=BODY, headers=headers).status_code == 401
        assert http.post("/v1/completions", json=BODY, headers=bearer(TOKEN)).status_code == 200
        for path in ("/v1/models", "/", "/page/main.js"):
            assert http.get(path, auth=("anyone", TOKEN)).status_code == 200  # as a browser sends it
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN) as client:
        assert client.completions.create(model="letters", **BODY).choices[0].text == "BCD"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=f"{TOKEN}x", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_without_a_token_nothing_but_health_answers_over_grpc(server: ServerThread) -> None:
    for token in (None, "wrong-token-0123456789"):
        with Client(server.address, token=token) as client:
            assert client.is_serving()
            for ask in (client.server_info, lambda: client.complete("A"), lambda: list(client.converse().ask("A"))):  # noqa: B023
                with pytest.raises(CallError) as error:
                    ask()
                assert error.value.code is grpc.StatusCode.UNAUTHENTICATED
    with grpc.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")])))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with Client(server.address, token=TOKEN) as client:
        assert client.complete("A", sampling={"max_new_tokens": 3}).text == "BCD"
        assert client.server_info().version


def test_the_environment_brings_tokens_to_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_TOKENS", f"{TOKEN}, bob {OTHER}")
    monkeypatch.setenv("OUTRIDER_TOKEN", OTHER)
    with serving(ScriptedEngine(settings())) as server, Client(server.address) as client:
        assert client.complete("A", sampling={"max_new_tokens": 2}).text == "BC"


def test_every_known_token_is_compared(monkeypatch: pytest.MonkeyPatch, tokens_file: Path) -> None:
    import hmac

    tokens = read_tokens(settings(f"server.tokens_file={tokens_file}").server, {})
    assert isinstance(tokens, Tokens)
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    assert tokens.caller(f"Bearer {TOKEN}").name == "ann" and len(compared) == 2
    with pytest.raises(UnauthenticatedError):
        tokens.caller("Bearer no")
    assert len(compared) == 4 and {len(digest) for pair in compared for digest in pair} == {32}
    assert TOKEN not in repr(vars(tokens))


@pytest.mark.parametrize(
    "text, words",
    [
        ("short", "shorter"),
        (f"a b {TOKEN}", "is not"),
        (f"a {TOKEN}\na {OTHER}", "twice"),
        (f"a {TOKEN}\nb {TOKEN}", "twice"),
        (f"a {TOKEN} concurrent_requests=x", "no number"),
        (f"a {TOKEN} requests_per_minute=-1", "greater"),
        ("# nobody\n", "has no token"),
    ],
)
def test_a_tokens_file_that_cannot_be_meant_is_refused_without_showing_it(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        read_tokens(settings(f"server.tokens_file={path}").server, {})
    assert TOKEN not in str(error.value) and OTHER not in str(error.value)


def test_a_tokens_file_that_is_not_there_is_refused_before_the_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="server.tokens_file"):
        with serving(ScriptedEngine(settings()), tokens_file=str(tmp_path / "none")):
            pass


# Limits


def test_answers_at_a_time_and_requests_a_minute_are_bounded_for_each_token(server: ServerThread) -> None:
    with Client(server.address, token=OTHER) as client, httpx.Client(base_url=server.url, trust_env=False) as http:
        with client.generate("A", sampling={"max_new_tokens": 10**6}) as stream:
            next(stream)
            answer = http.post("/v1/completions", json=BODY, headers=bearer(OTHER))
            assert answer.status_code == 429 and "concurrent_requests" in answer.json()["error"]["message"]
            assert http.post("/v1/completions", json=BODY, headers=bearer(TOKEN)).status_code == 200
        assert http.post("/v1/completions", json=BODY, headers=bearer(OTHER)).status_code == 200
        answer = http.post("/v1/completions", json=BODY, headers=bearer(OTHER))
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
        with pytest.raises(CallError, match="requests_per_minute") as error:
            client.complete("A")
        assert error.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_limits_refill() -> None:
    moment = [0.0]
    account = Account(LimitsConfig(requests_per_minute=2, tokens_per_minute=60), lambda: moment[0])
    for _ in range(2):
        with account.request():
            pass
    with pytest.raises(LimitError) as error, account.request():
        pass
    assert error.value.retry_after_s == pytest.approx(30)
    moment[0] = 30.0
    with account.request():
        account.spend(100)  # more than there is: a debt
    moment[0] = 60.0
    with pytest.raises(LimitError, match="tokens_per_minute") as error, account.request():
        pass
    assert error.value.retry_after_s == pytest.approx(11, abs=1)
    moment[0] = 72.0
    with account.request():
        pass


# The network


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_need_tls_or_a_word(host: str) -> None:
    with pytest.raises(ConfigError, match="server.host.*TLS"):
        check_reach(settings(f"server.host={host}"))
    check_reach(settings(f"server.host={host}", "server.insecure=true"))
    check_reach(settings(f"server.host={host}", "server.tls.cert=a", "server.tls.key=b"))
    for loopback in ("127.0.0.1", "localhost", "::1"):
        check_reach(settings(f"server.host={loopback}"))


def test_a_token_is_not_sent_to_another_machine_in_the_clear() -> None:
    with pytest.raises(ConfigError, match="without TLS"):
        Client("192.0.2.1:1", token=TOKEN)
    Client("192.0.2.1:1", token=TOKEN, insecure=True).close()
    assert TOKEN not in repr(Access(TOKEN))


def test_names_that_lead_to_loopback_are_no_way_in(server: ServerThread) -> None:
    with serving(ScriptedEngine(settings()), http=True) as unguarded:
        with httpx.Client(base_url=unguarded.url, trust_env=False) as http:
            for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", ""):
                assert http.get("/v1/models", headers={"host": host}).status_code == 421, host
            for host in ("localhost", "localhost:1", "127.0.0.1", "[::1]:8000", "page.localhost:1"):
                assert http.get("/v1/models", headers={"host": host}).status_code == 200, host
            cross = {"origin": "http://evil.example", "content-type": "text/plain"}
            assert http.post("/v1/completions", content=b"{}", headers=cross).status_code == 415
            asked = http.options("/v1/completions", headers={"origin": "http://evil.example"})
            assert "access-control-allow-origin" not in asked.headers and asked.status_code == 405
    with httpx.Client(base_url=server.url, trust_env=False) as http:  # a token says enough
        assert http.get("/v1/models", headers={"host": "name.example", **bearer(TOKEN)}).status_code == 200


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and a certificate and key of a server (for localhost), and of a client, which it has signed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates, and is not here")
    folder = tmp_path_factory.mktemp("tls")

    def run(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    run("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for name in ("server", "client"):
        run("req", *new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        sign = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        run("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *sign)
    return folder


def test_tls_on_both_doors(authority: Path) -> None:
    tls = {"cert": str(authority / "server.pem"), "key": str(authority / "server.key")}
    ca = str(authority / "ca.pem")
    with serving(ScriptedEngine(settings()), http=True, tls=tls) as server:
        with Client(server.address, tls_ca=ca) as client:
            assert client.complete("A", sampling={"max_new_tokens": 2}).text == "BC"
        with Client(server.address) as client, pytest.raises(CallError):
            client.is_serving(timeout_s=2)
        url = server.url.replace("http://", "https://")
        with httpx.Client(base_url=url, verify=ssl.create_default_context(cafile=ca), trust_env=False) as http:
            assert http.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == "BCD"
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url}/health", trust_env=False)  # an authority that nobody knows
        old = ssl.create_default_context(cafile=ca)
        with pytest.warns(DeprecationWarning):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url}/health", verify=old, trust_env=False)


def test_mutual_tls_on_both_doors(authority: Path) -> None:
    ca, cert, key = (str(authority / name) for name in ("ca.pem", "client.pem", "client.key"))
    tls = {"cert": str(authority / "server.pem"), "key": str(authority / "server.key"), "client_ca": ca}
    with serving(ScriptedEngine(settings()), http=True, tls=tls) as server:
        with Client(server.address, tls_ca=ca, tls_cert=cert, tls_key=key) as client:
            assert client.complete("A", sampling={"max_new_tokens": 2}).text == "BC"
        with Client(server.address, tls_ca=ca) as client, pytest.raises(CallError):
            client.is_serving(timeout_s=2)
        url = server.url.replace("http://", "https://")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url}/health", verify=ssl.create_default_context(cafile=ca), trust_env=False)
        known = ssl.create_default_context(cafile=ca)
        known.load_cert_chain(cert, key)
        assert httpx.get(f"{url}/health", verify=known, trust_env=False).status_code == 200


def test_certificates_that_cannot_be_used_are_refused_by_name(authority: Path, tmp_path: Path) -> None:
    cert, key = authority / "server.pem", authority / "server.key"
    (tmp_path / "none.pem").write_text("nothing")
    for named, given in [
        ("server.tls.cert", (tmp_path / "missing", key, None)),
        ("server.tls.cert", (tmp_path / "none.pem", key, None)),
        ("server.tls.cert", (cert, authority / "client.key", None)),
        ("server.tls.client_ca", (cert, key, tmp_path / "none.pem")),
    ]:
        words = [f"server.tls.{name}={path}" for name, path in zip(("cert", "key", "client_ca"), given, strict=True)]
        with pytest.raises(ConfigError, match=named):
            read_certificates(settings(*[word for word in words if not word.endswith("=None")]).server)


# At the command line


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cluster.cli", *words], capture_output=True, text=True, timeout=60)


def test_the_command_line_brings_a_token_from_a_file(server: ServerThread, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    words = ("generate", "--raw", "--max-new-tokens", "3", "--address", server.address)
    assert run(*words, "--token-file", str(tmp_path / "token"), "A").stdout == "BCD\n"
    refused = run(*words, "A")
    assert refused.returncode == 1 and "UNAUTHENTICATED" in refused.stderr
    (tmp_path / "token").write_text("two words")
    refused = run(*words, "--token-file", str(tmp_path / "token"), "A")
    assert refused.returncode == 2 and "--token-file" in refused.stderr and "two words" not in refused.stderr
    refused = run("generate", "--token-file", str(tmp_path / "token"), "A")
    assert refused.returncode == 2 and "--address" in refused.stderr


def test_serve_refuses_an_open_address_before_it_loads_anything() -> None:
    refused = run("serve", "--set", "server.host=0.0.0.0", "--set", "server.port=0", "--set", "server.http_port=0")
    assert refused.returncode == 2 and "server.host" in refused.stderr and "server.insecure" in refused.stderr
    assert refused.stdout == ""
