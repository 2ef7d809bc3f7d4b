"""From a checked request to the engine and back to what the client receives."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

from hyaena.arguments import require_ids
from hyaena.errors import CapacityError, HyaenaError, InputError
from hyaena.generation.settings import repeats
from hyaena.model import StripedHyena
from hyaena.sampling import SamplingParams
from hyaena.serve.conversation import ChatTemplate
from hyaena.serve.delivery import Delivery
from hyaena.serve.engine import Delta, Engine, EngineDeadError, QueueFullError, Request
from hyaena.serve.protocol import ApiError, ChatBody, CompletionBody, GenerationBody, as_prompts, usage
from hyaena.tokenizers import Tokenizer

T = TypeVar("T")

LONG = 2**14
"""Characters or ids from which a text is encoded in another thread: a tokenizer in Python takes milliseconds for it."""

MOST_HELD = 2**14
"""Tokens and reported log-probabilities that wait for the client of a stream; beyond, the engine does others first."""

MOST_WHOLE = 2**19
"""Tokens and reported log-probabilities of an answer that is no stream: some hundred megabytes while it is written."""

_texts = ThreadPoolExecutor(2, thread_name_prefix="hyaena-texts")
"""Two long texts are encoded at a time; others wait, and the streams still get most of the interpreter."""


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
    """What one of the requested samples has come to; a stream keeps no tokens."""

    index: int
    prompt: Sequence[int]
    deltas: list[Delta] = field(default_factory=list)

    @property
    def text(self) -> str:
        return text_of(self.deltas)

    @property
    def finish_reason(self) -> str | None:
        return reason(self.deltas)


Parts = list[tuple[Choice, list[Delta]]]
"""Choices, each with tokens that came together."""


def text_of(deltas: Sequence[Delta]) -> str:
    """What tokens add to a text."""
    return deltas[0].text if len(deltas) == 1 else "".join([delta.text for delta in deltas])


def reason(deltas: Sequence[Delta]) -> str | None:
    """The API's word for why a choice ended with these tokens; "length" for one without any."""
    last = deltas[-1].finish_reason if deltas else "length"
    return "stop" if last == "eos" else last


def make_choices(prompts: Sequence[Sequence[int]], body: GenerationBody) -> list[Choice]:
    """The choices of a body, each prompt sampled ``body.n`` times."""
    count = body.n or 1
    return [Choice(i * count + j, prompt) for i, prompt in enumerate(prompts) for j in range(count)]


class Generation:
    """The requests of one body in the engine.

    Args:
        served: the model.
        prompts: token ids, each sampled ``body.n`` times.
        body: of the client, checked.
        top: how many alternatives are reported.
        limits: of the server.
        delivery: of the event loop that runs.
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
        delivery: Delivery,
        max_new_tokens: int,
    ) -> None:
        self.served = served
        self.choices = make_choices(prompts, body)
        self._problem: ApiError | None = None  # that ends it, behind the tokens that are here
        self._written = 0  # tokens
        firsts = {id(choice.prompt): choice for choice in reversed(self.choices)}.values()  # of every prompt
        self._firsts = {choice.index for choice in firsts}  # that have not begun
        self._kept = not body.stream
        self._most = MOST_HELD // (1 + top)
        self._paused: set[int] = set()  # choices that have no row until the client reads
        self._pausing = threading.Lock()
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
            require_ids(body.stop_token_ids or (), served.model.config.vocab_size, "stop_token_ids: ")
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
                    repeat=repeat,
                    salt=body.cache_salt or "",
                    adapter=served.adapter,
                )
                for choice, repeat in zip(self.choices, chain(*repeats(prompts, body.n or 1)), strict=True)
            ]
            served.engine.check(*requests)
            self._delivery = delivery
            self._inbox = delivery.open(paced=bool(body.stream))  # of (choice, token), or what ends all
            try:
                for choice, request in zip(self.choices, requests, strict=True):
                    self._keys[choice.index] = served.engine.submit(request, self._sink(choice.index), checked=True)
            except BaseException:
                self._leave()
                raise
        self._timer = delivery.loop.call_later(limits.seconds, lambda: self.fail(too_late()))

    def _sink(self, index: int) -> Callable[[Delta], None]:
        """Return what hands over the tokens of a choice; the first one of a stream and the last one immediately."""
        put, inbox = self._delivery.put, self._inbox
        urgent = inbox.paced

        def sink(delta: Delta) -> None:
            nonlocal urgent
            put(inbox, (index, delta), urgent=urgent or delta.finish_reason is not None)
            urgent = False
            if inbox.paced and len(inbox.items) >= self._most:
                self._pause(index)

        return sink

    def _pause(self, index: int) -> None:
        """Have the engine pause a choice, unless the client has read meanwhile; in the engine's thread."""
        with self._pausing:
            key = self._keys.get(index)
            if key is not None and len(self._inbox.items) >= self._most:
                self._paused.add(index)
                self.served.engine.pause(key)

    def _resume(self) -> None:
        """Have the engine go on with what is paused, where the client has read half of what it held up."""
        with self._pausing:
            if self._paused and len(self._inbox.items) <= self._most // 2:
                for key in [self._keys[index] for index in self._paused if index in self._keys]:
                    self.served.engine.resume(key)
                self._paused.clear()

    def fail(self, error: ApiError) -> None:
        """End it with an error, behind the tokens that are here."""
        self._delivery.put(self._inbox, error, urgent=True)

    async def next(self) -> Parts:
        """Tokens that have come: the choices of which there are some, each with those that came together.

        With an interval of 0 they come one by one. Nothing comes when all choices have ended.

        Raises:
            ApiError: one of its samples failed, or what ``fail`` was called with.
        """
        if self._problem is not None:
            raise self._problem
        if not self._keys:
            return []
        came: dict[int, tuple[Choice, list[Delta]]] = {}
        items = await self._inbox.take()
        self._resume()
        for taken in items:
            self._problem = _problem(taken)
            if self._problem is not None:
                break
            index, delta = taken
            self._note(index, delta)
            part = index if self._delivery.interval else len(came)
            if part not in came:
                came[part] = self.choices[index], []
            came[part][1].append(delta)
            if not self._keys:  # all is here: what comes behind it, such as the end of the time, is nothing
                break
        if self._problem is not None and not came:
            raise self._problem
        return list(came.values())

    def _note(self, index: int, delta: Delta) -> None:
        """Count a token."""
        if index in self._firsts:
            self._firsts.remove(index)
            self._cached += delta.cached_tokens
        self._written += delta.token is not None
        if self._kept:
            self.choices[index].deltas.append(delta)
        if delta.finish_reason is not None:
            del self._keys[index]

    def close(self) -> None:
        """Cancel what has not ended."""
        self._timer.cancel()
        self._leave()

    def _leave(self) -> None:
        self._delivery.close(self._inbox)
        for key in self._keys.values():
            self.served.engine.cancel(key)
        self._keys = {}

    def usage(self) -> dict[str, Any]:
        """Tokens of all choices so far; a prompt counts once, however often it was sampled."""
        return usage(self._read, self._written, self._cached)


def _problem(taken: tuple[int, Delta] | ApiError) -> ApiError | None:
    """Why a generation ends with what has come, if it does not end well."""
    if isinstance(taken, ApiError):
        return taken
    error = taken[1].error
    return None if error is None else ApiError(500, error, code="generation_failed")


class Unwritten:
    """A body that wants no new token, in the form of a generation: it ends as it begins.

    Args:
        prompts, body: see ``Generation``.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], body: GenerationBody) -> None:
        self.choices = make_choices(prompts, body)
        self._parts: Parts = [(choice, []) for choice in self.choices]
        self._read = sum(map(len, prompts))

    async def next(self) -> Parts:
        """Every choice, without tokens; then nothing."""
        parts, self._parts = self._parts, []
        return parts

    def fail(self, error: ApiError) -> None:
        """Nothing runs that could."""

    def close(self) -> None:
        """Nothing runs that would have to be cancelled."""

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompts."""
        return usage(self._read, 0, 0)


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
        if int(name) in bias:
            raise InputError(f"logit_bias names the token {int(name)} twice: leave one of them out")
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
    served: Served, body: GenerationBody, prompts: Sequence[Sequence[int]], *, top: int, limits: Limits, default: int
) -> int:
    """How many tokens a completion may have.

    Args:
        served: the model.
        prompts: of the body.
        body: of the client.
        top: how many alternatives of each token are reported.
        limits: of the server.
        default: where the client names no number.

    Raises:
        ApiError: more than the server allows.
    """
    wanted = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        wanted = body.max_completion_tokens
    longest, count = max(map(len, prompts)), len(prompts) * (body.n or 1)
    whole = limits.new_tokens if body.stream else MOST_WHOLE // (count * (1 + top))
    if wanted is None:
        return max(1, min(default, limits.new_tokens, whole, served.engine.max_length - longest))
    if wanted > limits.new_tokens:
        raise ApiError(
            400, f"max_tokens is {wanted}, and the server allows {limits.new_tokens}: ask for fewer", param="max_tokens"
        )
    if wanted > whole:
        raise ApiError(
            400,
            f"{count} completions of {wanted} tokens with {top} alternatives each are too long for one answer: ask for "
            f"at most {whole} tokens of each, for fewer samples or alternatives, or for a stream",
            param="max_tokens",
        )
    if wanted == 0 and not (isinstance(body, CompletionBody) and body.echo):
        also = ", or echo true" if isinstance(body, CompletionBody) else ""
        raise ApiError(400, f"max_tokens must be at least 1{also}", param="max_tokens")
    return wanted


def new_id(prefix: str) -> str:
    """A name for an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"
