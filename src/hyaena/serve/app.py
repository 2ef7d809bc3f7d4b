"""The HTTP interface: OpenAI's completions, chats and embeddings, scores, health, metrics and the playground."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from importlib import resources
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import hyaena
from hyaena.errors import printable
from hyaena.serve.engine import Delta
from hyaena.serve.guards import AccessLog, Authentication, BodyLimit
from hyaena.serve.metrics import Metrics
from hyaena.serve.protocol import (
    ApiError,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    GenerationBody,
    Prompts,
    ScoreBody,
    TokenizeBody,
    as_prompts,
    usage,
)
from hyaena.serve.service import (
    Choice,
    Generation,
    Limits,
    Served,
    TokenInfo,
    chat_logprobs,
    chat_prompt,
    completion_logprobs,
    completion_prompts,
    errors_of_clients,
    infos,
    new_id,
    new_tokens,
    reason,
)

T = TypeVar("T")

DEFAULT_COMPLETION_TOKENS = 16
"""Tokens of a completion where the client names no number, as in the API."""


class Server:
    """The models that are served, and what their clients may ask for.

    Args:
        models: the first one answers requests that name no model.
        metrics: that the engines count in.
        limits: of every request.
    """

    def __init__(self, models: Sequence[Served], metrics: Metrics, limits: Limits | None = None) -> None:
        self.models = {served.name: served for served in models}
        self.default = models[0]
        self.metrics = metrics
        self.limits = limits or Limits()

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
    server: Server, *, keys: Sequence[str] = (), allow_origins: Sequence[str] = (), log_prompts: bool = False
) -> FastAPI:
    """Make the application.

    Args:
        server: the models.
        keys: bearer keys, one of which a client must send; none means that no key is asked for.
        allow_origins: origins of web pages that may call the server (CORS).
        log_prompts: whether the log holds the bodies of requests.
    """
    app = FastAPI(title="hyaena", version=hyaena.__version__, summary="StripedHyena models, served")
    _add_errors(app)
    _add_generation(app, server)
    _add_reading(app, server)
    _add_information(app, server)
    if allow_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(allow_origins), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(BodyLimit, most=server.limits.body_bytes)
    if keys:
        app.add_middleware(Authentication, keys=keys)
    app.add_middleware(AccessLog, log_bodies=log_prompts)
    return app


def _add_errors(app: FastAPI) -> None:
    """Answer every error in the form of the API."""

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status, headers=error.headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        field = printable(".".join(where), limit=100) or None
        message = f"{field}: {first['msg']}" if field else str(first["msg"])
        return await api_error(request, ApiError(400, printable(message, limit=400), param=field))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return await api_error(
            request, ApiError(error.status_code, printable(str(error.detail)), headers=dict(error.headers or {}))
        )

    async def crash(request: Request, error: Exception) -> Response:
        return await api_error(request, ApiError(500, "the server failed on this request; its log says why"))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, crash)


# --- generation ------------------------------------------------------------------------------------------------------


def _add_generation(app: FastAPI, server: Server) -> None:
    @app.post("/v1/completions", tags=["generation"])
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue prompts: text, or token ids, one or several."""
        served = server.find(body.model)
        prompts = completion_prompts(served, body)
        count = new_tokens(served, body, prompts, server.limits, DEFAULT_COMPLETION_TOKENS)
        prefixes = await _prefixes(server, served, request, body, prompts)
        generation = None
        if count:
            generation = Generation(
                served, prompts, body, top=body.logprobs or 0, limits=server.limits, max_new_tokens=count
            )
        answer = _CompletionAnswer(served, body, prefixes)
        if body.stream and generation is not None:
            return _stream(answer, generation, body)
        choices = await _collect(generation, request) if generation else _unwritten(prompts, body)
        return JSONResponse(answer.whole(choices, generation))

    @app.post("/v1/chat/completions", tags=["generation"])
    async def chats(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        served = server.find(body.model)
        prompt = chat_prompt(served, body.messages)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs true", param="top_logprobs")
        count = new_tokens(served, body, [prompt], server.limits, server.limits.new_tokens)
        generation = Generation(
            served, [prompt], body, top=body.top_logprobs or 0, limits=server.limits, max_new_tokens=count
        )
        answer = _ChatAnswer(served, body)
        if body.stream:
            return _stream(answer, generation, body)
        return JSONResponse(answer.whole(await _collect(generation, request), generation))


class _CompletionAnswer:
    """The form of /v1/completions."""

    def __init__(self, served: Served, body: CompletionBody, prefixes: Sequence[tuple[str, list[TokenInfo]]]) -> None:
        self.served, self.body, self.prefixes = served, body, prefixes
        self.frame = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }
        self.begun: set[int] = set()

    def _prefix(self, choice: Choice) -> tuple[str, list[TokenInfo]]:
        return self.prefixes[choice.index // (self.body.n or 1)] if self.prefixes else ("", [])

    def _logprobs(self, tokens: Sequence[TokenInfo], offset: int) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        return completion_logprobs(self.served.tokenizer, tokens, offset)

    def first(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        return []

    def part(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        text, tokens, offset = delta.text, list(infos([delta])), 0
        if choice.index not in self.begun:
            self.begun.add(choice.index)
            prefix, before = self._prefix(choice)
            text, tokens = prefix + text, before + tokens
        else:
            offset = len(self._prefix(choice)[0]) + choice.characters - len(delta.text)
        return self.frame | {
            "choices": [
                {
                    "index": choice.index,
                    "text": text,
                    "logprobs": self._logprobs(tokens, offset),
                    "finish_reason": reason(delta),
                }
            ]
        }

    def whole(self, choices: Sequence[Choice], generation: Generation | None) -> dict[str, Any]:
        made = []
        for choice in choices:
            prefix, before = self._prefix(choice)
            made.append(
                {
                    "index": choice.index,
                    "text": prefix + choice.text,
                    "logprobs": self._logprobs([*before, *infos(choice.deltas)], 0),
                    "finish_reason": choice.finish_reason or "length",
                }
            )
        used = generation.usage() if generation else usage(sum(len(choice.prompt) for choice in choices), 0, 0)
        return self.frame | {"choices": made, "usage": used}


class _ChatAnswer:
    """The form of /v1/chat/completions."""

    def __init__(self, served: Served, body: ChatBody) -> None:
        self.served, self.body = served, body
        self.frame = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": served.name,
        }

    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        return chat_logprobs(self.served.tokenizer, list(infos(deltas))) if self.body.logprobs else None

    def first(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            self.frame | {"choices": [{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}]}
            for choice in choices
        ]

    def part(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        return self.frame | {
            "choices": [
                {
                    "index": choice.index,
                    "delta": {"content": delta.text} if delta.text else {},
                    "logprobs": self._logprobs([delta]),
                    "finish_reason": reason(delta),
                }
            ]
        }

    def whole(self, choices: Sequence[Choice], generation: Generation) -> dict[str, Any]:
        made = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.deltas),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return self.frame | {"choices": made, "usage": generation.usage()}


def _stream(answer: _CompletionAnswer | _ChatAnswer, generation: Generation, body: GenerationBody) -> Response:
    """Server-sent events, one per token, then usage where it is asked for, then ``[DONE]``."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    extra = {"usage": None} if with_usage else {}

    async def events() -> AsyncIterator[str]:
        try:
            for part in answer.first(generation.choices):
                yield _event(part | extra)
            async with contextlib.aclosing(generation.events()) as tokens:
                async for choice, delta in tokens:
                    yield _event(answer.part(choice, delta) | extra)
            if with_usage:
                yield _event(answer.frame | {"choices": [], "usage": generation.usage()})
        except ApiError as error:
            yield _event(error.body)
        finally:
            generation.close()
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _event(data: Mapping[str, Any]) -> str:
    # All in ASCII: many clients take U+2028, U+2029 or U+0085 in a text for the end of the line.
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


async def _collect(generation: Generation, request: Request) -> list[Choice]:
    """Wait for all samples; a client that leaves ends them."""

    async def read() -> list[Choice]:
        async with contextlib.aclosing(generation.events()) as events:
            async for _ in events:
                pass
        return generation.choices

    return await _while_connected(request, read())


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """Do something, or stop doing it where the client has left.

    Raises:
        ApiError: the client has left; nobody reads the answer.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection", code="disconnected")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _unwritten(prompts: Sequence[Sequence[int]], body: CompletionBody) -> list[Choice]:
    """The choices of a body that asks for no new token."""
    count = body.n or 1
    return [Choice(i * count + j, prompt) for i, prompt in enumerate(prompts) for j in range(count)]


# --- reading without writing -----------------------------------------------------------------------------------------


async def _prefixes(
    server: Server, served: Served, request: Request, body: CompletionBody, prompts: Sequence[Sequence[int]]
) -> list[tuple[str, list[TokenInfo]]]:
    """What ``echo`` puts in front of every completion: the prompt, and its log-probabilities where they are wanted."""
    if not body.echo:
        return []
    texts = [served.tokenizer.decode(prompt) for prompt in prompts]
    if body.logprobs is None:
        return [(text, []) for text in texts]
    top = body.logprobs

    def work() -> list[Any]:
        return _scores(served, prompts, rank=False, entropy=False, top=top)

    scores = await _read(server, served, request, prompts, work)
    found = []
    for text, prompt, score in zip(texts, prompts, scores, strict=True):
        values = score.logprobs.tolist()
        tops = [()] * len(prompt) if not top else _pairs(score)
        tokens = [
            TokenInfo(token, None if value != value else value, () if value != value else pairs)
            for token, value, pairs in zip(prompt, values, tops, strict=True)
        ]
        found.append((text, tokens))
    return found


def _pairs(score: Any) -> list[tuple[tuple[int, float], ...]]:
    rows = zip(score.top_ids.tolist(), score.top_logprobs.tolist(), strict=True)
    return [tuple(zip(ids, values, strict=True)) for ids, values in rows]


def _scores(served: Served, prompts: Sequence[Sequence[int]], **options: Any) -> list[Any]:
    return hyaena.score(served.engine.model, served.tokenizer, [list(prompt) for prompt in prompts], **options)


async def _read(
    server: Server, served: Served, request: Request, prompts: Sequence[Sequence[int]], work: Callable[[], T]
) -> T:
    """Read texts in the engine's thread, between two turns.

    Raises:
        ApiError: too many tokens for one request.
    """
    total, most = sum(map(len, prompts)), server.limits.score_tokens
    if total > most:
        raise ApiError(
            400,
            f"{total} tokens are more than the {most} that one request may have scored: send them in parts, or run "
            "hyaena score",
            code="too_many_tokens",
        )
    with errors_of_clients():
        size = served.engine.model.config.vocab_size
        outside = next((token for prompt in prompts for token in prompt if not 0 <= token < size), None)
        if outside is not None:
            raise ApiError(400, f"token id {outside} is outside the vocabulary 0..{size - 1} of the model")
        return await _while_connected(request, asyncio.wrap_future(served.engine.call(work)))


def _texts(given: Prompts) -> list[Any]:
    """The texts of a body, each as text or as ids.

    Raises:
        ApiError: one of them is empty.
    """
    texts = as_prompts(given)
    if not all(texts):
        raise ApiError(400, "a text is empty: give it at least one character", param="input")
    return texts


def _encode(served: Served, texts: Sequence[Any]) -> list[list[int]]:
    with errors_of_clients():
        return [served.tokenizer.encode(text) if isinstance(text, str) else list(text) for text in texts]


def _add_reading(app: FastAPI, server: Server) -> None:
    @app.post("/v1/embeddings", tags=["reading"])
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        """Embed texts."""
        import base64

        served = server.find(body.model)
        texts = _texts(body.input)
        ids = _encode(served, texts)
        model, tokenizer = served.engine.model, served.tokenizer

        def work() -> Any:
            return hyaena.embed(model, tokenizer, texts, body.layer, pool=body.pool)

        vectors = await _read(server, served, request, ids, work)
        data = []
        for index, vector in enumerate(vectors):
            packed = np.asarray(vector, dtype="<f4")
            value = packed.tolist() if body.encoding_format == "float" else base64.b64encode(packed.tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": value})
        count = sum(map(len, ids))
        used = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "model": served.name, "data": data, "usage": used})

    @app.post("/score", tags=["reading"])
    async def score(body: ScoreBody, request: Request) -> Response:
        """Score texts: sum and mean of log-probabilities, perplexity, and every token where it is asked for."""
        served = server.find(body.model)
        model, tokenizer = served.engine.model, served.tokenizer
        texts = _texts(body.input)
        ids = _encode(served, texts)

        def work() -> Any:
            return hyaena.score(model, tokenizer, texts, both_strands=body.both_strands)

        data = []
        for index, found in enumerate(await _read(server, served, request, ids, work)):
            entry = {
                "index": index,
                "tokens": len(found.tokens),
                "sum": _number(found.sum),
                "mean": _number(found.mean),
            }
            entry["perplexity"] = _number(found.perplexity)
            if body.per_token:
                entry |= {
                    "ids": np.asarray(found.tokens).tolist(),
                    "logprobs": [_number(value) for value in found.logprobs.tolist()],
                    "entropies": [_number(value) for value in found.entropies.tolist()],
                    "ranks": found.ranks.tolist(),
                }
            data.append(entry)
        count = sum(map(len, ids))
        used = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "model": served.name, "data": data, "usage": used})

    @app.post("/tokenize", tags=["reading"])
    async def tokenize(body: TokenizeBody) -> Response:
        """The ids of a text or of a conversation."""
        served = server.find(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either a prompt or messages")
        if body.messages is not None:
            ids = chat_prompt(served, body.messages)
        else:
            with errors_of_clients():
                ids = served.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        if body.return_token_strs and len(ids) > served.engine.max_length:
            raise ApiError(400, f"{len(ids)} tokens are more than the model takes: ask for fewer token_strs")
        names = [served.tokenizer.decode([token]) for token in ids] if body.return_token_strs else None
        return JSONResponse(
            {"count": len(ids), "max_model_len": served.engine.max_length, "tokens": ids, "token_strs": names}
        )

    @app.post("/detokenize", tags=["reading"])
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of ids."""
        served = server.find(body.model)
        with errors_of_clients():
            return JSONResponse({"prompt": served.tokenizer.decode(body.tokens)})


def _number(value: float) -> float | None:
    """A number that JSON can hold; None for those that are not finite."""
    return float(value) if np.isfinite(value) else None


# --- information -----------------------------------------------------------------------------------------------------


def _add_information(app: FastAPI, server: Server) -> None:
    def described(served: Served) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "hyaena",
            "root": served.name,
            "parent": None,
            "max_model_len": served.engine.max_length,
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
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        """The playground."""
        page = resources.files("hyaena.serve") / "static" / "index.html"
        return HTMLResponse(page.read_text(encoding="utf-8"))
