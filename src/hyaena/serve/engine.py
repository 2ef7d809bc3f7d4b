"""The engine: one thread that plans, reads, decodes and hands every token to the request that it belongs to."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeVar

from hyaena.adapters import Adapter, with_adapter
from hyaena.arguments import require_ids
from hyaena.decoding import Decoding, resolve_decoding
from hyaena.errors import CapacityError, HyaenaError, InputError, NonFiniteError, counted, printable
from hyaena.generation.chunks import choose_chunk
from hyaena.generation.loop import FinishReason, Row
from hyaena.generation.nonfinite import remedy
from hyaena.generation.stop_strings import StopStringFilter
from hyaena.model import StripedHyena
from hyaena.ops import PAGE
from hyaena.sampling import SamplingParams
from hyaena.serve.metrics import Metrics
from hyaena.serve.runner import Chosen, Runner
from hyaena.serve.scheduler import Scheduler
from hyaena.serve.work import Steps, WorkQueue
from hyaena.sizes import ModelSizes
from hyaena.tokenizers import Tokenizer

log = logging.getLogger(__name__)
T = TypeVar("T")


class QueueFullError(HyaenaError, RuntimeError):
    """More requests are waiting than the engine takes: try again later."""


class EngineDeadError(HyaenaError, RuntimeError):
    """The engine has stopped and takes no requests."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine uses its machine.

    Attributes:
        kv_bytes: memory for keys and values; None for half of the memory that is free.
        snapshot_bytes: memory for the states of the prefix cache; 0 turns it off.
        max_rows: requests that are read or decoded at a time.
        max_waiting: requests that may wait beside them.
        chunk: the most tokens that one pass over prompts reads; chosen by the device unless given.
        decoding: how steps are evaluated.
        deterministic: a request's numbers are bitwise the same alone, in a batch, chunked, after pre-emption and where
            the prefix cache spared it tokens. Prompts are read alone and rows are decoded alone, so it is slow.
    """

    kv_bytes: int | None = None
    snapshot_bytes: int = 256 * 2**20
    max_rows: int = 64
    max_waiting: int = 256
    chunk: int | None = None
    decoding: Decoding = "auto"
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be generated, as ids.

    Attributes:
        prompt: token ids, at least one; a list is not copied, and must stay as it is.
        params: how tokens are chosen.
        max_new_tokens: the most tokens of the completion.
        stop: strings that end it.
        stop_ids: tokens that end it with finish_reason ``"stop"``.
        eos_ids: tokens that end it with finish_reason ``"eos"``.
        top: how many of the most probable tokens to report.
        repeat: how many requests of the same call have the same prompt and come before it.
        salt: requests with other salts share no prefixes.
        adapter: the name of the adapter that it is computed with; "" for the model alone.
    """

    prompt: Sequence[int]
    params: SamplingParams
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    eos_ids: frozenset[int] = frozenset()
    top: int = 0
    repeat: int = 0
    salt: str = ""
    adapter: str = ""


class Delta(NamedTuple):
    """One token of a request, or its end by an error.

    Attributes:
        token: its id; None where the request ended by an error or was stopped with the engine.
        text: what can be shown now.
        logprob, top: see ``generation.Event``.
        finish_reason: set on the last one.
        cached_tokens: tokens of the prompt that the prefix cache spared.
        error: why the request ended without a result, or None.
    """

    token: int | None
    text: str = ""
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | Literal["error", "cancelled"] | None = None
    cached_tokens: int = 0
    error: str | None = None


Sink = Callable[[Delta], None]


@dataclass(eq=False)
class _Active:
    """A request in the engine."""

    key: int
    row: Row
    request: Request
    sink: Sink
    arrived: float = field(default_factory=time.monotonic)
    last_token: float = 0.0


class Engine:
    """Generates for many requests at a time. Its methods may be called from any thread.

    Args:
        model: on its device.
        tokenizer: of the model.
        settings: how the machine is used.
        metrics: what is counted.
        adapters: by the names that requests have for them. All are computed over the weights of the model, and their
            requests share its pages.

    Raises:
        CapacityError: there is no memory for a single page.
        CheckpointError: an adapter does not fit the model.
    """

    def __init__(
        self,
        model: StripedHyena,
        tokenizer: Tokenizer,
        settings: EngineSettings | None = None,
        metrics: Metrics | None = None,
        adapters: Mapping[str, Adapter] = MappingProxyType({}),
    ) -> None:
        settings = settings or EngineSettings()
        self.tokenizer, self.settings = tokenizer, settings
        self.models = {"": model} | {name: with_adapter(model, adapter) for name, adapter in adapters.items()}
        self.metrics = metrics or Metrics()
        sizes, itemsize = ModelSizes(model.config), model.dtype.itemsize
        self.state_bytes = sizes.state_bytes(itemsize)
        self.max_length = model.config.max_length or DEFAULT_MAX_LENGTH
        pages = _count_pages(model, settings, sizes.page_bytes(PAGE, model.cache_dtype.itemsize))
        self.max_length = min(self.max_length, pages * PAGE)
        chunk = settings.chunk or choose_chunk(model, pages * PAGE)
        self.scheduler = Scheduler(
            pages=pages,
            page_size=PAGE,
            max_rows=settings.max_rows,
            chunk=max(PAGE, chunk // PAGE * PAGE),
            max_snapshots=settings.snapshot_bytes // max(1, self.state_bytes),
            fixed_passes=settings.deterministic,
            packed=all(getattr(layer.mixer, "packs", False) for layer in model.layers),
        )
        self.runner = Runner(
            self.models,
            pages=pages,
            max_rows=settings.max_rows,
            max_length=self.max_length,
            decoding="eager" if settings.deterministic else resolve_decoding(model, settings.decoding, "auto"),
            isolated=settings.deterministic,
        )
        self._requests: dict[int, _Active] = {}
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._keys = itertools.count()
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._waiting = 0  # submitted and not yet taken by the thread
        self._work = WorkQueue()
        self._worked = False  # whether a step of it came last
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="hyaena-engine", daemon=True)

    # --- from any thread -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def model(self) -> StripedHyena:
        """The model without an adapter."""
        return self.models[""]

    @property
    def chunk(self) -> int:
        """The most tokens of one pass over prompts."""
        return self.scheduler.chunk

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests."""
        return self._thread.is_alive() and self._failure is None and not self._stopping.is_set()

    @property
    def stopped(self) -> bool:
        """Whether nothing is computed any more."""
        return not self._thread.is_alive()

    def check(self, *requests: Request) -> None:
        """Refuse requests that could never be served. Prompts and parameters that they share are checked once.

        Raises:
            InputError: no prompt, ids outside the vocabulary, biases that leave no token, or an unknown adapter.
            CapacityError: more tokens than the model or the memory takes.
        """
        size, seen = self.model.config.vocab_size, set()
        for request in requests:
            prompt, params = request.prompt, request.params
            if request.adapter not in self.models:
                raise InputError(f"the engine has no adapter {printable(request.adapter)}: give it to the engine")
            if not prompt:
                raise InputError("the prompt is empty: give it at least one token")
            if len(prompt) + request.max_new_tokens > self.max_length:
                raise CapacityError(
                    f"{counted(len(prompt), 'token')} of prompt and {request.max_new_tokens} new ones are more than "
                    f"the {self.max_length} that a request may have: shorten the prompt, or ask for fewer new tokens"
                )
            if id(prompt) not in seen:
                require_ids(prompt, size)
            if params.biased and id(params) not in seen:
                params.bias(size)
            seen |= {id(prompt), id(params)}
            self.scheduler.check(len(prompt), request.max_new_tokens)

    def submit(self, request: Request, sink: Sink, *, checked: bool = False) -> int:
        """Queue a request; its key. The sink is called in the engine's thread and must not wait.

        Args:
            request: to be queued.
            sink: called with every token.
            checked: ``check`` has seen it.

        Raises:
            InputError, CapacityError: see ``check``.
            QueueFullError: too many requests are waiting.
            EngineDeadError: the engine has stopped.
        """
        if not checked:
            self.check(request)
        prompt = request.prompt if isinstance(request.prompt, list) else list(request.prompt)
        row = Row(
            index=0,
            prompt=prompt,
            params=request.params,
            text=StopStringFilter(self.tokenizer, prompt, request.stop),
            eos_ids=request.eos_ids,
            stop_ids=request.stop_ids,
            max_new_tokens=request.max_new_tokens,
            repeat=request.repeat,
        )
        with self._lock:
            if not self.alive:
                raise EngineDeadError("the engine has stopped: restart the server")
            if self._waiting + self.scheduler.waiting >= self.settings.max_waiting:
                raise QueueFullError(f"{self.settings.max_waiting} requests are waiting already: try again later")
            self._waiting += 1
            active = _Active(next(self._keys), row, request, sink)
            self._commands.put(lambda: self._add(active))
        return active.key

    def cancel(self, key: int) -> None:
        """End a request whose tokens nobody wants any more."""
        self._commands.put(lambda: self._cancel(key))

    def pause(self, key: int) -> None:
        """Take the row and the pages of a request until it is resumed: its client does not read what is there."""
        self._commands.put(lambda: self._pause(key))

    def resume(self, key: int) -> None:
        """Go on with a request that is paused."""
        self._commands.put(lambda: self._resume(key))

    def call(self, steps: Steps[T]) -> Future[T]:
        """Do something else with the model, in the engine's thread: so many steps at a time as read a chunk of tokens.

        Between them streams go on. A future that is cancelled ends the work at its next step.

        Raises:
            QueueFullError: too much is waiting.
            EngineDeadError: the engine has stopped.
        """
        with self._lock:
            if not self.alive:
                raise EngineDeadError("the engine has stopped: restart the server")
            if len(self._work) >= self.settings.max_waiting:
                raise QueueFullError(f"{len(self._work)} requests are waiting already: try again later")
            future = self._work.put(steps)
            self._commands.put(lambda: None)  # wakes the thread
        return future

    def stop(self, timeout: float | None = None, abandon: float | None = None) -> bool:
        """Take no more requests, finish those that are here, and stop.

        Args:
            timeout: seconds after which requests that have not ended get an error; None waits for them.
            abandon: seconds to wait after that for the turn that is being computed; None waits for its end.

        Returns:
            Whether all requests ended within the timeout.
        """
        self._stopping.set()
        self._commands.put(lambda: None)
        if self._thread.ident is None:  # it was never started
            return True
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        self._commands.put(self._abandon)
        self._thread.join(abandon)
        return False

    # --- in the engine's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._take_commands()
                if self._idle:
                    if self._finished:
                        break
                    continue
                # Other work and prompts are read in turns, so that streams wait for one chunk of either.
                self._worked = bool(self._work) and (self.scheduler.idle or not self._worked)
                if self._worked:
                    self._work.advance(self.scheduler.chunk)
                if not self.scheduler.idle:
                    self._turn(read=not self._worked)
        except BaseException as error:
            self._failure = error
            log.exception("the engine has failed")
        finally:
            with self._lock:
                self._stopping.set()
            self._take_commands(wait=False)
            message = "the engine has failed" if self._failure else "the server is stopping"
            for active in list(self._requests.values()):
                self._end(active, Delta(token=None, finish_reason="error", error=message))
            self._work.give_up(EngineDeadError(message))
            self.runner.close()

    @property
    def _idle(self) -> bool:
        return self.scheduler.idle and not self._work

    @property
    def _finished(self) -> bool:
        """Whether the thread may end; requests that are paused go on, or are given up, when they are told to."""
        return self._stopping.is_set() and not self._requests

    def _take_commands(self, wait: bool = True) -> None:
        """Carry out the commands of other threads; where there is nothing else to do, wait for one."""
        if wait and self._idle and not self._finished:
            self.metrics.observe_load(self)
            self._commands.get()()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _add(self, active: _Active) -> None:
        with self._lock:
            self._waiting -= 1
        self._requests[active.key] = active
        row, request = active.row, active.request
        self.scheduler.add(active.key, row.prompt, row.max_new_tokens, request.salt, request.adapter)
        self.metrics.observe_load(self)

    def _cancel(self, key: int) -> None:
        active = self._requests.get(key)
        if active is not None:
            self._end(active, Delta(token=None, finish_reason="cancelled"), self.runner.page_ends().get(key))

    def _pause(self, key: int) -> None:
        if key in self._requests:
            self.scheduler.pause(key, self.runner.page_ends().get(key))

    def _resume(self, key: int) -> None:
        if key in self._requests:
            self.scheduler.resume(key)

    def _abandon(self) -> None:
        for active in list(self._requests.values()):
            self._fail(active, "the server is stopping")
        self._work.give_up(EngineDeadError("the server is stopping"))

    def _turn(self, read: bool) -> None:
        scheduler, requests = self.scheduler, self._requests
        plan = scheduler.plan(self.runner.page_ends(), read=read)
        top = max((requests[key].request.top for key in scheduler.running_keys), default=0)
        rows = {read.key: requests[read.key].row for read in plan.reads}
        chosen = self.runner.run(plan, rows, top)
        scheduler.done(plan)
        self._deliver(chosen)
        if not plan.steps_only:
            self.metrics.observe_load(self)
        if not plan.reads:
            self.runner.prepare()

    def _deliver(self, chosen: Sequence[tuple[int, Chosen]]) -> None:
        """Hand tokens to their requests, and count them together; requests that end see what was counted."""
        now = time.monotonic()
        waits: dict[tuple[float, bool, str], int] = {}
        ended: dict[int, tuple[_Active, Delta]] = {}
        for key, token in chosen:
            active = self._requests.get(key)
            if active is None or key in ended:  # it ended while its step was computed
                continue
            delta = self._take(active, token, now)
            if delta is None:
                continue
            wait = now - (active.last_token or active.arrived), not active.last_token, active.request.adapter
            waits[wait] = waits.get(wait, 0) + 1
            active.last_token = now
            if delta.finish_reason is None:
                _call(active.sink, delta)
            else:
                ended[key] = active, delta
        for (seconds, first, adapter), count in waits.items():
            self.metrics.tokens(count, seconds, first=first, adapter=adapter)
        page_ends = self.runner.page_ends() if ended else {}
        for active, delta in ended.values():
            self._end(active, delta, page_ends.get(active.key))

    def _take(self, active: _Active, chosen: Chosen, now: float) -> Delta | None:
        """Add a token to its request; None where the request failed."""
        try:
            if not chosen.finite:
                model = self.models[active.request.adapter]
                raise NonFiniteError(f"the model produced NaN or infinity for this prompt: {remedy(model)}")
            text, reason = active.row.take(chosen.token, now)
        except HyaenaError as error:  # of this request alone, such as a token that the tokenizer does not know
            self._fail(active, str(error))
            return None
        job = self.scheduler.append(active.key, chosen.token)
        top = chosen.top[: active.request.top] if chosen.top else ()
        return Delta(chosen.token, text, chosen.logprob, top, reason, job.cached or 0)

    def _fail(self, active: _Active, message: str) -> None:
        self._end(active, Delta(token=None, finish_reason="error", error=message))

    def _end(self, active: _Active, delta: Delta, page_end: int | None = None) -> None:
        job = self.scheduler.jobs.get(active.key)
        if self._failure is None:  # else nothing is known of rows and pages
            self.scheduler.finish(active.key, page_end)
        del self._requests[active.key]
        self.metrics.finished(
            delta.finish_reason or "error",
            prompt=len(active.row.prompt),
            cached=None if job is None else job.cached,
            seconds=time.monotonic() - active.arrived,
            adapter=active.request.adapter,
        )
        self.metrics.observe_load(self)  # a client that has its answer sees it
        _call(active.sink, delta)


def _call(sink: Sink, delta: Delta) -> None:
    """Hand a token over; a receiver that fails ends nobody else's request."""
    try:
        sink(delta)
    except Exception:
        log.exception("the receiver of a request failed")


DEFAULT_MAX_LENGTH = 131_072
"""Tokens of a request with a model that has no limit of its own."""

DEFAULT_KV_BYTES = 2**30
"""Memory for keys and values on a CPU."""

MEMORY_FRACTION = 0.5
"""Of the memory of a CUDA device that is free after loading, for keys and values; the rest is for passes."""


def _count_pages(model: StripedHyena, settings: EngineSettings, page_bytes: int) -> int:
    """The pages that the memory for keys and values holds.

    Raises:
        CapacityError: not even one.
    """
    import torch

    budget = settings.kv_bytes
    if budget is None and model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
        budget = int(MEMORY_FRACTION * (free - settings.snapshot_bytes))
    pages = (DEFAULT_KV_BYTES if budget is None else budget) // max(1, page_bytes)
    if pages < 1:
        raise CapacityError(f"a page of keys and values takes {page_bytes:,} bytes: allow more memory for them")
    return pages
