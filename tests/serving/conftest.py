"""Servers to ask."""

import contextlib
import threading
import time

import pytest
from serving.client import Client

from nnx_cli.data.conversations import with_template
from nnx_cli.data.tokenizers.build import build_tokenizer


@contextlib.contextmanager
def served(model, tokenizer, n_rows=4, queue=4, access=None, title="A tiny model", **limits):
    """A server in this process, on a thread of its own."""
    pytest.importorskip("fastapi", reason="nnx-cli[serve] is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="nnx-cli[serve] is not installed")
    from nnx_cli.serving.access import Access
    from nnx_cli.serving.app import build_app
    from nnx_cli.serving.engine import Engine
    from nnx_cli.serving.server import bind
    from nnx_cli.serving.service import Service
    from nnx_cli.webpage.page import About

    engine = Engine(model, tokenizer, n_rows, queue)
    limits = {"max_prompt_tokens": 100, "max_new_tokens": 1000} | limits
    app = build_app(
        Service("tiny", engine, [10], About(title, {title: title}, [title]), **limits), access or Access("127.0.0.1")
    )
    with bind("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        engine.start()
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield Client("127.0.0.1", listening.getsockname()[1], engine)
        engine.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def byte_model(tiny):
    """A model that continues bytes; the seed was chosen so that greedy text does not repeat itself at once."""
    return tiny("llama", vocab_size=256).eval()


@pytest.fixture
def server(byte_model):
    with served(byte_model, build_tokenizer("byte")) as client:
        yield client


@pytest.fixture
def chat_server(tiny):
    tokenizer = with_template(build_tokenizer("byte"))
    with served(tiny("nyx", vocab_size=tokenizer.vocab_size).eval(), tokenizer) as client:
        yield client
