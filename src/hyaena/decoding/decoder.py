"""Decoding without waiting: a step reads its tokens from the device, leaves the next ones there, and is captured.

On a CUDA device a step is recorded once per number of rows and then replayed as one graph, so that no step costs the
host more than a launch. What it chose comes back a step late: while the host looks at one token, the device already
computes the next.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from hyaena.cache import Cache
from hyaena.decoding.choice import Choice, Chooser
from hyaena.decoding.memory import StaticMemory, move_rows
from hyaena.decoding.step import step, why_not
from hyaena.errors import CapacityError, InputError, UnsupportedError
from hyaena.model import StripedHyena
from hyaena.ops.decode import DecodeOperators
from hyaena.sampling import Needs, SamplingParams


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a graph is good for, and nothing else."""

    rows: int
    capacity: int
    needs: Needs
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
        reason = why_not(model)
        if captured and model.device.type != "cuda":
            reason = f"graphs are captured on CUDA devices, and the model is on {model.device}"
        if reason is not None:
            raise UnsupportedError(f"cannot decode on fixed memory: {reason}; decode with decoding='forward'")
        if not ids.shape[0] == cache.batch_size == len(params) == len(generators):
            raise InputError(f"the cache holds {cache.batch_size} rows, and the decoder was given {ids.shape[0]} ids")
        self.model = model
        self.operators = operators or choose_operators(model)
        with torch.inference_mode():
            self.memory = StaticMemory.adopt(cache, model.config)
            self.chooser = Chooser(params, generators, seen=seen, top=top, device=model.device)
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
        self.chooser.prepare()
        if self.captured:
            shape = self._shape()
            if shape not in self.graphs:
                self.graphs[shape] = self._capture(shape)
            packed = self.graphs[shape].replay(shape)
        else:
            packed = self._step(self.memory.rows(self.rows))
        self.length += 1
        if packed.is_cuda:
            host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            host.copy_(packed, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.pending.append((host, event))
        else:
            self.pending.append((packed, None))

    def fetch(self) -> Choice:
        """What the oldest step that was not fetched chose."""
        packed, event = self.pending.popleft()
        if event is not None:
            event.synchronize()
        return Choice.unpack(packed)

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
        chosen, packed = self.chooser.choose(step(self.model, memory, ids, self.operators))
        ids.copy_(chosen)
        return packed

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
    """The kernels on a CUDA device, the plain composition elsewhere.

    Raises:
        UnsupportedError: the kernels do not take this model's dtype or heads.
    """
    if model.device.type != "cuda":
        return DecodeOperators()
    from hyaena.ops.triton.decode import FusedDecodeOperators  # Triton comes with torch on CUDA machines only

    return FusedDecodeOperators(model.dtype, model.config.head_dim)
