"""Passes over a few hundred tokens of prompts, captured: they cost the host one launch, as decoding steps do.

A pass of few tokens takes a GPU as long as reading the weights does, some milliseconds, in which Python cannot launch
its hundreds of kernels. So ``StripedHyena.step`` is captured with the operators of ``ops.triton.decode.packed``, one
graph per bucket of tokens, of rows and of copied states, and tables on the device say which tokens are whose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hyaena import ops
from hyaena.cache import Cache
from hyaena.decoding.capture import capture
from hyaena.decoding.parts import Parts
from hyaena.decoding.sampler import StepOutput
from hyaena.model import StripedHyena
from hyaena.ops import (
    PAGE,
    HyenaState,
    PagedKVState,
    PagePool,
    PageTable,
    StepContext,
    pages_for,
    triton,
)
from hyaena.ops.state import copy_all
from hyaena.packing import Snapshots

if TYPE_CHECKING:  # Triton comes with torch on CUDA machines only
    from hyaena.ops.triton.decode.packed import PackedHost, PackedShape

TOKENS = (16, 32, 64, 128, 256, 512)
"""Places of tokens that passes are captured for."""
ROWS = (1, 4, 16)
"""Places of rows."""
STOPS = (0, 16)
"""Places of states that are copied inside a pass."""
MOST_PAST = 4096
"""Tokens that a row may hold before: every program walks through all of them, which is for short pasts."""


class Answers(NamedTuple):
    """What a pass leaves.

    Attributes:
        logits: [R,V], behind the last token of every row, on the device.
        ids: [R], the most probable tokens, on the device.
        packed: float64 [R,3], see ``DecodeOperators.argmax``, on the host. The next pass of the
            same shape writes there: call ``output`` before it.
        arrived: when ``packed`` has come; None where nothing is waited for.
    """

    logits: Tensor
    ids: Tensor
    packed: Tensor
    arrived: torch.cuda.Event | None = None

    def output(self) -> StepOutput:
        """Wait for the most probable tokens."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return StepOutput.unpack(self.packed)


@dataclass(frozen=True)
class Captured:
    """What belongs to passes of one shape.

    Attributes:
        host: their tables on the host.
        numbers: the same on the device.
        graph: what copies the tables, runs a pass and copies the chosen tokens to the host, and where it leaves its
            answers; None without graphs.
    """

    host: PackedHost
    numbers: Tensor
    graph: tuple[torch.cuda.CUDAGraph, Answers] | None


class ShortPasses:
    """Reads the next tokens of several rows of a cache on pages, as ``model(ids, cache=…, counts=…)`` does.

    Args:
        model: of the cache, of which ``unsupported_reason`` is None.
        pool: of the cache.
        cuda_graph: capture passes; otherwise the same code runs each time.
    """

    def __init__(self, model: StripedHyena, pool: PagePool, *, cuda_graph: bool) -> None:
        from hyaena.ops.triton.decode.few_rows import Products

        self.model, self.pool, self.cuda_graph = model, pool, cuda_graph
        self.width = pages_for(MOST_PAST + TOKENS[-1])
        self.overlap = triton.can_overlap(model.device)
        self.products = Products(overlap=self.overlap)
        self._views: dict[int, list[Tensor]] = {}
        self._captured: dict[PackedShape, Captured] = {}
        self._clean = True  # the states of all rows are those of empty rows
        with torch.inference_mode():
            self._read_anew()
            blank = model.make_paged_cache(pool, [[]]).states
            self.states = [state.blank(ROWS[-1]) for state in blank]
            self.copies = [state.blank(STOPS[-1]) for state in blank]

    @staticmethod
    def unsupported_reason(model: StripedHyena) -> str | None:
        """Why the passes of a model cannot be captured, or None."""
        for i, layer in enumerate(model.layers):
            if not getattr(layer.mixer, "packs_steps", False):
                return f"the mixer of layer {i} reads one token of a row in a step"
            if hasattr(layer.mixer, "long_filter"):
                mixer: Any = layer.mixer
                weight, long_filter = mixer.short_filter.weight, mixer.long_filter.view()
                if not isinstance(long_filter, ops.ModalFilter):
                    return f"layer {i}: short passes take filters of complex modes, not a {type(long_filter).__name__}"
                z = torch.empty(1, 1, len(weight), dtype=model.dtype, device=model.device)
                reason = triton.unsupported_reason(z, weight, long_filter, None, None)
                if reason is not None:
                    return f"layer {i}: {reason}"
        return model.unsupported_reason() or triton.decode_unsupported_reason(
            model.dtype, model.config.head_dim, model.device.type
        )

    def takes(self, cache: Cache, counts: Sequence[int], snapshots: Snapshots | None = None) -> bool:
        """Whether so many tokens of each row, and the states to be copied, fit into a pass."""
        stops = 0 if snapshots is None else sum(map(len, snapshots.stops.values()))
        return (
            sum(counts) <= TOKENS[-1]
            and len(counts) <= ROWS[-1]
            and stops <= STOPS[-1]
            and max(cache.lengths) <= MOST_PAST
            and next(iter(_dtypes(cache)), self.model.dtype) == self.model.dtype
        )

    @torch.inference_mode()
    def read(self, ids: Sequence[Sequence[int]], cache: Cache, snapshots: Snapshots | None = None) -> Answers:
        """Read the next tokens of all rows of a cache, which is brought up to date.

        Args:
            ids: of each row, at least one token.
            cache: on pages of the pool; the pass fits, see ``takes``.
            snapshots: takes copies of the states inside the pass.

        Raises:
            CapacityError: a row of the cache would pass its maximum length, or its pages.
        """
        from hyaena.ops.triton.decode.packed import PackedShape

        counts, rows = [len(row) for row in ids], len(ids)
        stops = [sorted(snapshots.stops.get(row, ())) if snapshots is not None else [] for row in range(rows)]
        if not self.parts.unchanged():
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)  # graphs that still run are about to go
            self._read_anew()
        shape = PackedShape(
            next(n for n in TOKENS if n >= sum(counts)),
            next(n for n in ROWS if n >= rows),
            next(n for n in STOPS if n >= sum(map(len, stops))),
            self.width,
        )
        on = torch.cuda.device(self.model.device) if self.model.device.type == "cuda" else nullcontext()
        with on, cache.reading(self.model, rows, cache.lengths, counts):  # graphs and kernels go to the current device
            captured = self._capture(shape)
            captured.host.fill(ids, cache.lengths, stops, cache.pages)
            mine = self._tensors(rows)
            theirs = [t for state in cache.states if isinstance(state, HyenaState) for t in state.tensors()]
            if any(cache.lengths) or not self._clean:
                copy_all(list(zip(mine, theirs, strict=True)))
            self._clean = False
            if captured.graph is None:
                captured.numbers.copy_(captured.host.numbers)
                answers = self._run(shape, captured.numbers)
            else:
                graph, answers = captured.graph
                graph.replay()
                captured.host.sent()
            copy_all(list(zip(theirs, mine, strict=True)))
            cache.commit(cache.states, counts)
        place = 0
        for row, numbers_of_row in enumerate(stops):
            for stop in numbers_of_row:
                assert snapshots is not None
                for layer, copies in enumerate(self.copies):
                    if isinstance(copies, HyenaState):
                        snapshots.put(layer, row, stop, copies.select([place]))
                place += 1
        return Answers(answers.logits[:rows], answers.ids[:rows], answers.packed[:rows], captured.host.read)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Empty the states, so that a pass over new rows need not: its answer is waited for."""
        if not self._clean:
            zero: Any = torch._foreach_zero_  # pyright: ignore[reportPrivateImportUsage]
            zero(self._tensors(ROWS[-1]))
            self._clean = True

    def _read_anew(self) -> None:
        """Take the model as it is now; graphs of another one would read weights that are gone."""
        self.parts = Parts(self.model)
        self.rotary = self.model.rotary(torch.arange(self.width * PAGE, device=self.model.device), self.model.dtype)
        self._captured.clear()

    def _tensors(self, rows: int) -> list[Tensor]:
        """The states of the first rows, of all layers: the same views each time, since making them takes the host."""
        if rows not in self._views:
            states = [state.first(rows) for state in self.states if isinstance(state, HyenaState)]
            self._views[rows] = [t for state in states for t in state.tensors()]
        return self._views[rows]

    def _run(self, shape: PackedShape, numbers: Tensor) -> Answers:
        from hyaena.ops.triton.decode.packed import PackedHyenaState, PackedOperators, PackedTables

        tables = PackedTables.over(numbers, shape)
        operators = PackedOperators(tables, products=self.products, overlap=self.overlap)
        states = [
            state
            if isinstance(state, PagedKVState)
            else PackedHyenaState(state.first(shape.rows), copies.first(shape.stops) if shape.stops else None)
            for state, copies in zip(self.states, self.copies, strict=True)
        ]
        context = StepContext(operators, tables.lengths, tables.lengths, self.rotary, PageTable(tables.pages))
        logits = self.model.step(tables.ids, states, context)
        ids = torch.empty(shape.rows, dtype=torch.int64, device=logits.device)
        return Answers(logits, ids, operators.argmax(logits, ids))

    def _capture(self, shape: PackedShape) -> Captured:
        """What belongs to passes of a shape; the graph is captured on first use."""
        from hyaena.ops.triton.decode.packed import PackedHost

        if shape in self._captured:
            return self._captured[shape]
        device = self.model.device
        host = PackedHost(shape, self.pool.scratch, pinned=device.type == "cuda")
        numbers, graph = host.numbers.to(device, copy=True), None  # padding only: nothing of rows changes
        if self.cuda_graph:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles kernels, and lets libraries allocate
                self._run(shape, numbers)
            torch.cuda.current_stream().wait_stream(stream)
            others = [captured.graph[0] for captured in self._captured.values() if captured.graph is not None]
            made = torch.cuda.CUDAGraph()
            packed = torch.empty(shape.rows, 3, dtype=torch.float64, pin_memory=True, device="cpu")
            with capture(made, others[0] if others else None):
                numbers.copy_(host.numbers, non_blocking=True)
                answers = self._run(shape, numbers)
                packed.copy_(answers.packed, non_blocking=True)
            graph = made, answers._replace(packed=packed)
        self._captured[shape] = Captured(host, numbers, graph)
        return self._captured[shape]


def _dtypes(cache: Cache) -> Iterator[torch.dtype]:
    """Of the Hyena states of each layer: they are made together, so all are one."""
    return (state.short.dtype for state in cache.states if isinstance(state, HyenaState))
