"""Nobody else's page gets in."""

import pytest
from serving.conftest import served

from nnx_cli.data.tokenizers.build import build_tokenizer
from nnx_cli.errors import UsageError

pytest.importorskip("fastapi", reason="nnx-cli[serve] is not installed")

from nnx_cli.serving.access import Access, host_of, is_loopback, origin_of  # noqa: E402 - of an extra


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9:8000", "localhost", "localhost:80", "LOCALHOST", "[::1]:8000", "my.localhost:1"]
)
def test_loopback_hosts_are_ours(server, host):
    assert server.ask("/health", Host=host).status == 200
    assert is_loopback(host_of(host))


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "192.168.0.1",
        "0.0.0.0",
        "",
        "127.0.0.1@evil.example",
        "[::1",
        "a" * 5000,
        "2130706433",
    ],
)
@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/page.js", "/nothing"])
def test_other_hosts_are_not(server, host, path):
    answer = server.ask(path, Host=host)
    assert answer.status in (400, 403), host
    assert b"tiny" not in answer.body


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "https://127.0.0.1",
        "http://127.0.0.1:1",
        "http://localhost",
        "file://",
        "",
        "x" * 300,
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_pages_of_others_get_nothing(server, origin, method):
    answer = server.ask("/v1/completions", b"{}" if method == "POST" else None, method, Origin=origin)
    assert answer.status == 403 and not any(name.lower().startswith("access-control") for name in answer.headers)


def test_our_own_page_may_ask(server):
    for host in (f"127.0.0.1:{server.port}", f"localhost:{server.port}"):
        answer = server.ask("/v1/completions", {"max_tokens": 1}, Host=host, Origin=f"http://{host}")
        assert answer.status == 200 and "access-control-allow-origin" not in answer.headers


def test_origins_that_are_allowed_get_cors_headers(byte_model):
    access = Access("127.0.0.1", origins=[origin_of("https://Example.org/")])
    with served(byte_model, build_tokenizer("byte"), access=access) as server:
        flight = server.ask("/v1/completions", None, "OPTIONS", Origin="https://example.org")
        answer = server.ask("/v1/completions", {"max_tokens": 1}, Origin="https://example.org")
        other = server.ask("/v1/completions", {"max_tokens": 1}, Origin="https://example.com")
    for each in (flight, answer):
        assert each.status in (200, 204) and each.headers["access-control-allow-origin"] == "https://example.org"
        assert each.headers["vary"] == "origin"
    assert "authorization" in flight.headers["access-control-allow-headers"]
    assert other.status == 403 and "access-control-allow-origin" not in other.headers


def test_a_key_is_asked_for(byte_model):
    with served(byte_model, build_tokenizer("byte"), access=Access("127.0.0.1", api_key="sécret")) as server:
        for wrong in ({}, {"Authorization": "Bearer x"}, {"Authorization": "sécret"}, {"Authorization": "Bearer "}):
            encoded = {name: value.encode() for name, value in wrong.items()}
            assert server.ask("/v1/models", **encoded).status == 401
            assert server.ask("/v1/completions", {"max_tokens": 1}, **encoded).status == 401
        assert server.ask("/v1/models", Authorization="Bearer sécret".encode()).status == 200
        assert server.ask("/").status == 200 == server.ask("/health").status, "nothing of the model is there"


def test_the_address_that_was_reached_is_a_host_of_ours():
    access = Access("0.0.0.0")
    assert access.knows_host("192.168.0.7:8000", "192.168.0.7") and access.knows_host("localhost", "192.168.0.7")
    assert not access.knows_host("evil.example", "192.168.0.7") and not access.knows_host("192.168.0.8", "192.168.0.7")
    assert Access("box.lan").knows_host("BOX.lan:80", "192.168.0.7")


def test_pages_have_a_strict_policy(server):
    page, file, data = server.ask("/"), server.ask("/page.js"), server.ask("/v1/models")
    assert page.status == 200 and file.status == 404
    for directive in ("default-src 'none'", "script-src 'sha256-", "connect-src 'self'", "frame-ancestors 'none'"):
        assert directive in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    for answer in (file, data):
        assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    for answer in (page, file, data):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("page", ["example.org", "ftp://example.org", "https://example.org/page", "https://", "*", ""])
def test_what_is_no_origin_is_refused(page):
    with pytest.raises(UsageError, match="scheme and host"):
        origin_of(page)
