"""Decoding without waiting: a step reads its tokens from the device, leaves the next ones there, and is captured.

On a CUDA device a step is recorded once per number of rows and then replayed as one graph, so that no step costs the
host more than a launch. What it chose comes back a step late: while the host looks at one token, the device already
computes the next.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from hyaena import ops
from hyaena.cache import Cache
from hyaena.decoding.memory import StaticMemory, move_rows
from hyaena.decoding.sampler import GraphSampler, StepOutput
from hyaena.decoding.step import step, why_not
from hyaena.errors import CapacityError, InputError, UnsupportedError
from hyaena.model import StripedHyena
from hyaena.ops import triton
from hyaena.ops.backend import log_once
from hyaena.ops.step import DecodeOperators
from hyaena.sampling import SamplingFeatures, SamplingParams

Decoding = Literal["auto", "eager", "static", "cuda_graph"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a graph is good for, and nothing else."""

    rows: int
    capacity: int
    needs: SamplingFeatures
    top: int


@dataclasses.dataclass(frozen=True)
class Graph:
    """A captured step, and where it leaves what it chose."""

    shape: Shape
    graph: torch.cuda.CUDAGraph
    packed: Tensor

    def replay(self, shape: Shape) -> Tensor:
        """Run the step again. A graph of another shape would read and write what is not its own."""
        if shape != self.shape:
            raise AssertionError(f"a graph captured for {self.shape} was to be replayed for {shape}")
        self.graph.replay()
        return self.packed


class Decoder:
    """The rows of a cache, decoded together.

    ``launch`` starts a step, ``fetch`` waits for the oldest that was not fetched. Rows that are finished may be left in
    (their tokens mean nothing) or dropped with ``keep``.

    Args:
        model: whose cache it is.
        cache: prompts, read; of fixed size. It is taken over and must not be used afterwards.
        ids: int [B], the token that each row goes on from.
        params, generators: of each row.
        seen: bool [B,V], where a repetition penalty needs it; taken over.
        top: how many of the most probable tokens to report.
        captured: record steps as CUDA graphs; otherwise the same code runs each time.
        operators: what a step computes with; chosen by the device unless given.

    Raises:
        UnsupportedError: the model has parts that a step would not call, or the device no graphs.
        InputError: ids that do not fit, or a cache without maximum length.
    """

    def __init__(
        self,
        model: StripedHyena,
        cache: Cache,
        ids: Tensor,
        params: Sequence[SamplingParams],
        generators: Sequence[torch.Generator],
        *,
        seen: Tensor | None = None,
        top: int = 0,
        captured: bool = False,
        operators: DecodeOperators | None = None,
    ) -> None:
        reason = why_not(model) or (_no_graphs(model) if captured else None)
        if reason is not None:
            raise UnsupportedError(f"cannot decode on fixed memory: {reason}; decode with decoding='eager'")
        if not ids.shape[0] == cache.batch_size == len(params) == len(generators):
            raise InputError(f"the cache holds {cache.batch_size} rows, and the decoder was given {ids.shape[0]} ids")
        self.model = model
        self.operators = operators or choose_operators(model)
        with torch.inference_mode():
            self.memory = StaticMemory.adopt(cache, model.config)
            self.chooser = GraphSampler(params, generators, seen=seen, top=top, device=model.device)
            self.ids = ids.to(model.device, torch.int64, copy=True)
        self.length = cache.length
        self.rows = ids.shape[0]
        self.captured = captured
        self.graphs: dict[Shape, Graph] = {}
        self.pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    @torch.inference_mode()
    def launch(self) -> None:
        """Start a step; on a CUDA device, without waiting for it.

        Raises:
            CapacityError: the memory is full; nothing was started.
        """
        if self.length >= self.memory.capacity:
            raise CapacityError(
                f"the cache holds {self.length} of at most {self.memory.capacity} tokens: "
                "make it with a larger max_length"
            )
        if self.model.device.type != "cuda":
            self.chooser.prepare()
            self.pending.append((self._step(self.memory.rows(self.rows)), None))
        else:
            with torch.cuda.device(self.model.device):  # graphs and kernels go to the current one
                self.pending.append(self._launch())
        self.length += 1

    def _launch(self) -> tuple[Tensor, torch.cuda.Event]:
        self.chooser.prepare()
        if self.captured:
            shape = self._shape()
            if shape not in self.graphs:
                self.graphs[shape] = self._capture(shape)
            packed = self.graphs[shape].replay(shape)
        else:
            packed = self._step(self.memory.rows(self.rows))
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        host.copy_(packed, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def fetch(self) -> StepOutput:
        """What the oldest step that was not fetched chose."""
        packed, event = self.pending.popleft()
        if event is not None:
            event.synchronize()
        return StepOutput.unpack(packed)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in rising order. Everything launched must have been fetched."""
        if self.pending:
            raise AssertionError("rows may leave between steps only: fetch what was launched")
        if not rows or list(rows) != sorted(set(rows)) or not 0 <= rows[0] <= rows[-1] < self.rows:
            raise InputError(f"keep takes rows of 0 … {self.rows - 1} in rising order, and was given {list(rows)}")
        move_rows([*self.memory.by_row(), self.ids], rows)
        self.chooser.keep(rows)
        self.rows = len(rows)

    def cache(self) -> Cache:
        """An ordinary cache of what has been read, over the same storage: valid until the next step."""
        return self.memory.rows(self.rows).as_cache(self.length)

    def _step(self, memory: StaticMemory) -> Tensor:
        ids = self.ids[: self.rows]
        logits = step(self.model, memory, ids, self.operators)
        return self.chooser.choose(logits, ids, self.operators)

    def _shape(self) -> Shape:
        return Shape(self.rows, self.memory.capacity, self.chooser.needs, self.chooser.top)

    def _capture(self, shape: Shape) -> Graph:
        """Run the step once, which compiles kernels and lets libraries allocate, undo it, and record it."""
        memory = self.memory.rows(self.rows)
        changing = [*memory.changing(), *self.chooser.changing(), self.ids]
        before = [t.clone() for t in changing]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(memory)
            for tensor, old in zip(changing, before, strict=True):
                tensor.copy_(old)
        torch.cuda.current_stream().wait_stream(stream)
        pool = next(iter(self.graphs.values())).graph.pool() if self.graphs else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            packed = self._step(memory)
        return Graph(shape, graph, packed)


def choose_operators(model: StripedHyena) -> DecodeOperators:
    """The kernels on a CUDA device, the plain composition elsewhere. Kernels overlap where the device can do that.

    Raises:
        UnsupportedError: the kernels cannot run there, or not on this model.
    """
    if model.device.type != "cuda":
        return DecodeOperators()
    reason = _beyond_kernels(model)
    if reason is not None:
        raise UnsupportedError(f"cannot decode on fixed memory: {reason}; decode with decoding='eager'")
    from hyaena.ops.triton.decode.operators import FusedDecodeOperators  # Triton comes with torch on CUDA machines only

    return FusedDecodeOperators(overlap=triton.can_overlap(model.device))


def _no_graphs(model: StripedHyena) -> str | None:
    if model.device.type != "cuda":
        return f"graphs are captured on CUDA devices, and the model is on {model.device}"
    if triton.interpreted():
        return "what Triton's interpreter does cannot be captured: unset TRITON_INTERPRET"
    return None


def _beyond_kernels(model: StripedHyena) -> str | None:
    config = model.config
    sizes = config.head_dim, config.state_size, config.short_filter_length
    return triton.decode_unsupported_reason(model.dtype, *sizes, model.device.type)


def resolve_decoding(model: StripedHyena, wish: Decoding, method: str) -> Decoding:
    """How tokens will be decoded: what was asked for, if it can be; ``"auto"`` is the fastest that can.

    Args:
        model: whose tokens.
        wish: ``"eager"`` calls the model for each token; ``"static"`` steps on fixed memory; ``"cuda_graph"`` does
            so as a graph, on CUDA devices; ``"auto"`` is ``"cuda_graph"`` where that can be done, and ``"eager"``
            elsewhere.
        method: by which prompts are read.

    Raises:
        InputError: an unknown wish.
        UnsupportedError: what was asked for by name cannot be done.
    """
    if wish not in get_args(Decoding):
        raise InputError(f"unknown decoding {wish!r}: choose {', '.join(get_args(Decoding))}")
    if wish == "eager" or (wish == "auto" and model.device.type != "cuda"):
        return "eager"
    reason = why_not(model) or (_no_graphs(model) if wish != "static" else None)
    if reason is None and model.device.type == "cuda":
        reason = _beyond_kernels(model)
        if reason is None and ops.capabilities(method).state == "window":
            reason = f"the kernels step modes, and {method!r} leaves the windows of cut filters"
    if wish == "auto":
        choice = "captured steps" if reason is None else f"calls of the model, not captured steps: {reason}"
        log_once("tokens are decoded by", choice)
        return "cuda_graph" if reason is None else "eager"
    if reason is not None:
        raise UnsupportedError(f"cannot decode on fixed memory: {reason}; decode with decoding='eager'")
    return wish
