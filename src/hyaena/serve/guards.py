"""What stands before the application: the size of bodies, keys, the log of requests, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hyaena.errors import InputError, printable, shown
from hyaena.serve.playground import FILES
from hyaena.serve.protocol import ApiError

log = logging.getLogger("hyaena.access")
T = TypeVar("T")

_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)

OPEN_PATHS = frozenset({"/health", "/version", *FILES})
"""Paths that need no key: what balancers look at, and the playground, which asks for one."""

FAILED = "the server failed on this request; its log says why"

BODY_SECONDS = 30.0
"""The longest pause in the body of a request."""

WHOLE_BODY_SECONDS = 300.0
"""The longest time that a body takes."""


class BodyLimit:
    """Refuses bodies that are too large or do not come.

    Args:
        app: behind it.
        most: bytes.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if len(length) > 18 or (length.isascii() and length.isdigit() and int(length) > self.most):
            await _answer(self._too_large(), scope, receive, send)
            return
        size, complete, end = 0, False, time.monotonic() + WHOLE_BODY_SECONDS

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, min(BODY_SECONDS, end - time.monotonic())))
            except TimeoutError:
                raise HTTPException(408, "the body of the request did not come") from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if size > self.most:
                    raise HTTPException(413, self._too_large().message)
            return message

        await self.app(scope, limited, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.most:,} bytes: send less at a time", code="body_too_large")


class Authentication:
    """Asks for a bearer key, which is compared in constant time.

    Args:
        app: behind it.
        keys: any of which is accepted.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            await self.app(scope, receive, send)
            return
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = _digest(key.strip().encode("latin-1"))
        known = [hmac.compare_digest(digest, other) for other in self._digests]  # all, so that the time tells nothing
        if kind.lower() == "bearer" and any(known):
            await self.app(scope, receive, send)
            return
        message = "the key is missing or wrong: send Authorization: Bearer KEY"
        error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await _answer(error, scope, receive, send)


class AllowedHosts:
    """Refuses requests for other hosts than the server's own.

    A web page from elsewhere may have its name resolved to this machine (DNS rebinding), and then call the server as if
    it had come from there. The ``Host`` of such a request is the name of that page's server.

    Args:
        app: behind it.
        hosts: names and addresses that are answered to, without a port.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app = app
        self._hosts = frozenset(map(_host, hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for value in Headers(scope=scope).getlist("host"):
                if _host(value) not in self._hosts:
                    who, name = f"the host {printable(value)}", "and this name"
                    if not value.strip():
                        who, name = "requests that name no host", "'*'"
                    message = (
                        f"this server does not answer to {who}: ask it at the address that it listens at, or start it "
                        f"with --allowed-host {name}"
                    )
                    await _answer(ApiError(403, message, code="host_not_allowed"), scope, receive, send)
                    return
        await self.app(scope, receive, send)


def hosts_to_check(address: str, named: str, allowed: Sequence[str]) -> list[str]:
    """The hosts that a server answers to; none where it answers to all.

    Args:
        address: that it listens at, as an IP address.
        named: the same as the user gave it.
        allowed: what the user allows beside it. Where there is nothing, only servers of this machine alone check.

    Raises:
        InputError: something that is no host.
    """
    for host in allowed:
        if not _HOST.fullmatch(host):
            raise InputError(f"{shown(host)} is no host: give a name or an address, without a scheme, port or path")
    local = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    if "*" in allowed or not (local or allowed):
        return []
    return [*LOOPBACK, named, address, *allowed]


_HOST = re.compile(r"\*|[\w.-]+|\[?[0-9A-Fa-f:.]+\]?", re.ASCII)

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""No page from elsewhere has these names."""


def _host(value: str) -> str:
    """The host of a ``Host`` header, or of an option, in one form: without a port, brackets and a closing dot."""
    value = value.strip().lower()
    if value.startswith("["):
        return value[1:].partition("]")[0]
    if value.count(":") == 1:
        value = value.partition(":")[0]
    return value.removesuffix(".")


def new_request_id() -> str:
    """A name for a request that came without one."""
    return uuid.uuid4().hex


class AccessLog:
    """Writes one line of JSON per request, and gives every answer an ``X-Request-Id``: the request's, or a new one.

    Args:
        app: behind it.
        log_bodies: whether the line has the body of the request, with its prompt.
    """

    def __init__(self, app: ASGIApp, log_bodies: bool = False) -> None:
        self.app, self.log_bodies = app, log_bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")  # of a balancer, or of Ray
        name = given if _REQUEST_ID.fullmatch(given) else new_request_id()
        began, status = time.monotonic(), 0
        body = bytearray()

        async def heard() -> Message:
            message = await receive()
            if self.log_bodies:
                body.extend(message.get("body", b""))
            return message

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            await self.app(scope, heard, named)
        except Exception:
            if not status:
                await _answer(ApiError(500, FAILED), scope, receive, named)
            raise  # for the log
        finally:
            more = {"body": body.decode("utf-8", "replace")} if self.log_bodies else {}
            client = (scope.get("client") or ("",))[0]
            log_request(name, client, scope["method"], scope["path"], status, time.monotonic() - began, **more)


def log_request(
    name: str, client: str, method: str | None, path: str | None, status: int, seconds: float, **more: str
) -> None:
    """Write the line of a request; method and path are None where they could not be read."""
    line = {"time": time.time(), "request": name, "client": client, "method": method, "path": path, "status": status}
    log.info(json.dumps(line | {"seconds": round(seconds, 4)} | more, ensure_ascii=True))


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Do something, or stop doing it where the client has left.

    Raises:
        ApiError: the client has left; nobody reads the answer.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise client_left()
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


def client_left() -> ApiError:
    """What ends the work for a client that has left; nobody reads it."""
    return ApiError(499, "the client closed the connection", code="disconnected")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _answer(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(error.body, error.status, headers=error.headers)(scope, receive, send)
