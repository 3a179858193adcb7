"""The server: which addresses there are, and what each answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from nnx_cli.config import SampleConfig
from nnx_cli.data.conversations import Message, conversation
from nnx_cli.data.formats import BadRow
from nnx_cli.serving.access import Access, Guard
from nnx_cli.serving.engine import Closed, Engine, Job, Piece, QueueFull
from nnx_cli.serving.inbox import Inbox
from nnx_cli.serving.protocol import ChatRequest, CompletionRequest, Form, Refused, Sampling, error_body
from nnx_cli.serving.service import Service

COMPLETION_TOKENS, CHAT_TOKENS = 16, 256  # of an answer whose request says nothing, as far as the server allows
MOST_WORDS = 300  # of what a request has wrong, that an error repeats

Body = TypeVar("Body", bound=BaseModel)


def build_app(service: Service, access: Access) -> ASGIApp:
    """The whole of it: pages and answers behind the guard."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return JSONResponse(error_body(error.status, str(error), error.param), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.get("/health")
    async def health() -> Response:
        engine = service.engine
        state = {
            "status": engine.closed or "ok",
            "model": service.name,
            "chat": service.template is not None,
            "rows": engine.n_rows,
            "answering": len(engine.working),
            "waiting": len(engine.waiting),
        }
        return JSONResponse(state, 200 if engine.closed is None else 503)

    @app.get("/v1/models")
    async def models() -> Response:
        model = {"id": service.name, "object": "model", "created": 0, "owned_by": "nnx"}
        return JSONResponse({"object": "list", "data": [model]})

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = await _body(request, CompletionRequest)
        prompts = await asyncio.to_thread(service.prompts, asked.prompt)  # which may be long
        job = _job(service, asked, prompts, asked.max_tokens, COMPLETION_TOKENS, asked.logprobs)
        form = Form.of(service.name, service.tokenizer, asked, asked.logprobs is not None)
        return await _respond(service, request, asked, job, form)

    if (template := service.template) is not None:

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            asked = await _body(request, ChatRequest)
            prompt = await asyncio.to_thread(template.prompt, _messages(asked))
            wanted = asked.max_completion_tokens or asked.max_tokens
            job = _job(service, asked, [prompt], wanted, CHAT_TOKENS, asked.n_likeliest())
            form = Form.of(service.name, service.tokenizer, asked, job.n_likeliest is not None)
            return await _respond(service, request, asked, job, form)

    _add_page(app, service, locked=access.api_key is not None)
    return Guard(app, access)


def _add_page(app: FastAPI, service: Service, locked: bool) -> None:
    """The page of the model, and what it has to know, which takes the key where there is one."""
    filled = service.page(locked)
    content, policy = filled.text.encode(), f"{filled.policy}; frame-ancestors 'none'"

    @app.get("/")
    async def page() -> Response:
        return Response(content, media_type="text/html", headers={"content-security-policy": policy})

    @app.get("/v1/page")
    async def described() -> Response:
        return JSONResponse(service.described())


async def _body(request: Request, kind: type[Body]) -> Body:
    """What a request asks for. Raises Refused."""
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        said = f"{place}: {first['msg']}".removeprefix(": ")[:MOST_WORDS]
        raise Refused(422, said, place.partition(".")[0][:MOST_WORDS] or None) from error


def _messages(asked: ChatRequest) -> list[Message]:
    """The messages of a request. Raises Refused where the assistant's turn does not follow them."""
    said = [Message(each.role, each.content.strip() or "-") for each in asked.messages]  # an answer may be empty
    checked = conversation([*said, Message("assistant", "-")])
    if isinstance(checked, BadRow):
        raise Refused(422, f"messages: {checked}", "messages")
    return [Message(each.role, each.content) for each in asked.messages]


def _job(
    service: Service, asked: Sampling, prompts: list[list[int]], wanted: int | None, usual: int, likeliest: int | None
) -> Job:
    """What the engine is to do for a request. Raises Refused."""
    service.check_model(asked.model)
    completes = isinstance(asked, ChatRequest) and asked.max_completion_tokens
    service.check_tokens(wanted, "max_completion_tokens" if completes else "max_tokens")
    service.check_prompts(prompts, "messages" if isinstance(asked, ChatRequest) else "prompt")
    config: SampleConfig = asked.config(wanted or min(usual, service.max_new_tokens))
    job = Job(prompts, config, lambda piece: None, asked.stops(), likeliest, bool(asked.return_tokens_as_token_ids))
    if job.n_answers > service.engine.queue + service.engine.n_rows:
        raise Refused(422, f"a request may ask for {service.engine.queue + service.engine.n_rows} answers at once")
    return job


async def _respond(service: Service, request: Request, asked: Sampling, job: Job, form: Form) -> Response:
    """Have a job answered, in one piece or in events. Raises Refused."""
    pieces = Inbox()
    job.deliver = pieces.put
    try:
        service.engine.submit(job)
    except QueueFull:
        raise Refused(429, "too many requests wait already; try again", headers={"retry-after": "1"}) from None
    except Closed as error:
        raise Refused(503, str(error)) from None
    if asked.stream:
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(_events(service.engine, job, pieces, form, with_usage), media_type="text/event-stream")
    return await _whole(service.engine, request, job, pieces, form)


async def _whole(engine: Engine, request: Request, job: Job, pieces: Inbox, form: Form) -> Response:
    """All answers at once; the job is cancelled where the client goes away."""
    answers: list[list[Piece]] = [[] for _ in range(job.n_answers)]
    gone = asyncio.ensure_future(_gone(request))
    try:
        open_answers = job.n_answers
        while open_answers:
            coming = asyncio.ensure_future(pieces.take())
            await asyncio.wait((coming, gone), return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                return Response(status_code=499)
            for piece in coming.result():
                if piece.error is not None:
                    raise Refused(503, piece.error)
                answers[piece.number].append(piece)
                open_answers -= piece.ended is not None
    finally:
        gone.cancel()
        engine.cancel(job)
    return JSONResponse(form.whole(answers, _usage(job)))


async def _gone(request: Request) -> None:
    """Wait until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(engine: Engine, job: Job, pieces: Inbox, form: Form, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events; one has all that was written of an answer since the one before. Where the client goes away,
    this is closed, and the job cancelled."""
    try:
        if form.is_chat:
            for number in range(job.n_answers):
                yield _event(form.opening(number))
        open_answers = job.n_answers
        while open_answers:
            for piece in merged(await pieces.take()):
                if piece.error is not None:
                    yield _event(error_body(503, piece.error))
                    return
                open_answers -= piece.ended is not None
                yield _event(form.event(piece))
        if with_usage:
            yield _event(form.usage(_usage(job)))
        yield "data: [DONE]\n\n"
    finally:
        engine.cancel(job)


def merged(pieces: Sequence[Piece]) -> list[Piece]:
    """One piece an answer, of all that follow each other."""
    found: dict[int, Piece] = {}
    for piece in pieces:
        before = found.get(piece.number)
        if before is not None:
            piece = Piece(
                piece.number, before.text + piece.text, (*before.drawn, *piece.drawn), piece.ended, piece.error
            )
        found[piece.number] = piece
    return list(found.values())


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _usage(job: Job) -> dict[str, int]:
    """Tokens that were read and written."""
    read, written = sum(map(len, job.prompts)), job.n_written
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
