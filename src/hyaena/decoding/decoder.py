"""Decoding without waiting: a step reads its tokens from the device, leaves the next ones there, and is captured.

On a CUDA device a step is captured once per bucket of rows (1, 2, 4, 8, …) and then replayed as one graph, so that no
step costs the host more than a launch. Rows join and leave between steps.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hyaena import ops
from hyaena.arguments import kind_of, whole
from hyaena.cache import Cache, StateSnapshot
from hyaena.decoding.capture import capture
from hyaena.decoding.parts import Parts
from hyaena.decoding.sampler import GraphSampler, StepOutput, move_rows
from hyaena.decoding.static_cache import StaticCache
from hyaena.errors import CapacityError, InputError, UnsupportedError
from hyaena.model import StripedHyena, uncompiled
from hyaena.ops import PAGE, PageTable, StepContext, cpu, pages_for, triton
from hyaena.ops.backend import log_once
from hyaena.ops.step import DecodeOperators
from hyaena.sampling import SamplingFeatures, SamplingParams

Decoding = Literal["auto", "eager", "static", "compiled", "cuda_graph"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a captured graph depends on.

    Attributes:
        places: rows that it computes, a power of two.
        positions: the most tokens of any row.
        features: of sampling.
        top: most probable tokens that it reports.
        seen: whether it records which tokens occurred.
    """

    places: int
    positions: int
    features: SamplingFeatures
    top: int
    seen: bool


@dataclasses.dataclass(frozen=True)
class Graph:
    """A captured step and the tensor that it leaves its outputs in."""

    shape: Shape
    graph: torch.cuda.CUDAGraph
    packed: Tensor

    def replay(self, shape: Shape) -> Tensor:
        """Run the step again. A graph of another shape would read and write memory that is not its own."""
        if shape != self.shape:
            raise AssertionError(f"a graph captured for {self.shape} was to be replayed for {shape}")
        self.graph.replay()
        return self.packed


class Decoder:
    """Decodes the rows that were added to it, all of them one token per step.

    ``add`` takes rows whose prompts were read into a cache, ``launch`` starts a step, ``fetch`` waits for the oldest
    step that was not fetched, ``keep`` drops rows. A finished row may stay (its tokens mean nothing): ``retire``
    marks it, so that its limit no longer counts.

    Rows on pages need a page for each token that they read, before the step that reads it is launched: ``extend`` adds
    pages. The pages of a row that was retired are free for their owner to reuse: nothing that is launched afterwards
    touches them, and what was launched before comes first on the stream.

    Args:
        model: of all rows.
        max_rows: the most rows; a power of two is used.
        top: how many of the most probable tokens to report.
        cuda_graph: capture steps as CUDA graphs; otherwise the same code runs each time.
        operators: what a step computes with; chosen by the device unless given.

    Raises:
        UnsupportedError: the model has parts that a step would not call, or the device no graphs.
    """

    def __init__(
        self,
        model: StripedHyena,
        max_rows: int,
        *,
        top: int = 0,
        cuda_graph: bool = False,
        operators: DecodeOperators | None = None,
    ) -> None:
        model = uncompiled(model)
        self.model = model
        self.cuda_graph = cuda_graph
        self._check_model()
        self.parts = Parts(model)
        self.operators = operators or choose_operators(model)
        places = _bucket(whole("max_rows", max_rows, "a whole number, 1 or more", 1))
        top = whole("top", top, f"a whole number from 0 to {model.config.vocab_size}", 0, model.config.vocab_size)
        with torch.inference_mode():
            self.static = StaticCache(model, places)
            self.sampler = GraphSampler(places, model.config.vocab_size, top=top, device=model.device)
            self.ids = torch.zeros(places, dtype=torch.int64, device=model.device)
        self.retired: set[int] = set()
        self._broken_off = False  # a step has raised
        self.graphs: dict[Shape, Graph] = {}
        self.steps: dict[tuple[int, bool], Callable[[], Tensor]] = {}  # by places and greedy, as operators take them
        # The greedy ones that were recorded, by rows, and where they leave their outputs: they call nothing of torch.
        self.repeated: dict[int, tuple[Callable[[], Tensor], np.ndarray[Any, Any]]] = {}
        self.pending: deque[Callable[[], StepOutput]] = deque()

    @property
    def rows(self) -> int:
        return self.static.rows

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds, those of launched steps included."""
        return self.static.lengths

    @torch.inference_mode()
    def add(
        self,
        cache: Cache,
        ids: Tensor,
        params: Sequence[SamplingParams],
        generators: Sequence[torch.Generator],
        *,
        seen: Tensor | None = None,
    ) -> None:
        """Append the rows of a cache, which is empty afterwards. Everything launched must have been fetched.

        Args:
            cache: prompts, read; with a maximum length.
            ids: int [rows], the token that each row goes on from.
            params, generators: of each row.
            seen: bool [rows,V], the tokens that occurred, where a repetition penalty needs them.

        Raises:
            InputError: ids, seen tokens or parameters that do not fit, or a cache of another model, of another dtype
                than the rows before, or without maximum length. Nothing has changed.
            CapacityError: more rows than ``max_rows``.
        """
        self._check_idle()
        self._check_rows(cache, ids, params, generators, seen)
        start = self.rows
        positions = self.static.positions
        self.static.add(cache)
        self.sampler.add(params, generators, seen)
        self.ids[start : self.rows] = ids.to(self.ids.device)
        if self.static.positions != positions:
            self._forget()  # what reads the rotary table of fewer positions

    def launch(self) -> None:
        """Start a step; on a CUDA device, without waiting for it. A model that was changed is read as it is now.

        Raises:
            CapacityError: a row that is not retired has reached its limit; nothing was started.
            UnsupportedError: the model was changed, and has parts now that a step would not call.
            InputError: there are no rows, or an earlier step was broken off.
        """
        self._check_whole()
        for row, (length, room) in enumerate(zip(self.static.lengths, self.static.rooms, strict=True)):
            if length >= room and row not in self.retired:
                raise CapacityError(self._full(row))
        if not self.rows:
            raise InputError("the decoder has no rows: add some")
        if not self.parts.unchanged():
            self._read_anew()
        self._broken_off = True
        if self.rows in self.repeated and self.sampler.greedy and self.static.uploaded:
            again, numbers = self.repeated[self.rows]
            again()
            output = StepOutput.unpack(numbers)
            self.pending.append(lambda: output)
        else:
            self._start()
        self._broken_off = False
        self.static.lengths = list(map(min, [length + 1 for length in self.static.lengths], self.static.limits))

    @torch.inference_mode()
    def _start(self) -> None:
        self.static.upload_pages()
        self.sampler.prepare()
        if self.model.device.type == "cuda":
            with torch.cuda.device(self.model.device):  # graphs and kernels go to the current one
                self.pending.append(self._launch())
            return
        output = StepOutput.unpack(self._step(self._shape()))
        self.pending.append(lambda: output)

    def _check_whole(self) -> None:
        """Refuse states of which some are those before a step and some those behind it."""
        if self._broken_off:
            raise InputError(
                "a step was broken off, and has moved some states and not others: drop all rows (keep([])) and add "
                "them again"
            )

    def _check_model(self) -> None:
        reason = self.model.unsupported_reason() or (_no_graphs(self.model) if self.cuda_graph else None)
        if reason is not None:
            raise UnsupportedError(f"static decoding is not possible: {reason}; decode with decoding='eager'")

    def _forget(self) -> None:
        """Let the next steps be recorded and captured again."""
        self.graphs.clear()
        self.steps.clear()
        self.repeated.clear()

    @torch.inference_mode()
    def _read_anew(self) -> None:
        """Take the model as it is now: other weights, another dtype, adapters, hooks."""
        self._check_model()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # graphs that still run are about to go
        self._forget()
        self.static.renew_rotary()
        self.parts = Parts(self.model)

    def _full(self, row: int) -> str:
        length, limit, pages = self.static.lengths[row], self.static.limits[row], self.static.pages[row]
        if length < limit:
            return f"row {row} holds {length} tokens on {len(pages)} pages of {PAGE}: extend it by a page"
        return f"row {row} holds {length} of at most {limit} tokens: make its cache with a larger max_length"

    def _launch(self) -> Callable[[], StepOutput]:
        shape = self._shape()
        if self.cuda_graph:
            if shape not in self.graphs:
                self.graphs[shape] = self._capture(shape)
            packed = self.graphs[shape].replay(shape)
        else:
            packed = self._step(shape)
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True, device="cpu")
        host.copy_(packed, non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def wait() -> StepOutput:
            event.synchronize()
            return StepOutput.unpack(host[: self.rows])

        return wait

    def fetch(self) -> StepOutput:
        """The outputs of the oldest step that was not fetched, of the rows that are here."""
        if not self.pending:
            raise InputError("no step is to be fetched: launch one")
        return self.pending.popleft()()

    @torch.inference_mode()
    def retire(self, row: int) -> None:
        """Say that the tokens of a row no longer matter, so that it may stay although it is full or has no pages."""
        if row not in self.retired:
            self.retired.add(row)
            self.static.retire(row)

    @torch.inference_mode()
    def extend(self, row: int, pages: Sequence[int]) -> None:
        """Add pages behind those of a row; steps that are launched from now on know them.

        Raises:
            InputError: no such row, one that was retired or has no pages, or numbers that are no pages of the pool.
        """
        pool = self.static.pool
        if pool is None or not 0 <= row < self.rows or row in self.retired:
            raise InputError(f"row {row} takes no pages: it is not here, was retired, or has storage of its own")
        self.static.extend(row, pool.check([*self.static.pages[row], *pages])[len(self.static.pages[row]) :])

    def missing_pages(self, row: int, tokens: int) -> int:
        """How many pages a row lacks to hold so many tokens more than now; at most those up to its limit."""
        if self.static.pool is None or row in self.retired:
            return 0
        needed = min(self.static.lengths[row] + tokens, self.static.limits[row])
        return max(0, pages_for(needed) - len(self.static.pages[row]))

    def snapshot_states(self, row: int) -> StateSnapshot:
        """Copy the states of a row as the last step that was launched leaves them, see ``Cache.snapshot_states``."""
        if row in self.retired:
            raise InputError(f"row {row} was retired: take snapshots of rows that still decode")
        self._check_whole()
        return self.static.cache().snapshot_states(row)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in rising order. Everything launched must have been fetched."""
        self._check_idle()
        if list(rows) != sorted(set(rows)) or not all(0 <= row < self.rows for row in rows):
            raise InputError(f"keep takes rows of 0 … {self.rows - 1} in rising order, and was given {list(rows)}")
        self.static.keep(list(rows))
        self.sampler.keep(rows)
        move_rows(self.ids, rows)
        self.retired = {place for place, row in enumerate(rows) if row in self.retired}
        self._broken_off = self._broken_off and self.rows > 0

    def cache(self) -> Cache:
        """An ordinary cache of the rows, over the same storage: valid until the next step."""
        self._check_whole()
        return self.static.cache()

    def _check_rows(
        self,
        cache: Cache,
        ids: Tensor,
        params: Sequence[SamplingParams],
        generators: Sequence[torch.Generator],
        seen: Tensor | None,
    ) -> None:
        rows, vocab = cache.batch_size, self.model.config.vocab_size
        if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"the decoder takes ids as a tensor of integers [rows], and was given {kind_of(ids)}")
        if ids.shape[0] != rows:
            raise InputError(f"the cache holds {rows} rows, and the decoder was given {ids.shape[0]} ids")
        if not len(params) == len(generators) == rows:
            raise InputError(f"{rows} rows, {len(params)} params and {len(generators)} generators: give one per row")
        if ids.device.type == "cpu" and bool(((ids < 0) | (ids >= vocab)).any()):  # elsewhere a look would stall
            raise InputError(f"an id lies outside the vocabulary of {vocab}: use the tokenizer of this model")
        if seen is None and SamplingFeatures.of(params).penalty:
            raise InputError("a repetition penalty needs seen: which tokens were seen in each row")
        for row in params:
            if row.biased:
                row.bias(vocab)
        if seen is not None and seen.shape != (rows, vocab):
            raise InputError(f"seen must be of shape [{rows}, {vocab}], not {list(seen.shape)}")

    def _check_idle(self) -> None:
        if self.pending:
            raise AssertionError("rows join and leave between steps only: fetch what was launched")

    def _step(self, shape: Shape) -> Tensor:
        places, greedy = shape.places, self.sampler.greedy
        if (places, greedy) in self.steps:
            result = self.steps[places, greedy]()
        else:

            def take() -> Tensor:
                return self._take(places, greedy)

            result, again = self.operators.record(take)
            self.steps[places, greedy] = again
            if greedy and again is not take:
                self.repeated[places] = again, result.numpy()
        return result if greedy else self.sampler.sample(result, self.ids[:places], self.operators)

    def _take(self, places: int, greedy: bool) -> Tensor:
        """The logits of a step, or what ``sampler.sample`` returns where that is an operator like the others."""
        logits = self._logits(places)
        return self.operators.argmax(logits, self.ids[:places]) if greedy else logits

    def _logits(self, places: int) -> Tensor:
        static = self.static
        states = [state.first(places) for state in static.states]
        context = StepContext(
            self.operators,
            static.device_lengths[:places],
            static.device_limits[:places],
            static.rotary,
            None if static.device_pages is None else PageTable(static.device_pages[:places], static.pages),
        )
        return self.model.step(self.ids[:places], states, context)

    def _shape(self) -> Shape:
        sampler = self.sampler
        places = _bucket(self.rows) if self.cuda_graph else self.rows
        return Shape(places, self.static.positions, sampler.features, sampler.top, sampler.features.penalty)

    def _capture(self, shape: Shape) -> Graph:
        """Run the step once, which compiles kernels and lets libraries allocate, undo it, and capture it."""
        places = shape.places
        changing = [*self.static.mutated_tensors(places), *self.sampler.mutated_tensors(places), self.ids]
        before = [t.clone() for t in changing]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(shape)
            for tensor, old in zip(changing, before, strict=True):
                tensor.copy_(old)
        torch.cuda.current_stream().wait_stream(stream)
        other = next(iter(self.graphs.values())).graph if self.graphs else None
        graph = torch.cuda.CUDAGraph()
        with capture(graph, other):
            packed = self._step(shape)
        return Graph(shape, graph, packed)


def _bucket(rows: int) -> int:
    """The smallest power of two that is at least ``rows``."""
    return 1 << (max(1, rows) - 1).bit_length()


def make_decoder(
    model: StripedHyena,
    max_rows: int,
    decoding: Decoding,
    *,
    top: int = 0,
    operators: DecodeOperators | None = None,
) -> Decoder:
    """The decoder of a way of decoding that ``resolve_decoding`` returned, other than ``"eager"``; see ``Decoder``."""
    operators = operators or choose_operators(model, compiled=decoding == "compiled")
    return Decoder(model, max_rows, top=top, cuda_graph=decoding == "cuda_graph", operators=operators)


def choose_operators(model: StripedHyena, *, compiled: bool = False) -> DecodeOperators:
    """The kernels on a CUDA device, elsewhere those that are ``compiled`` for the CPU, or the plain operators.

    Kernels overlap where the device supports it.

    Raises:
        UnsupportedError: the kernels cannot run there, or not on this model.
    """
    if compiled:
        from hyaena.ops.cpu.operators import CompiledOperators  # numba takes a second to import

        return CompiledOperators()
    if model.device.type != "cuda":
        return DecodeOperators()
    reason = _unsupported_by_kernels(model)
    if reason is not None:
        raise UnsupportedError(f"static decoding is not possible: {reason}; decode with decoding='eager'")
    from hyaena.ops.triton.decode.operators import FusedDecodeOperators  # Triton comes with torch on CUDA machines only

    return FusedDecodeOperators(overlap=triton.can_overlap(model.device))


def _no_graphs(model: StripedHyena) -> str | None:
    if model.device.type != "cuda":
        return f"graphs are captured on CUDA devices, and the model is on {model.device}"
    if triton.interpreted():
        return "the work of Triton's interpreter cannot be captured: unset TRITON_INTERPRET"
    return None


def _not_compiled(model: StripedHyena) -> str | None:
    if model.device.type != "cpu":
        return f"kernels are compiled for the CPU, and the model is on {model.device}"
    return cpu.unsupported_reason(model.dtype)


def _unsupported_by_kernels(model: StripedHyena) -> str | None:
    return triton.decode_unsupported_reason(model.dtype, model.config.head_dim, model.device.type)


def resolve_decoding(model: StripedHyena, wish: Decoding, method: str) -> Decoding:
    """How tokens will be decoded: as requested where that is possible; ``"auto"`` is the fastest possible way.

    Args:
        model: whose tokens.
        wish: ``"eager"`` calls the model for each token; ``"static"`` steps on fixed memory; ``"compiled"`` does so
            with kernels compiled for the CPU; ``"cuda_graph"`` does so as a graph, on CUDA devices; ``"auto"`` is
            one of the last two where that can be done, and ``"eager"`` elsewhere.
        method: by which prompts are read.

    Raises:
        InputError: an unknown wish.
        UnsupportedError: the way that was named is not possible.
    """
    if wish not in get_args(Decoding):
        raise InputError(f"unknown decoding {wish!r}: choose {', '.join(get_args(Decoding))}")
    if wish == "eager":
        return "eager"
    on_cuda = model.device.type == "cuda"
    best: Decoding = "cuda_graph" if on_cuda else "compiled"
    way = best if wish == "auto" else wish
    reason = model.unsupported_reason()
    if reason is None and way == "cuda_graph":
        reason = _no_graphs(model)
    if reason is None and way == "compiled":
        reason = _not_compiled(model)
    if reason is None and on_cuda:
        reason = _unsupported_by_kernels(model)
        if reason is None and ops.capabilities(method).state == "window":
            reason = f"the kernels step modes, and {method!r} leaves the windows of cut filters"
    if wish == "auto":
        name = "CUDA graphs" if best == "cuda_graph" else "kernels compiled for the CPU"
        log_once("tokens are decoded by", name if reason is None else f"calls of the model, not {name}: {reason}")
        return best if reason is None else "eager"
    if reason is not None:
        raise UnsupportedError(f"{_NAMES[wish]} is not possible: {reason}; decode with decoding='eager'")
    return wish


_NAMES = {"static": "static decoding", "compiled": "compiled decoding", "cuda_graph": "static decoding"}
