"""The HTTP interface: OpenAI's completions, chats and embeddings, scores, health, metrics and the playground."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import hyaena
from hyaena.errors import printable
from hyaena.serve.delivery import STREAM_INTERVAL, Delivery
from hyaena.serve.guards import FAILED, AccessLog, AllowedHosts, Authentication, BodyLimit
from hyaena.serve.metrics import MEDIA_TYPE, Metrics
from hyaena.serve.playground import add_playground
from hyaena.serve.protocol import FORMS, ApiError
from hyaena.serve.reading import add_reading
from hyaena.serve.service import Limits, Served
from hyaena.serve.writing import add_writing


class Server:
    """The models that are served, and what their clients may ask for.

    Args:
        models: the first one answers requests that name no model.
        metrics: that the engines count in.
        limits: of every request.
        stream_interval: seconds between the events of a stream; tokens that come sooner share one. 0: each has its own.
    """

    def __init__(
        self,
        models: Sequence[Served],
        metrics: Metrics,
        limits: Limits | None = None,
        *,
        stream_interval: float = STREAM_INTERVAL,
    ) -> None:
        self.models = {served.name: served for served in models}
        self.default = models[0]
        self.metrics = metrics
        self.limits = limits or Limits()
        self.stream_interval = stream_interval
        self._delivery: Delivery | None = None

    def delivery(self) -> Delivery:
        """What hands tokens to the event loop that runs."""
        loop = asyncio.get_running_loop()
        if self._delivery is None or self._delivery.loop is not loop:
            self._delivery = Delivery(loop, self.stream_interval)
        return self._delivery

    def find(self, name: str | None) -> Served:
        """The model that a client names.

        Raises:
            ApiError: there is no such model.
        """
        if name is None:
            return self.default
        if name not in self.models:
            known = ", ".join(self.models)
            message = f"there is no model {printable(name)}: this server has {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.models[name]


def make_app(
    server: Server,
    *,
    keys: Sequence[str] = (),
    allow_origins: Sequence[str] = (),
    hosts: Sequence[str] = (),
    log_prompts: bool = False,
) -> FastAPI:
    """Make the application.

    Args:
        server: the models.
        keys: bearer keys, one of which a client must send; without any, no key is needed.
        allow_origins: origins of web pages that may call the server (CORS).
        hosts: that the server answers to, see ``guards.AllowedHosts``; without any, to all.
        log_prompts: whether the log holds the bodies of requests.
    """
    # The pages that FastAPI would show the description on load scripts from elsewhere.
    app = FastAPI(
        title="hyaena",
        version=hyaena.__version__,
        summary="StripedHyena models, served",
        docs_url=None,
        redoc_url=None,
    )
    add_errors(app)
    add_writing(app, server)
    add_reading(app, server)
    _add_information(app, server)
    add_playground(app)
    _answer_head(app)
    app.add_middleware(BodyLimit, most=server.limits.body_bytes)
    if keys:
        app.add_middleware(Authentication, keys=keys)
    if allow_origins:
        app.add_middleware(CORSMiddleware, **cross_origin(allow_origins))
    if hosts:
        app.add_middleware(AllowedHosts, hosts=hosts)
    app.add_middleware(AccessLog, log_bodies=log_prompts)
    return app


def cross_origin(origins: Sequence[str]) -> dict[str, Any]:
    """Options of CORSMiddleware, which stands before what refuses requests: else a page could not read why."""
    return {
        "allow_origins": list(origins),
        "allow_methods": ["*"],
        "allow_headers": ["*"],
        "expose_headers": ["Retry-After", "X-Request-Id"],
    }


def add_errors(app: Starlette) -> None:
    """Answer every error in the form of the API."""

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status, headers=error.headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await api_error(request, _invalid(error.errors()[0]))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        what = f"{printable(request.method, limit=20)} {printable(request.scope['path'], limit=100)}"
        message = {  # of the framework, which does not say what to do
            400: "the body cannot be read: send JSON in UTF-8, without compression",
            404: f"this server has no {what}: /openapi.json has its paths",
            405: f"this server has no {what}, but {headers.get('Allow', 'another method')}",
        }.get(error.status_code, printable(str(error.detail)))
        return await api_error(request, ApiError(error.status_code, message, headers=headers))

    async def crash(request: Request, error: Exception) -> Response:
        return await api_error(request, ApiError(500, FAILED))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, crash)


def _invalid(error: Any) -> ApiError:
    """The answer to a body with a mistake, as pydantic describes it."""
    where = [str(part) for part in error["loc"][1:] if part not in FORMS]
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {error['ctx']['error']} at character {where[0]}")
    if error["type"] == "extra_forbidden":
        where.append(error["ctx"]["field"])
    if not where:
        return ApiError(400, "the body is no JSON object: send one, with the header Content-Type: application/json")
    field = printable(".".join(where), limit=100)
    return ApiError(400, printable(f"{field}: {error['msg']}", limit=400), param=field)


def _answer_head(app: FastAPI) -> None:
    """Answer HEAD wherever there is GET: some balancers look at a server by it."""
    for route in [route for route in app.routes if isinstance(route, APIRoute) and "GET" in (route.methods or ())]:
        app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)


def _add_information(app: FastAPI, server: Server) -> None:
    def described(served: Served) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "hyaena",
            "root": served.parent or served.name,
            "parent": served.parent,
            "max_model_len": served.engine.max_length,
            "takes_chats": served.template is not None,
        }

    @app.get("/v1/models", tags=["information"])
    async def models() -> Response:
        """The models of this server."""
        return JSONResponse({"object": "list", "data": [described(served) for served in server.models.values()]})

    @app.get("/v1/models/{name:path}", tags=["information"])
    async def model(name: str) -> Response:
        """One model."""
        return JSONResponse(described(server.find(name)))

    @app.get("/health", tags=["information"])
    async def health() -> Response:
        """200 while every engine takes requests."""
        alive = all(served.engine.alive for served in server.models.values())
        if not alive:
            raise ApiError(503, "an engine has stopped: restart the server", code="unavailable")
        return Response()

    @app.get("/version", tags=["information"])
    async def version() -> Response:
        """The version of hyaena."""
        return JSONResponse({"version": hyaena.__version__})

    @app.get("/metrics", tags=["information"])
    async def metrics() -> Response:
        """All metrics in Prometheus's text format."""
        return Response(server.metrics.text(), media_type=MEDIA_TYPE)
