"""The loop that reads without writing: records pass through a model, and observers see what its modules return.

Records that fit into a pass are packed one after another, without padding, where all mixers keep packed documents apart
(``packs``), and are read one by one elsewhere. A longer record goes layer by layer: all its
positions pass through one layer, in chunks, before the next layer, so that the keys and values of one layer exist at a
time, and of the activations one copy, which every layer overwrites. Results do not depend on either but by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from hyaena import ops
from hyaena.cache import Cache
from hyaena.context import ForwardContext
from hyaena.errors import HyaenaError
from hyaena.generation.chunks import choose_chunk
from hyaena.layers import call
from hyaena.model import StripedHyena
from hyaena.scoring.records import Record

Progress = Callable[[int], None]

PASS_TOKENS = {"cpu": 2048}
"""Tokens of one pass on a kind of device; elsewhere ``generation.chunks`` chooses by memory. 256 texts of 8 to 100
bytes, cub, two cores: 3.0, 3.5 and 3.7 times as fast as one by one with passes of 1,024, 2,048 and 4,096."""
MOST_CHUNK = {"cpu": 1024, "cuda": 16_384}
"""Most tokens of a chunk of a long record on a kind of device, unless the caller chooses. On a CPU attention to a long
past needs memory in proportion. On an H200 attention after 524,288 keys reaches 0.78 of the rate of a matrix product
with 16,384 queries, 0.75 with twice and 0.73 with four times as many."""


class Span(NamedTuple):
    """Neighbouring tokens of one record in a pass.

    Attributes:
        record: whose tokens they are.
        start: the position of the first of them in the record.
        rows: their positions in the pass.
    """

    record: Record
    start: int
    rows: slice

    @property
    def stop(self) -> int:
        return self.start + self.rows.stop - self.rows.start


class Reader:
    """Reads records with a model.

    Attributes:
        spans: the tokens that the module call in progress reads; hooks look here.
        watch: entered while the model reads, and left whenever ``read`` yields: somebody else may use the model then.

    Args:
        model: on its device.
        depth: how many layers to run; one more than there are for the final norm as well.
        tokens_per_pass: the most tokens of a pass, and of a chunk; None to choose both.
        method: how long convolutions are evaluated.
        progress: called after each pass with the tokens read; a pass through one layer counts as its share.
    """

    def __init__(
        self,
        model: StripedHyena,
        *,
        depth: int,
        tokens_per_pass: int | None = None,
        method: str = "auto",
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.depth = depth
        self.method = method
        self.progress = progress
        self.spans: Sequence[Span] = ()
        self.watch: Callable[[], AbstractContextManager[None]] = nullcontext
        self.tokens_per_pass = tokens_per_pass or choose_pass(model)
        most = MOST_CHUNK.get(model.device.type, self.tokens_per_pass)
        self.chunk = tokens_per_pass or min(self.tokens_per_pass, most)
        self._read = 0

    def read(self, records: Iterable[Record]) -> Iterator[tuple[float, list[Record]]]:
        """Read records in order, a pass at a time, or a chunk of a long record through one layer.

        Yields:
            How many tokens were read (a pass through one layer counts as its share), and the records that are done.
        """
        packs = all(getattr(layer.mixer, "packs", False) for layer in self.model.layers[: self.depth])
        for group in pack(records, self.tokens_per_pass) if packs else ([record] for record in records):
            total, share = sum(map(len, group)), 0.0
            if len(group[0]) > self.tokens_per_pass:
                for share in self._read_by_layer(group[0]):
                    yield share, []
                share = 0.0
            else:
                self._read_packed(group)
                share = float(total)
            self._read += total
            if self.progress is not None:
                self.progress(self._read)
            yield share, group

    @torch.inference_mode()
    def _read_packed(self, group: list[Record]) -> None:
        model, device = self.model, self.model.device
        ids = torch.cat([record.ids for record in group])[None].to(device)
        spans, start = [], 0
        for record in group:
            spans.append(Span(record, 0, slice(start, start + len(record))))
            start += len(record)
        segments = None
        if len(group) > 1:
            lengths = torch.tensor([len(record) for record in group], device=device)
            segments = torch.arange(len(group), device=device).repeat_interleave(lengths, output_size=start)[None]
        context = self._context(ids, segments, None)
        self.spans = spans
        with self.watch():
            x = model.embed_tokens(ids)
            for layer in model.layers[: self.depth]:
                x, _ = layer(x, context, None, start)
            if self.depth > len(model.layers):
                call(model.norm, x, context)

    @torch.inference_mode()
    def _read_by_layer(self, record: Record) -> Iterator[float]:
        """Read a record; after each chunk of a layer the tokens that this was worth."""
        model, length = self.model, len(record)
        ids = record.ids[None].to(model.device)
        layers = model.layers[: self.depth]
        parts = [slice(i, min(i + self.chunk, length)) for i in range(0, length, self.chunk)]

        x = torch.empty(1, length, model.config.hidden_size, dtype=model.dtype, device=model.device)

        @contextmanager
        def reading(part: slice) -> Iterator[Tensor]:
            self.spans = [Span(record, part.start, slice(0, part.stop - part.start))]
            with self.watch():
                yield x[:, part]

        for part in parts:
            with reading(part) as values:
                values[:] = model.embed_tokens(ids[:, part])
        for i, layer in enumerate(layers):
            state = model.make_state(i, max_length=length, method=self.method)
            for part in parts:
                count = part.stop - part.start
                with reading(part) as values:
                    values[:], state = layer(values, self._context(ids[:, part], None, part.start), state, count)
                if self.progress is not None:
                    self.progress(self._read + (length * i + part.stop) // len(layers))
                yield count / len(layers)
            del state
        if self.depth > len(model.layers):
            for part in parts:
                with reading(part) as values:
                    call(model.norm, values, self._context(ids[:, part], None, part.start))
                yield (part.stop - part.start) / len(layers)

    def _context(self, ids: Tensor, segments: Tensor | None, past: int | None) -> ForwardContext:
        model = self.model
        return ForwardContext.of(
            model.rotary,
            ids,
            cache=None if past is None else Cache([], [past], [None]),
            mask=None,
            segment_ids=segments,
            method=self.method,
            backend=ops.resolve_backend("auto", device=model.device, dtype=model.dtype, gradients=False),
            dtype=model.dtype,
            kv_dtype=model.cache_dtype,  # a text of one pass, too, is read as a cache would hold it
        )


def choose_pass(model: StripedHyena) -> int:
    """The tokens of one pass on the model's device."""
    chosen = PASS_TOKENS.get(model.device.type)
    return choose_chunk(model, 0) if chosen is None else chosen


def pack(records: Iterable[Record], most: int) -> Iterator[list[Record]]:
    """Neighbouring records that have at most ``most`` tokens together; a longer record alone.

    Where making a record raises an error, what came before it is read first.
    """
    group: list[Record] = []
    count, failed = 0, None
    source = iter(records)
    while True:
        try:
            record = next(source, None)
        except HyaenaError as error:
            record, failed = None, error
        if group and (record is None or count + len(record) > most):
            yield group
            group, count = [], 0
        if record is None:
            break
        group.append(record)
        count += len(record)
    if failed is not None:
        raise failed


def clip(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The parts of spans at the positions start … stop-1 of a pass, which are then counted from ``start``."""
    clipped = []
    for span in spans:
        first, last = max(span.rows.start, start), min(span.rows.stop, stop)
        if first < last:
            rows = slice(first - start, last - start)
            clipped.append(Span(span.record, span.start + first - span.rows.start, rows))
    return clipped
