"""Who may ask: not the pages of others, not without the key, not with more than the server takes."""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from nnx_cli.errors import UsageError, counted
from nnx_cli.serving.protocol import error_body

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {  # of every answer that has no such header of its own
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
MOST_DRAINED = 64 * 2**20  # bytes of a body that is too long
KEPT = "/v1/"  # what the key is asked for


@dataclass(frozen=True)
class Access:
    """The rules: `host` is the address that the server is bound to, `origins` those of other pages that may ask."""

    host: str
    api_key: str | None = None
    origins: Collection[str] = ()
    most_bytes: int = 4 * 2**20  # of a body

    def knows_host(self, named: str, reached: str) -> bool:
        """Whether a Host is one of ours: a loopback one, the one we are bound to, or the address that was `reached`. A
        name of somebody else's that leads here (DNS rebinding) is none."""
        name = host_of(named)
        return is_loopback(name) or name in (self.host.lower(), reached.lower())

    def refusal(self, headers: dict[str, str], scheme: str, reached: str) -> tuple[int, str] | None:
        """Why a request is refused, and with which status."""
        named = headers.get("host", "")
        if not self.knows_host(named, reached):
            return 403, "the Host of this request is not that of this server"
        origin = headers.get("origin")
        if origin is not None and origin != f"{scheme}://{named}" and origin not in self.origins:
            return 403, f"pages of {origin[:100]} may not ask here (--allow-origin lets them)"
        return None

    def has_key(self, headers: dict[str, str]) -> bool:
        """Whether a request brings the key."""
        given = headers.get("authorization", "").encode("latin-1")  # as it came
        return self.api_key is None or hmac.compare_digest(given, f"Bearer {self.api_key}".encode())


class Guard:
    """An ASGI application in front of another one: refuses what may not come in, bounds bodies, and sets the headers
    that keep other pages out."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path, scheme, origin = scope["path"], scope.get("scheme", "http"), headers.get("origin")
        reached = (scope.get("server") or ("",))[0] or ""
        allowed = origin if origin in self.access.origins else None

        async def respond(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                added = [header for header in _headers(allowed) if header[0] not in own]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        if (refused := self.access.refusal(headers, scheme, reached)) is not None:
            await _answer(respond, *refused)
        elif scope["method"] == "OPTIONS" and allowed is not None:
            await _answer(respond, 204, None)
        elif path.startswith(KEPT) and not self.access.has_key(headers):
            await _answer(respond, 401, "this server asks for its key: Authorization: Bearer KEY")
        else:
            await self._pass_on(scope, receive, respond)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through whose body is as long as may be. One that is longer is read to its end all the same, as
        far as is bearable: most clients listen for an answer only then."""
        body, n_bytes = b"", 0
        more = scope["method"] == "POST"
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # it went away
            part, more = message.get("body", b""), message.get("more_body", False)
            n_bytes += len(part)
            body = body + part if n_bytes <= self.access.most_bytes else b""
            more = more and n_bytes <= MOST_DRAINED
        if n_bytes > self.access.most_bytes:
            await _answer(send, 413, f"a body may have {counted(self.access.most_bytes, 'byte')} at most")
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)


def _headers(allowed: str | None) -> list[tuple[bytes, bytes]]:
    """What is added to an answer; `allowed` is the other page's origin that may read it."""
    added = dict(HEADERS)
    if allowed is not None:
        added |= {
            "access-control-allow-origin": allowed,
            "access-control-allow-methods": "GET, POST",
            "access-control-allow-headers": "authorization, content-type",
            "cross-origin-resource-policy": "cross-origin",
            "vary": "origin",
        }
    return [(name.encode(), value.encode()) for name, value in added.items()]


async def _answer(send: Send, status: int, message: str | None) -> None:
    """Answer with an error, or with nothing."""
    body = b"" if message is None else json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def host_of(named: str) -> str:
    """The host that a Host header names, without its port and brackets; "" where it names none."""
    try:
        return (urlsplit(f"//{named}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def origin_of(page: str) -> str:
    """The origin of a page as browsers name it. Raises UsageError where it has none."""
    parts = urlsplit(page)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or parts.query:
        raise UsageError(f"--allow-origin is {page!r}; it must be scheme and host, such as https://example.org")
    return f"{parts.scheme}://{parts.netloc}".lower()


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, and reached by nobody else."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
