"""The HTTP interface: routes, keys, sizes, and errors in OpenAI's format."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megakda.data.tokenizer import Tokenizer
from megakda.inference.chat import Template
from megakda.inference.request import SamplingParams
from megakda.serving import protocol
from megakda.serving.answers import ChatAnswer, CompletionAnswer, Prompt, TokenTexts
from megakda.serving.generation import GeneratedResponse
from megakda.serving.loop import EngineLoop
from megakda.serving.metrics import Metrics
from megakda.serving.protocol import ApiError, ChatRequest, CompletionRequest, Limits, invalid

R = TypeVar("R", CompletionRequest, ChatRequest)


@dataclass
class Service:
    """Everything that the routes need.

    Attributes:
        name: of the model, as clients call it.
        template: of conversations; None: the model has none.
        max_body: bytes of a request's body.
        body_seconds: how long a client may take to send it.
        request_seconds: how long an answer may take, waiting included.
        api_key: what clients must send; None: nothing.
    """

    name: str
    loop: EngineLoop
    tokenizer: Tokenizer
    limits: Limits
    template: Template | None = None
    max_body: int = 1_000_000
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    api_key: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))


def create_app(service: Service) -> FastAPI:
    """The application; `service.loop` has been started, or will be before the first request."""
    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(title="megakda", openapi_url=None, docs_url=None, redoc_url=None)
    metrics = Metrics(service.loop)
    texts = TokenTexts(service.tokenizer)
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(_key_check(service.api_key))])

    @app.get("/health")
    async def health() -> Response:
        return _health(service)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @v1.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @v1.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(name, service)
        return _model(service)

    @v1.post("/completions")
    async def completions(request: Request) -> Response:
        asked = await _read(request, CompletionRequest, service)
        prompts = await _prompts(asked, service)
        longest = max(len(prompt.tokens) for prompt in prompts)
        room = protocol.fit_context(
            longest, asked.max_tokens, protocol.DEFAULT_MAX_TOKENS, "prompt", service.limits
        )
        scored = asked.logprobs if asked.echo else None
        params = asked.sampling(room, asked.logprobs, scored)
        answer = CompletionAnswer(service.name, asked, prompts, service.tokenizer, texts)
        return generate(answer, prompts, params)

    @v1.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = await _read(request, ChatRequest, service)
        prompt = await _conversation(asked, service)
        wanted = asked.max_completion_tokens
        if wanted is None:
            wanted = asked.max_tokens
        room = protocol.fit_context(len(prompt.tokens), wanted, None, "messages", service.limits)
        params = asked.sampling(room, asked.alternatives)
        answer = ChatAnswer(service.name, asked, [prompt], service.tokenizer, texts)
        return generate(answer, [prompt], params)

    def generate(
        answer: CompletionAnswer | ChatAnswer,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
    ) -> Response:
        requests = [(prompt.tokens, choice) for prompt in prompts for choice in params]
        return GeneratedResponse(answer, service.loop, requests, metrics, service.request_seconds)

    app.include_router(v1)
    _handle_errors(app)
    app.add_middleware(_CountRequests, metrics=metrics)
    return app


# ------------------------------------------------------------------ parts of routes


def _key_check(api_key: str | None) -> Any:
    async def check(request: Request) -> None:
        if api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # As bytes: compare_digest takes no other text than ASCII.
        same = hmac.compare_digest(key.strip().encode(), api_key.encode())
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                401,
                "Incorrect API key: send the server's key as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


def _health(service: Service) -> Response:
    loop = service.loop
    stats = loop.stats
    status, problem = "ok", None
    if loop.failure is not None:
        status, problem = "failed", loop.failure
    elif loop.seconds_in_round > service.request_seconds:
        status, problem = "stuck", f"one step has taken {loop.seconds_in_round:.0f} seconds so far"
    body = {
        "status": status,
        "model": service.name,
        "running": stats.running,
        "waiting": loop.waiting,
        "free_sequences": stats.free_sequences,
        "max_sequences": stats.max_sequences,
        **({} if problem is None else {"problem": problem}),
    }
    return JSONResponse(body, 200 if problem is None else 503)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "megakda",
        "max_model_len": service.limits.max_context,
    }


def _check_model(name: str | None, service: Service) -> None:
    if name is not None and name != service.name:
        raise ApiError(
            404,
            f"The model {protocol.shown(name)} does not exist; this server has {service.name!r}",
            param="model",
            code="model_not_found",
        )


async def _read(request: Request, kind: type[R], service: Service) -> R:
    """The request's body, checked.

    Raises:
        ApiError: a body that is too large, too slow, no JSON, or asks for what is not possible.
    """
    try:
        body = await asyncio.wait_for(_body(request, service.max_body), service.body_seconds)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {service.body_seconds:g} seconds"
        ) from None
    except ClientDisconnect:
        raise ApiError(400, "the connection was closed before the body had arrived") from None
    asked = protocol.read(kind, body)
    _check_model(asked.model, service)
    asked.check(service.limits)
    return asked


async def _body(request: Request, limit: int) -> bytes:
    too_large = ApiError(
        413,
        f"The body of the request is larger than {limit:,} bytes, the limit of this server "
        "(--max-body): send fewer or shorter prompts",
        code="body_too_large",
    )
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit:
        raise too_large
    body = bytearray()
    async for part in request.stream():  # without a length, or with a wrong one
        body += part
        if len(body) > limit:
            raise too_large
    return bytes(body)


async def _prompts(asked: CompletionRequest, service: Service) -> list[Prompt]:
    tokenizer = service.tokenizer

    def encode() -> list[Prompt]:
        prompts = []
        for prompt in asked.prompt:
            tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            protocol.check_prompt(tokens, "prompt", service.limits)
            text = prompt if isinstance(prompt, str) else ""
            if asked.echo and not isinstance(prompt, str):
                text = tokenizer.decode(tokens)
            prompts.append(Prompt(tokens, text))
        return prompts

    return await asyncio.to_thread(encode)  # a long text must not hold up others' streams


async def _conversation(asked: ChatRequest, service: Service) -> Prompt:
    template = service.template
    if template is None:
        raise ApiError(
            400,
            f"the model {service.name!r} has no chat template: use /v1/completions, or start the "
            "server with --chat-template FILE",
            code="no_chat_template",
        )
    messages = [message.model_dump(exclude_none=True) for message in asked.messages]
    try:
        tokens = await asyncio.to_thread(template, messages)
    except Exception as error:  # templates raise what they like
        raise invalid(
            f"the chat template cannot render these messages: {error}", "messages"
        ) from error
    protocol.check_prompt(tokens, "messages", service.limits)
    return Prompt(tokens)


# ------------------------------------------------------------------ errors and counts


def _handle_errors(app: FastAPI) -> None:
    """Every error leaves in OpenAI's format."""

    def answer(error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = {
            404: f"Unknown route: {request.method} {protocol.shown(request.url.path)}",
            405: f"{request.method} is not allowed at {request.url.path}",
        }.get(error.status_code, str(error.detail))
        headers = None if error.headers is None else dict(error.headers)
        code = {404: "unknown_route", 405: "method_not_allowed"}.get(error.status_code)
        return answer(ApiError(error.status_code, message, code=code, headers=headers))

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        return answer(ApiError(400, str(error.errors()[0]["msg"])))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:  # uvicorn logs it
        return answer(
            ApiError(500, "internal error; the server's log says more", type="server_error")
        )


class _CountRequests:
    """Counts HTTP requests by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 499  # nothing was sent

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception:
            status = 500
            raise
        finally:
            # Routes, not paths: anyone can make up paths.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
