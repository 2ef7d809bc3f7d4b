"""Routes that read without writing: scores, embeddings, tokens."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from hyaena.scoring import embed_steps, score_steps
from hyaena.serve.guards import while_connected
from hyaena.serve.logprobs import TokenInfo
from hyaena.serve.protocol import (
    ApiError,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    Prompts,
    ScoreBody,
    TokenizeBody,
    as_prompts,
)
from hyaena.serve.service import Served, aside, chat_prompt, encode_all, errors_of_clients, too_late
from hyaena.serve.work import Steps

if TYPE_CHECKING:
    from hyaena.serve.app import Server

T = TypeVar("T")

MOST_LOGPROBS = 2**17
"""Log-probabilities of prompts in one answer: a JSON text of about 10 MB."""


async def read_prefixes(
    server: Server, served: Served, request: Request, body: CompletionBody, prompts: Sequence[Sequence[int]]
) -> list[tuple[str, list[TokenInfo]]]:
    """What ``echo`` puts in front of every completion: the prompt, and its log-probabilities where they are wanted."""
    if not body.echo:
        return []
    decode = served.tokenizer.decode
    texts = await aside(sum(map(len, prompts)), lambda: [decode(prompt) for prompt in prompts])
    if body.logprobs is None:
        return [(text, []) for text in texts]
    top = body.logprobs
    count = sum(map(len, prompts)) * (body.n or 1) * (1 + top)
    if count > MOST_LOGPROBS:
        raise ApiError(
            400,
            f"the answer would have {count} log-probabilities, and may have {MOST_LOGPROBS}: ask for fewer logprobs or "
            "samples, or send shorter prompts",
            param="logprobs",
        )
    ids = [list(prompt) for prompt in prompts]
    options = {"rank": False, "entropy": False, "top": top, "tokens_per_pass": served.engine.chunk}
    scores: Any = await _read(server, served, request, ids, score_steps(served.model, served.tokenizer, ids, **options))
    found = []
    for text, prompt, score in zip(texts, prompts, scores, strict=True):
        values = score.logprobs.tolist()
        tops = [()] * len(prompt) if not top else _pairs(score)
        tokens = [
            TokenInfo(token, None if value != value else value, () if value != value else pairs, piece)
            for token, value, pairs, piece in zip(prompt, values, tops, _pieces(served, prompt), strict=True)
        ]
        found.append((text, tokens))
    return found


def _pieces(served: Served, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text."""
    stream = served.tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    pieces[-1] += stream.flush()
    return pieces


def _pairs(score: Any) -> list[tuple[tuple[int, float], ...]]:
    rows = zip(score.top_ids.tolist(), score.top_logprobs.tolist(), strict=True)
    return [tuple(zip(ids, values, strict=True)) for ids, values in rows]


async def _read(
    server: Server, served: Served, request: Request, prompts: Sequence[Sequence[int]], steps: Steps[T]
) -> T:
    """Read texts in the engine's thread, between the turns of streams.

    Raises:
        ApiError: too many tokens for the model or for one request, or too much time.
    """
    longest, room = max(map(len, prompts)), served.model.config.max_length
    if longest > room:
        raise ApiError(
            400,
            f"a text has {longest} tokens, and the model takes {room}: shorten it",
            code="context_length_exceeded",
        )
    total, most = sum(map(len, prompts)), server.limits.score_tokens
    if total > most:
        raise ApiError(
            400,
            f"{total} tokens are more than the {most} that one request may have scored: send them in parts, or run "
            "hyaena score",
            code="too_many_tokens",
        )
    with errors_of_clients():
        work = asyncio.wrap_future(served.engine.call(steps))
        try:
            return await while_connected(request, asyncio.wait_for(work, server.limits.seconds))
        except TimeoutError:
            raise too_late() from None


async def _listed(
    served: Served, texts: Sequence[Sequence[int]], found: Sequence[Any], entry: Callable[[Any], dict[str, Any]]
) -> Response:
    """The answer of a route that reads: an entry for every text, and how many tokens they have.

    It may be long, so it is written in another thread than that of all streams.
    """
    count = sum(map(len, texts))
    used = {"prompt_tokens": count, "total_tokens": count}

    def make() -> Response:
        data = [{"index": index} | entry(one) for index, one in enumerate(found)]
        return JSONResponse({"object": "list", "model": served.name, "data": data, "usage": used})

    return await asyncio.to_thread(make)


def _texts(given: Prompts) -> list[Any]:
    """The texts of a body, each as text or as ids.

    Raises:
        ApiError: one of them is empty.
    """
    texts = as_prompts(given)
    if not all(texts):
        raise ApiError(400, "a text is empty: give it at least one character", param="input")
    return texts


def add_reading(app: FastAPI, server: Server) -> None:
    """Add the routes that read."""

    @app.post("/v1/embeddings", tags=["reading"])
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        """Embed texts."""
        served = server.find(body.model)
        texts = _texts(body.input)
        ids = await encode_all(served, texts)
        steps = embed_steps(
            served.model,
            served.tokenizer,
            texts,
            body.layer,
            pool=body.pool,
            tokens_per_pass=served.engine.chunk,
        )
        vectors: Any = await _read(server, served, request, ids, steps)
        as_text = body.encoding_format == "base64"
        return await _listed(served, ids, vectors, lambda vector: _embedding_entry(vector, as_text))

    @app.post("/score", tags=["reading"])
    async def score(body: ScoreBody, request: Request) -> Response:
        """Score texts: sum and mean of log-probabilities, perplexity, and with ``per_token`` every token."""
        served = server.find(body.model)
        texts = _texts(body.input)
        ids = await encode_all(served, texts)
        options = {"both_strands": body.both_strands, "tokens_per_pass": served.engine.chunk}
        steps = score_steps(served.model, served.tokenizer, texts, **options)
        found: Any = await _read(server, served, request, ids, steps)
        return await _listed(served, ids, found, lambda score: _score_entry(score, body.per_token))

    @app.post("/tokenize", tags=["reading"])
    async def tokenize(body: TokenizeBody) -> Response:
        """The ids of a text or of a conversation."""
        served = server.find(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either a prompt or messages")
        if body.messages is not None:
            ids = await chat_prompt(served, body.messages)
        else:
            (ids,) = await encode_all(served, [body.prompt or ""], add_special_tokens=body.add_special_tokens)
        if body.return_token_strs and len(ids) > served.engine.max_length:
            raise ApiError(400, f"{len(ids)} tokens are more than the model takes: ask for fewer token_strs")

        def make() -> Response:
            names = [served.tokenizer.decode([token]) for token in ids] if body.return_token_strs else None
            return JSONResponse(
                {"count": len(ids), "max_model_len": served.engine.max_length, "tokens": ids, "token_strs": names}
            )

        return await asyncio.to_thread(make)

    @app.post("/detokenize", tags=["reading"])
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of ids."""
        served = server.find(body.model)
        text = await aside(len(body.tokens), lambda: served.tokenizer.decode(body.tokens))
        return JSONResponse({"prompt": text})


def _embedding_entry(vector: Any, as_text: bool) -> dict[str, Any]:
    packed = np.asarray(vector, dtype="<f4")
    value = base64.b64encode(packed.tobytes()).decode() if as_text else packed.tolist()
    return {"object": "embedding", "embedding": value}


def _score_entry(score: Any, per_token: bool) -> dict[str, Any]:
    entry = {"tokens": len(score.tokens)}
    entry |= {name: _number(getattr(score, name)) for name in ("sum", "mean", "perplexity")}
    if not per_token:
        return entry
    return entry | {
        "ids": np.asarray(score.tokens).tolist(),
        "logprobs": [_number(value) for value in score.logprobs.tolist()],
        "entropies": [_number(value) for value in score.entropies.tolist()],
        "ranks": None if score.ranks is None else score.ranks.tolist(),  # they belong to one strand
    }


def _number(value: float) -> float | None:
    """A number that JSON can hold; None for those that are not finite."""
    return float(value) if np.isfinite(value) else None
