"""The playground: a page at ``/`` with files of its own, and nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import FastAPI
from fastapi.responses import Response

FILES = {
    "/": ("index.html", "text/html"),
    "/static/style.css": ("style.css", "text/css"),
    "/static/icon.svg": ("icon.svg", "image/svg+xml"),
    "/static/playground.js": ("playground.js", "text/javascript"),
    "/static/api.js": ("api.js", "text/javascript"),
    "/static/tokens.js": ("tokens.js", "text/javascript"),
    "/static/memory.js": ("memory.js", "text/javascript"),
}
"""Paths, with the file in ``static/`` and the media type of each."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Of every file: the page runs no script, and loads and calls nothing, that is not this server's own."""


def add_playground(app: FastAPI) -> None:
    """Add the page and its files."""
    for path, (name, kind) in FILES.items():
        content = (resources.files("hyaena.serve") / "static" / name).read_bytes()
        app.add_api_route(path, _giving(content, kind), include_in_schema=False)


def _giving(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def give() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return give
