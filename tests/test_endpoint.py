"""TLS, client certificates, proxies, IPv6 and a local tokenizer: the ways to a server beside plain TCP on IPv4."""

import json
import socket
import ssl
import subprocess
import threading
import time

import pytest
from fake_server import DONE, FakeServer, answer, delta, plain_answer, usage, words

from twoclocks.client import Origin, send
from twoclocks.endpoint import make_endpoint, token_counter
from twoclocks.errors import ExperimentError
from twoclocks.experiment import Target, Timeouts
from twoclocks.proxy import Proxy, ProxyRefused, find_proxy, open_tunnel
from twoclocks.reader import connect
from twoclocks.target import resolve
from twoclocks.workload import Plan, Prompt

TIMEOUTS = Timeouts(connect_s=3, first_token_s=3, idle_s=3, total_s=10)


def ask(target, count_tokens=None):
    connection = connect(make_endpoint(target, TIMEOUTS))
    plan = Plan("0" * 32, Prompt("p", {}), b"{}")
    origin = Origin(time.monotonic_ns(), keep_text=True, count_tokens=count_tokens)
    records = [send(connection, plan, origin, "measure") for _ in range(2)]
    connection.close()
    return records


@pytest.fixture
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1, with its key, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    key, crt, both = folder / "k.pem", folder / "c.pem", folder / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(crt)]
    subprocess.run(command, check=True, capture_output=True)
    both.write_text(key.read_text() + crt.read_text())
    return crt, both


class TlsServer(FakeServer):
    """The scriptable server behind TLS; with `ask_client` it wants a certificate of the client."""

    def __init__(self, both, crt, ask_client=False):
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(both)
        if ask_client:
            self.context.verify_mode = ssl.CERT_REQUIRED
            self.context.load_verify_locations(crt)
        super().__init__(lambda body: plain_answer(4, gap_s=0.01))
        self.url = self.url.replace("http", "https")

    def _serve(self, connection):
        try:
            with self.context.wrap_socket(connection, server_side=True) as secure:
                super()._serve(secure)
        except OSError:
            connection.close()


def test_tls_with_a_ca_bundle(certificates):
    crt, both = certificates
    with TlsServer(both, crt) as server:
        first, second = ask(Target(url=server.url, tls_verify=str(crt)))
        model, _ = resolve(Target(url=server.url, tls_verify=str(crt)))

    assert (first.status, second.status, model) == ("ok", "ok", "fake-model")
    assert (first.timestamp_source, first.output_text) == ("user", "w0 w1 w2 end")
    assert first.connected_at is not None
    assert second.connected_at is None


def test_an_unknown_certificate_is_refused_unless_told_otherwise(certificates):
    crt, both = certificates
    with TlsServer(both, crt) as server:
        strict, _ = ask(Target(url=server.url))
        lax, _ = ask(Target(url=server.url, tls_verify=False))

    assert (strict.status, strict.error_kind) == ("error", "tls")
    assert "certificate" in strict.error_message
    assert lax.status == "ok"


def test_a_client_certificate_is_shown(certificates):
    crt, both = certificates
    with TlsServer(both, crt, ask_client=True) as server:
        shown, _ = ask(Target(url=server.url, tls_verify=str(crt), tls_cert=str(both)))
        bare, _ = ask(Target(url=server.url, tls_verify=str(crt)))

    assert shown.status == "ok"
    assert bare.status == "error"


def test_a_certificate_file_without_a_key_is_one_line(certificates):
    with pytest.raises(ExperimentError, match=r"target\.tls_cert: .* holds no certificate and key"):
        make_endpoint(Target(url="https://127.0.0.1:1", tls_cert=str(certificates[0])), TIMEOUTS)


def test_ipv6():
    server = FakeServer.__new__(FakeServer)
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
    original = socket.create_server
    try:
        socket.create_server = lambda address: original(("::1", 0), family=socket.AF_INET6)
        server.__init__()
    finally:
        socket.create_server = original
    with server:
        first, _ = ask(Target(url=f"http://[::1]:{server.listener.getsockname()[1]}"))
        headers, _ = server.requests[0]

    assert first.status == "ok"
    assert headers["host"].startswith("[::1]:")


def test_a_proxy_is_asked_for_the_whole_address(no_proxies, monkeypatch):
    asked = []
    with FakeServer() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("http://", "http://me:p%40ss@"))
        first, _ = ask(Target(url="http://server.invalid:8000"))
        headers, _ = proxy.requests[0]
        proxy.on_get = asked.append
        assert resolve(Target(url="http://server.invalid:8000", model="m")) == ("m", None)

    assert first.status == "ok"
    assert headers["host"] == "server.invalid:8000"
    assert headers["proxy-authorization"] == "Basic bWU6cEBzcw=="  # me:p@ss
    assert [one["host"] for one in asked] == ["server.invalid:8000"]  # what is no load goes the same way
    assert {one["proxy-authorization"] for one in asked} == {headers["proxy-authorization"]}


def test_a_proxy_that_load_does_not_use_is_none_of_the_control_planes(no_proxies, monkeypatch, tmp_path):
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password planted-0001")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    asked = []
    with FakeServer() as server:
        server.on_get = asked.append
        resolve(Target(url=server.url))

    assert not any("authorization" in one for one in asked)


def test_which_addresses_go_through_a_proxy(no_proxies, monkeypatch):
    monkeypatch.setenv("http_proxy", "proxy.invalid:3128")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")

    assert find_proxy("http://server.invalid:8000") == Proxy("proxy.invalid", 3128)
    assert find_proxy("http://127.0.0.1:8000") is None
    assert find_proxy("https://server.invalid") is None
    monkeypatch.setenv("http_proxy", "socks5://proxy.invalid")
    with pytest.raises(ExperimentError, match="only http:// proxies can be used"):
        make_endpoint(Target(url="http://server.invalid:8000"), TIMEOUTS)


@pytest.mark.parametrize("reply", [b"HTTP/1.1 200 OK\r\n\r\nTLS", b"HTTP/1.1 407 Auth\r\n\r\n", b"", b"x" * 20_000])
def test_a_tunnel_is_opened_or_refused(reply):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=lambda: (theirs.sendall(reply), theirs.shutdown(socket.SHUT_WR)))
        thread.start()
        if b" 200 " in reply:
            open_tunnel(ours, Proxy("p", 1, "Basic x"), "::1", 443)

            assert ours.recv(10) == b"TLS"
        else:
            with pytest.raises(ProxyRefused):
                open_tunnel(ours, Proxy("p", 1), "server", 443)
        thread.join()
        asked = theirs.recv(1000)

    assert asked.startswith(b"CONNECT [::1]:443 HTTP/1.1\r\n" if b" 200 " in reply else b"CONNECT server:443 ")


@pytest.fixture
def tokenizer(tmp_path):
    vocabulary = {"[UNK]": 0, "w0": 1}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}}))
    return str(path)


def test_answers_without_usage_are_counted_by_the_named_tokenizer(tokenizer):
    merged = delta(content="w0 w0 w0 ")
    finish = delta(finish_reason="stop")
    with FakeServer(lambda body: answer(merged, *words(2), finish, DONE)) as server:
        counted, _ = ask(Target(url=server.url), token_counter(tokenizer))
        chunks, _ = ask(Target(url=server.url))
    with FakeServer(lambda body: answer(merged, *words(2), finish, usage(9), DONE)) as server:
        told, _ = ask(Target(url=server.url), token_counter(tokenizer))

    assert (counted.output_tokens, counted.token_source) == (5, "tokenizer")
    assert counted.chunk_tokens == [None, None, None, 0]
    assert (chunks.output_tokens, chunks.token_source) == (3, "chunks")
    assert (told.output_tokens, told.token_source) == (9, "usage")


def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ExperimentError, match=r"x\.json is no tokenizer\.json"):
        token_counter(str(tmp_path / "x.json"))
