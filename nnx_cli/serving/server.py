"""The server at work: a socket, its signals, and how it ends."""

from __future__ import annotations

import socket
import sys
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from nnx_cli.errors import OutputError
from nnx_cli.serving.engine import Engine

PATIENCE_SECONDS = 10  # for answers to reach those who read slowly, once the server is to end
BACKLOG = 256
SWITCH_SECONDS = 0.0005  # that the decoding thread waits at most, after each operation, for the one that writes answers


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises OutputError where that cannot be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(address[0]), port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"cannot listen at {host}, port {port}: {why}", fix="take another port: --port 0") from error


class _Server(uvicorn.Server):
    """Ends the answers that are being written as soon as a signal asks it to stop."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        self.engine.close()
        super().handle_exit(sig, frame)


def serve(app: ASGIApp, listening: socket.socket, engine: Engine) -> None:
    """Answer requests until a signal comes; answers that are being written end where they are."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=PATIENCE_SECONDS,
    )
    sys.setswitchinterval(SWITCH_SECONDS)
    engine.start()
    try:
        _Server(config, engine).run(sockets=[listening])
    finally:
        engine.close()
