"""`nnx serve`: a model behind an HTTP interface."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any

import typer

from nnx_cli.commands._options import Device, Model, ModelFile, Precision, command, given, settings
from nnx_cli.config import ServeConfig, TrainConfig, own_fields
from nnx_cli.console.output import Output
from nnx_cli.errors import MissingFeature, UsageError, pip_install

EXAMPLES = """Examples:

  nnx serve
  nnx serve book --port 8080
  nnx serve --host 0.0.0.0 --allow-remote --api-key KEY"""

NEEDED = ("fastapi", "uvicorn")
N_ROWS = 16  # answers that are written at a time


@command(*settings(ServeConfig))
def run(
    output: Output,
    model: Model = None,
    file: ModelFile = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Other page that may ask, such as https://example.org; may be repeated.")
    ] = None,
    device: Device = TrainConfig.device,
    precision: Precision = TrainConfig.precision,
    **options: Any,
) -> None:
    """Serve a model to programs that speak OpenAI's completions, and to a browser."""
    config = ServeConfig(**given(options, own_fields(ServeConfig)))
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise MissingFeature(f"serve needs {' and '.join(missing)}", fix=pip_install("nnx-cli[serve]"))
    from nnx_cli.serving.access import Access, is_loopback, origin_of

    if not is_loopback(config.host):
        _check_remote(config)
    origins = [origin_of(each) for each in allow_origin or ()]
    from nnx_cli.runs.find import find_model
    from nnx_cli.runs.load import load_model
    from nnx_cli.serving.app import build_app
    from nnx_cli.serving.engine import Engine
    from nnx_cli.serving.server import bind, serve
    from nnx_cli.serving.service import Service
    from nnx_cli.system.device import pick_device, pick_precision
    from nnx_cli.webpage.page import About

    where = pick_device(device)
    ref = find_model(model, file)
    tokenizer = ref.tokenizer
    with bind(config.host, config.port) as listening:
        network = load_model(ref, where, pick_precision(precision, where))
        name = ref.folder.resolve().name
        engine = Engine(network, tokenizer, N_ROWS, config.queue)
        about = About.of_model(ref)
        service = Service(name, engine, ref.start_ids, about, config.max_prompt_tokens, config.max_new_tokens)
        app = build_app(service, Access(config.host, config.api_key, origins))
        port = listening.getsockname()[1]
        shown = f"[{config.host}]" if ":" in config.host else config.host
        url = f"http://{shown}:{port}"
        output.show_json({"model": name, "url": url, "rows": N_ROWS, "chat": service.template is not None})
        output.show(f"{ref.label} at {url}/ for browsers, {url}/v1 for programs; Ctrl-C ends it")
        output.out.file.flush()
        serve(app, listening, engine)


def _check_remote(config: ServeConfig) -> None:
    """Raise UsageError unless other machines may ask, and need a key for it."""
    if not config.allow_remote:
        raise UsageError(
            f"--host {config.host} lets other machines ask", fix="if that is meant: --allow-remote --api-key KEY"
        )
    if not config.api_key:
        raise UsageError("--allow-remote needs a key that every request brings", fix="add --api-key KEY")
