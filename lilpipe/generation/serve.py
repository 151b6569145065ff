"""An OpenAI-compatible HTTP server: chat and text completions, with streaming, and a chat page.

One engine decodes the requests of all clients together; each adapter of the model has its own engine, and shares the
weights. There is no authentication: anyone who can reach the address
can use the model, so it listens on loopback by default. Web pages of other sites can reach loopback from a browser; the
server rejects them by checking the Host header and by accepting only JSON bodies.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lilpipe.errors import ConfigError
from lilpipe.generation.engine import engine_for
from lilpipe.generation.engine_thread import EngineThread
from lilpipe.generation.frozen import load_frozen
from lilpipe.generation.protocol import (
    Ask,
    ChatRequest,
    CompletionRequest,
    Request,
    RequestError,
    can_chat,
    error_body,
)
from lilpipe.generation.responses import Envelope, Piece
from lilpipe.generation.transcript import gather
from lilpipe.model.lora import with_adapter

PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
"""Content Security Policy: the browser loads nothing from other sites, whatever a model writes."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_BODY_BYTES = 16 * 2**20
MAX_CONNECTIONS = 512
"""Maximum number of concurrent clients, because waiting requests are kept in memory; others get status 503."""
CLIENT_GONE = 499
"""nginx's status for a connection that the client closed; nobody reads the response."""

logger = logging.getLogger(__name__)


def serve(
    directory: Path,
    *,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_rows: int = 32,
    adapters: Mapping[str, Path] | None = None,
) -> None:
    """Serve a checkpoint until interrupted, and ``adapters`` of it in ``peft``'s format, by model name.

    ``max_rows`` is the number of completions of a model decoded at once; others wait. Raises ``ArtifactError`` if a
    directory contains no checkpoint or no adapter of it, ``ConfigError`` if it cannot listen at the address.
    """
    with listen(host, port) as listener:
        app = make_app(directory, name=name, host=host, max_rows=max_rows, adapters=adapters)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}"
        names = ", ".join([name, *(adapters or {})])
        print(f"{names}: {address}/v1, chat page {address}/; Ctrl-C stops it", flush=True)
        http_server(app).run(sockets=[listener])


def http_server(app: Starlette) -> uvicorn.Server:
    """Return the HTTP server of the application. On shutdown, responses in progress get 2 seconds to finish."""
    config = uvicorn.Config(app, log_level="warning", limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=2)
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at the address; port 0 selects a free port. Raises ``ConfigError`` if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()  # clients that connect before the application has started wait
    except OSError as error:
        listener.close()
        message = f"serve: cannot listen at {host}, port {port} ({error.strerror or error}); set another --port"
        raise ConfigError(message) from error
    return listener


def make_app(
    directory: Path, *, name: str, host: str, max_rows: int, adapters: Mapping[str, Path] | None = None
) -> Starlette:
    """Return the server as an ASGI application; its engines' threads run until the application shuts down."""
    model, tokenizer = load_frozen(directory)
    adapted = {other: with_adapter(model, folder) for other, folder in (adapters or {}).items()}
    threads = {name: EngineThread(lambda: engine_for(model, max_rows=max_rows), tokenizer)}
    for other, twin in adapted.items():  # not fused, which would copy the weights
        threads[other] = EngineThread(partial(engine_for, twin, max_rows=max_rows, fuse=False), tokenizer)
    server = _Server(threads, name=name, max_seq_len=model.config.max_seq_len)
    routes = [
        Route("/", server.page),
        Route("/health", server.health),
        Route("/v1/models", server.models),
        Route("/v1/models/{model:path}", server.model),
        Route("/v1/chat/completions", server.chat_completions, methods=["POST"]),
        Route("/v1/completions", server.completions, methods=["POST"]),
    ]
    known = [Middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK), www_redirect=False)]
    return Starlette(
        routes=routes,
        middleware=known if host in LOOPBACK else [],
        exception_handlers={RequestError: _refused, HTTPException: _not_found, ClientDisconnect: _gone, 500: _failed},
        lifespan=server.lifespan,
    )


class _Server:
    """The request handlers and their state."""

    def __init__(self, threads: Mapping[str, EngineThread], *, name: str, max_seq_len: int) -> None:
        self.threads = threads
        """By model name."""
        self.thread = threads[name]
        """The default model's."""
        self.name = name
        self.max_seq_len = max_seq_len
        self.created = int(time.time())

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Stop the engines' threads when the application shuts down."""
        app.state.thread = self.thread
        try:
            yield
        finally:
            for thread in self.threads.values():
                thread.close()

    async def page(self, request: HTTPRequest) -> Response:  # noqa: ARG002
        """Return the chat page, a single file."""
        text = await asyncio.to_thread(PAGE.read_text, encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})

    async def health(self, request: HTTPRequest) -> Response:  # noqa: ARG002
        """Return status 200 while the engines' threads are running, else 503."""
        alive = all(thread.alive for thread in self.threads.values())
        num_requests = sum(len(thread.tickets) for thread in self.threads.values())
        content = {"status": "ok" if alive else "the engine has stopped", "requests": num_requests}
        return JSONResponse(content, status_code=200 if alive else 503)

    async def models(self, request: HTTPRequest) -> Response:  # noqa: ARG002
        """List the model and its adapters."""
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self.threads]})

    async def model(self, request: HTTPRequest) -> Response:
        """Return the model, if it has this name."""
        return JSONResponse(self._card(self._name(request.path_params["model"])))

    async def chat_completions(self, request: HTTPRequest) -> Response:
        """Return chat completions."""
        return await self._respond(request, ChatRequest.parse(await _json(request)))

    async def completions(self, request: HTTPRequest) -> Response:
        """Return text completions."""
        return await self._respond(request, CompletionRequest.parse(await _json(request)))

    def _card(self, name: str) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": self.created, "owned_by": "lilpipe"}
        return {**card, "max_model_len": self.max_seq_len, "has_chat": can_chat(self.thread.tokenizer)}

    def _name(self, name: str | None) -> str:
        """Return the name of a served model, by default that without an adapter."""
        if name is not None and name not in self.threads:
            served = " or ".join(map(repr, self.threads))
            message = f"model: got {name!r}, expected {served}, the served model{'s' * (len(self.threads) > 1)}"
            raise RequestError(message, param="model", code="model_not_found", status=404)
        return name or self.name

    async def _respond(self, http: HTTPRequest, request: Request) -> Response:
        name = self._name(request.model)
        thread = self.threads[name]
        # Encoding a prompt of megabytes takes seconds, which would block the streams of other clients.
        ask = await asyncio.to_thread(request.ask, thread.tokenizer, max_seq_len=self.max_seq_len)
        envelope = Envelope(request, model=name, vocabulary=thread.vocabulary)
        if request.stream:
            events = _events(thread, request, ask, envelope)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        answer = asyncio.ensure_future(_whole(thread, ask))
        gone = asyncio.ensure_future(_disconnected(http))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return Response(None, CLIENT_GONE)
            if (error := answer.exception()) is not None:  # raising it would close the client's connection
                return await _failed(http, error)
            return JSONResponse(envelope.whole(answer.result(), ask))
        finally:
            gone.cancel()
            answer.cancel()


async def _whole(thread: EngineThread, ask: Ask) -> list[Piece]:
    choices: dict[int, Piece] = {}
    async for pieces in _pieces(thread, ask):
        gather(choices, pieces)
    return [choices[index] for index in sorted(choices)]


async def _events(thread: EngineThread, request: Request, ask: Ask, envelope: Envelope) -> AsyncIterator[str]:
    """Yield server-sent events: chunks, usage if requested, and the end. An error ends the stream."""
    num_tokens = 0
    try:
        for chunk in envelope.opening():
            yield _event(chunk)
        async for pieces in _pieces(thread, ask):
            for piece in pieces:
                num_tokens += len(piece.tokens)
                yield _event(envelope.part(piece))
    except Exception as error:  # the status is already sent: report the error in the stream
        logger.warning("a stream was aborted: %s", error)
        yield _event(error_body(str(error), kind="server_error"))
        return
    if request.stream_options.include_usage:
        yield _event(envelope.chunk(usage=envelope.usage(ask, num_tokens)))
    yield "data: [DONE]\n\n"


async def _pieces(thread: EngineThread, ask: Ask) -> AsyncIterator[Sequence[Piece]]:
    """Yield the parts of all choices as they arrive. Closing the iterator cancels the request."""
    loop, news = asyncio.get_running_loop(), asyncio.Queue[Sequence[Piece] | Exception]()
    ticket = thread.submit(ask, lambda pieces: loop.call_soon_threadsafe(news.put_nowait, pieces))
    num_open = len(ask.prompts) * ask.num_generations
    try:
        while num_open:
            pieces = await news.get()
            if isinstance(pieces, Exception):
                raise pieces
            num_open -= sum(piece.finish_reason is not None for piece in pieces)
            yield pieces
    finally:
        thread.cancel(ticket)


async def _json(request: HTTPRequest) -> Any:
    """Return the JSON body.

    Requires ``Content-Type: application/json``, for which a browser first asks permission (CORS preflight) on other
    sites.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"Content-Type: got {kind!r}, expected application/json", status=415)
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"request body: got more than {MAX_BODY_BYTES} bytes; shorten the request", status=413)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body: is not valid JSON ({error})") from error


async def _disconnected(request: HTTPRequest) -> None:
    """Wait until the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _refused(request: HTTPRequest, error: Exception) -> Response:  # noqa: ARG001
    assert isinstance(error, RequestError)
    return JSONResponse(error.body, status_code=error.status)


async def _gone(request: HTTPRequest, error: Exception) -> Response:  # noqa: ARG001
    """The client disconnected while sending its request: not a server error."""
    return Response(None, CLIENT_GONE)


async def _failed(request: HTTPRequest, error: BaseException) -> Response:  # noqa: ARG001
    return JSONResponse(error_body(str(error), kind="server_error"), status_code=500)


async def _not_found(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_body(message, kind="invalid_request_error"), status_code=error.status_code)
