"""From a checked request to the engine and back to what the client receives."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from hyaena.errors import CapacityError, HyaenaError, InputError
from hyaena.model import StripedHyena
from hyaena.sampling import SamplingParams
from hyaena.serve.conversation import ChatTemplate
from hyaena.serve.engine import Delta, Engine, EngineDeadError, QueueFullError, Request
from hyaena.serve.protocol import ApiError, ChatBody, CompletionBody, GenerationBody, as_prompts, usage
from hyaena.tokenizers import Tokenizer

T = TypeVar("T")

LONG = 2**14
"""Characters or ids from which a text is encoded in another thread: a tokenizer in Python takes milliseconds for it."""

_texts = ThreadPoolExecutor(2, thread_name_prefix="hyaena-texts")
"""Two long texts are encoded at a time; others wait, and the streams still get most of the interpreter."""

MIN_LOGPROB = -9999.0
"""Sent in place of -infinity, which JSON does not have."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for.

    Attributes:
        body_bytes: size of a request's body.
        new_tokens: tokens of a completion.
        seconds: from a request's arrival to its end.
        score_tokens: tokens of one request for scores or embeddings.
    """

    body_bytes: int = 4 * 2**20
    new_tokens: int = 16_384
    seconds: float = 3600.0
    score_tokens: int = 32_768


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model under the name by which clients ask for it.

    Attributes:
        name: of the model.
        engine: that runs it.
        tokenizer: of the model.
        template: of its conversations; None where it takes none.
        adapter: the name of its adapter in the engine; "" for the model alone.
        parent: the name of the model that the adapter belongs to.
        created: time in seconds.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    adapter: str = ""
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> StripedHyena:
        return self.engine.models[self.adapter]


@dataclass
class Choice:
    """What one of the requested samples has come to."""

    index: int
    prompt: Sequence[int]
    deltas: list[Delta] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def finish_reason(self) -> str | None:
        return reason(self.deltas[-1]) if self.deltas else None


def reason(delta: Delta) -> str | None:
    """The API's word for why a request ended."""
    return "stop" if delta.finish_reason == "eos" else delta.finish_reason


class Mailbox:
    """Hands tokens from the engine's thread to receivers in an event loop, which is woken once for those of a turn."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[Any], object], Any]] = deque()
        self._woken = False

    def put(self, loop: asyncio.AbstractEventLoop, receive: Callable[[Any], object], item: Any) -> None:
        """From any thread; ``receive`` is called with the item in the thread of the loop."""
        self._waiting.append((receive, item))
        if not self._woken:
            self._woken = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # first: what is put from now on wakes the loop again
        while self._waiting:
            receive, item = self._waiting.popleft()
            receive(item)


class Inbox(Generic[T]):
    """What has come for a task of an event loop, which takes all of it at a time.

    Args:
        loop: in whose thread everything happens.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: list[T] = []
        self._came: asyncio.Future[None] | None = None  # of the task, while it waits

    def put(self, item: T) -> None:
        """Add an item."""
        self._items.append(item)
        if self._came is not None and not self._came.done():
            self._came.set_result(None)

    async def take(self) -> list[T]:
        """All items, at least one."""
        while not self._items:
            self._came = self._loop.create_future()
            await self._came
        items, self._items = self._items, []
        return items


_mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = WeakKeyDictionary()


class Generation:
    """The requests of one body in the engine.

    Args:
        served: the model.
        prompts: token ids, each sampled ``body.n`` times.
        body: of the client, checked.
        top: how many alternatives are reported.
        limits: of the server.
        max_new_tokens: of every sample.

    Raises:
        ApiError: they cannot be queued; none is.
    """

    def __init__(
        self,
        served: Served,
        prompts: Sequence[Sequence[int]],
        body: GenerationBody,
        *,
        top: int,
        limits: Limits,
        max_new_tokens: int,
    ) -> None:
        self.served = served
        count = body.n or 1
        self.choices = [Choice(i * count + j, prompt) for i, prompt in enumerate(prompts) for j in range(count)]
        self._loop = asyncio.get_running_loop()
        self._inbox: Inbox[tuple[int, Delta] | None] = Inbox(self._loop)  # None: the time is over
        self._written = 0  # tokens
        firsts = {id(choice.prompt): choice for choice in reversed(self.choices)}.values()  # of every prompt
        self._firsts = frozenset(choice.index for choice in firsts)
        self._cached, self._read = 0, sum(len(choice.prompt) for choice in firsts)
        self._keys: dict[int, int] = {}  # of choices that have not ended
        tokenizer = served.tokenizer
        special = tokenizer.special_tokens
        most = served.engine.settings.max_waiting
        if len(self.choices) > most:
            message = f"{len(self.choices)} completions in one request are more than this server queues, {most}"
            raise ApiError(400, message)
        stops = tuple(body.stop or ())
        stop_ids = frozenset(body.stop_token_ids or ()) | {special[stop] for stop in stops if stop in special}
        with errors_of_clients():
            params = sampling_params(body)
            requests = [
                Request(
                    prompt=choice.prompt,
                    params=params,
                    max_new_tokens=max_new_tokens,
                    stop=stops,
                    stop_ids=stop_ids,
                    eos_ids=frozenset() if body.ignore_eos else frozenset(tokenizer.eos_ids),
                    top=top,
                    repeat=choice.index % count,
                    salt=body.cache_salt or "",
                    adapter=served.adapter,
                )
                for choice in self.choices
            ]
            served.engine.check(*requests)
            try:
                for choice, request in zip(self.choices, requests, strict=True):
                    self._keys[choice.index] = served.engine.submit(request, self._sink(choice.index), checked=True)
            except BaseException:
                self._cancel()
                raise
        self._timer = self._loop.call_later(limits.seconds, self._inbox.put, None)

    def _sink(self, index: int) -> Callable[[Delta], None]:
        mailbox = _mailboxes.setdefault(self._loop, Mailbox())
        loop, receive = self._loop, self._inbox.put
        return lambda delta: mailbox.put(loop, receive, (index, delta))

    async def events(self) -> AsyncGenerator[list[tuple[Choice, Delta]]]:
        """Tokens as they come, those of one turn together. Leaving the loop early cancels what has not ended.

        Raises:
            ApiError: the request took too long, or one of its samples failed.
        """
        try:
            while self._keys:
                tokens, problem = [], None
                for taken in await self._inbox.take():
                    problem = self._failure(taken)
                    if taken is None or problem is not None:
                        break
                    tokens.append(self._note(*taken))
                    if not self._keys:  # all is here: what comes behind it, such as the end of the time, is nothing
                        break
                if tokens:
                    yield tokens
                if problem is not None:
                    raise problem
        finally:
            self.close()

    def _failure(self, taken: tuple[int, Delta] | None) -> ApiError | None:
        if taken is None:
            return too_late()
        return None if taken[1].error is None else ApiError(500, taken[1].error, code="generation_failed")

    def _note(self, index: int, delta: Delta) -> tuple[Choice, Delta]:
        """Count a token."""
        choice = self.choices[index]
        if index in self._firsts and not choice.deltas:
            self._cached += delta.cached_tokens
        self._written += delta.token is not None
        choice.deltas.append(delta)
        if delta.finish_reason is not None:
            del self._keys[index]
        return choice, delta

    def close(self) -> None:
        """Cancel what has not ended."""
        self._timer.cancel()
        self._cancel()

    def _cancel(self) -> None:
        for key in self._keys.values():
            self.served.engine.cancel(key)
        self._keys = {}

    def usage(self) -> dict[str, Any]:
        """Tokens of all choices so far; a prompt counts once, however often it was sampled."""
        return usage(self._read, self._written, self._cached)


@contextlib.contextmanager
def errors_of_clients() -> Iterator[None]:
    """Within it, errors of the engine and of arguments become answers to the client."""
    try:
        yield
    except QueueFullError as error:
        raise ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"}) from None
    except EngineDeadError as error:
        raise ApiError(503, str(error), code="unavailable", headers={"Retry-After": "10"}) from None
    except CapacityError as error:
        raise ApiError(400, str(error), code="context_length_exceeded") from None
    except (HyaenaError, RecursionError, UnicodeError) as error:
        raise ApiError(400, str(error)) from None


def too_late() -> ApiError:
    """The answer to a request that has taken longer than ``Limits.seconds``."""
    return ApiError(408, "the request took longer than the server allows", code="timeout")


def sampling_params(body: GenerationBody) -> SamplingParams:
    """How tokens are chosen; temperature is 1 and top_p 1 where the client says nothing, as in the API.

    Raises:
        InputError: a value that is out of range.
    """
    bias: dict[int, float] = {}
    for name, value in (body.logit_bias or {}).items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise InputError('the keys of logit_bias are token ids, such as "42"')
        bias[int(name)] = value
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        seed=body.seed,
        logit_bias=bias,
        allowed_tokens=body.allowed_token_ids,
    )


async def aside(size: int, work: Callable[[], T]) -> T:
    """Do something with a text of so many characters or ids; a long one in another thread, while streams go on.

    The errors of the engine and of arguments become answers to the client.
    """
    with errors_of_clients():
        return work() if size < LONG else await asyncio.get_running_loop().run_in_executor(_texts, work)


async def encode_all(served: Served, given: Sequence[Any], *, add_special_tokens: bool = True) -> list[list[int]]:
    """The ids of texts, of which some may be ids already."""
    encode = served.tokenizer.encode
    return await aside(
        sum(map(len, given)),
        lambda: [
            encode(one, add_special_tokens=add_special_tokens) if isinstance(one, str) else list(one) for one in given
        ],
    )


async def completion_prompts(served: Served, body: CompletionBody) -> list[list[int]]:
    """The ids of all prompts of a body."""
    return await encode_all(served, as_prompts(body.prompt), add_special_tokens=body.add_special_tokens)


async def chat_prompt(served: Served, messages: Sequence[Any]) -> list[int]:
    """The ids of a conversation.

    Raises:
        ApiError: the model has no chat template, or its template does not take the messages.
    """
    if served.template is None:
        raise ApiError(
            400,
            f"{served.name} has no chat template, so it takes no conversations: use /v1/completions, or start the "
            "server with --chat-template",
            code="no_chat_template",
        )
    template, said = served.template, [{"role": message.role, "content": message.text} for message in messages]
    length = sum(len(message["content"]) for message in said)
    return await aside(length, lambda: template.encode(served.tokenizer, said))


def new_tokens(
    served: Served, body: GenerationBody, prompts: Sequence[Sequence[int]], limits: Limits, default: int
) -> int:
    """How many tokens a completion may have.

    Raises:
        ApiError: more than the server allows.
    """
    wanted = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        wanted = body.max_completion_tokens
    longest = max(map(len, prompts))
    if wanted is None:
        return max(1, min(default, limits.new_tokens, served.engine.max_length - longest))
    if wanted > limits.new_tokens:
        raise ApiError(
            400, f"max_tokens is {wanted}, and the server allows {limits.new_tokens}: ask for fewer", param="max_tokens"
        )
    if wanted == 0 and not (isinstance(body, CompletionBody) and body.echo):
        raise ApiError(400, "max_tokens must be at least 1, or echo true", param="max_tokens")
    return wanted


# --- log-probabilities in the two forms of the API -------------------------------------------------------------------


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that is no text of its own as its bytes, ``bytes:\\xe2``."""
    name = next((name for name, number in tokenizer.special_tokens.items() if number == token), None)
    if name is not None:
        return name
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return logprob if math.isfinite(logprob) else MIN_LOGPROB


@dataclass(frozen=True)
class TokenInfo:
    """A token, its log-probability (None where nothing predicts it) and the most probable ones in its place."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def infos(deltas: Sequence[Delta]) -> Iterator[TokenInfo]:
    """The tokens of a choice."""
    return (TokenInfo(delta.token, delta.logprob, delta.top) for delta in deltas if delta.token is not None)


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[TokenInfo], offset: int = 0, *, with_ids: bool = False
) -> tuple[dict[str, Any], int]:
    """The form of /v1/completions, and the number of characters up to its end; ``offset``: those before its start.

    ``with_ids`` adds ``top_token_ids``, which has an id for every text in ``top_logprobs``.
    """
    texts, values, offsets, tops, ids = [], [], [], [], []
    for info in tokens:
        text = token_text(tokenizer, info.token)
        texts.append(text)
        offsets.append(offset)
        offset += len(tokenizer.token_bytes(info.token).decode(errors="replace"))
        if info.logprob is None:
            for column in (values, tops, ids):
                column.append(None)
            continue
        named = {token_text(tokenizer, token): (token, logprob) for token, logprob in reversed(info.top)}
        named[text] = (info.token, info.logprob)
        values.append(finite(info.logprob))
        tops.append({name: finite(logprob) for name, (_, logprob) in named.items()})
        ids.append({name: token for name, (token, _) in named.items()})
    made = {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
    return made | ({"top_token_ids": ids} if with_ids else {}), offset


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
    """The form of /v1/chat/completions."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        data = list(tokenizer.token_bytes(token))
        return {"token": token_text(tokenizer, token), "logprob": finite(logprob or 0.0), "bytes": data}

    return {
        "content": [
            entry(info.token, info.logprob) | {"top_logprobs": [entry(*pair) for pair in info.top]} for info in tokens
        ]
    }


def new_id(prefix: str) -> str:
    """A name for an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"
