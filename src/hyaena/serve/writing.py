"""Routes that generate: completions and chats, whole or streamed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from hyaena.serve.answers import ENCODER, ChatAnswer, CompletionAnswer
from hyaena.serve.guards import FAILED, client_left, while_connected
from hyaena.serve.protocol import ApiError, ChatBody, CompletionBody, GenerationBody, check_together
from hyaena.serve.reading import read_prefixes
from hyaena.serve.service import Generation, Parts, Unwritten, chat_prompt, completion_prompts, new_tokens

if TYPE_CHECKING:
    from hyaena.serve.app import Server

log = logging.getLogger(__name__)

DEFAULT_COMPLETION_TOKENS = 16
"""Tokens of a completion where the client names no number, as in the API."""


def add_writing(app: FastAPI, server: Server) -> None:
    """Add the routes that generate."""

    @app.post("/v1/completions", tags=["generation"])
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue prompts: text, or token ids, one or several."""
        check_together(body)
        served = server.find(body.model)
        prompts = await completion_prompts(served, body)
        top = body.logprobs or 0
        count = new_tokens(served, body, prompts, top=top, limits=server.limits, default=DEFAULT_COMPLETION_TOKENS)
        prefixes = await read_prefixes(server, served, request, body, prompts)
        generation = Unwritten(prompts, body)
        if count:
            generation = Generation(
                served,
                prompts,
                body,
                top=top,
                limits=server.limits,
                delivery=server.delivery(),
                max_new_tokens=count,
            )
        answer = CompletionAnswer(served, body, prefixes)
        return _EventStream(answer, generation, body) if body.stream else await _whole(answer, generation, request)

    @app.post("/v1/chat/completions", tags=["generation"])
    async def chats(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        check_together(body)
        served = server.find(body.model)
        prompt = await chat_prompt(served, body.messages)
        top, limits = body.top_logprobs or 0, server.limits
        count = new_tokens(served, body, [prompt], top=top, limits=limits, default=limits.new_tokens)
        generation = Generation(
            served,
            [prompt],
            body,
            top=top,
            limits=limits,
            delivery=server.delivery(),
            max_new_tokens=count,
        )
        answer = ChatAnswer(served, body)
        return _EventStream(answer, generation, body) if body.stream else await _whole(answer, generation, request)


class _EventStream(Response):
    """Server-sent events: tokens, then usage where the client wants it, then ``[DONE]``.

    The tokens of a choice that came together share an event, see ``Delivery``. The generation ends with the stream, and
    with its client: also before the first event could be sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self, answer: CompletionAnswer | ChatAnswer, generation: Generation | Unwritten, body: GenerationBody
    ) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache"})
        self.answer, self.generation = answer, generation
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage
        frame = answer.frame | ({"usage": None} if self._with_usage else {})
        self._head = f'data: {ENCODER.encode(frame)[:-1]},"choices":['  # the same in every event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.ensure_future(self._watch(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            end = await self._send_tokens(send)
            await send({"type": "http.response.body", "body": end.encode(), "more_body": False})
        finally:
            watching.cancel()
            self.generation.close()

    async def _send_tokens(self, send: Send) -> str:
        """Send events as tokens come; the last ones."""
        answer, generation = self.answer, self.generation
        try:
            events = self._events(answer.first(generation.choices))
            while True:
                if events:
                    await send({"type": "http.response.body", "body": events.encode(), "more_body": True})
                if not (parts := await generation.next()):
                    break
                events = await self._written(parts)
            end = _event(answer.frame | {"choices": [], "usage": generation.usage()}) if self._with_usage else ""
        except ApiError as error:
            end = _event(error.body)
        except Exception:
            log.exception("a stream failed")
            end = _event(ApiError(500, FAILED).body)
        return f"{end}data: [DONE]\n\n"

    async def _written(self, parts: Parts) -> str:
        """The events of choices with new tokens; long ones are made in another thread, while other streams go on."""

        def write() -> str:
            return self._events([self.answer.part(*part) for part in parts])

        return await asyncio.to_thread(write) if self.answer.long else write()

    def _events(self, parts: Sequence[str]) -> str:
        return "".join([f"{self._head}{part}]}}\n\n" for part in parts])

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.generation.fail(client_left())


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {ENCODER.encode(data)}\n\n"


async def _whole(
    answer: CompletionAnswer | ChatAnswer, generation: Generation | Unwritten, request: Request
) -> Response:
    """Wait for all samples; a client that leaves ends them."""

    async def read() -> None:
        while await generation.next():
            pass

    try:
        await while_connected(request, read())
    finally:
        generation.close()
    return await asyncio.to_thread(lambda: JSONResponse(answer.whole(generation)))
