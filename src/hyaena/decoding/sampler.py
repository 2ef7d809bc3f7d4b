"""Samples on the device into fixed buffers, so that it can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyaena.ops.step import DecodeOperators
from hyaena.sampling import (
    SamplingFeatures,
    SamplingParams,
    bias_table,
    choose,
    draw,
    finite_rows,
    log_probabilities,
    params_tensor,
)

BLOCK = 256
"""Uniform numbers that are drawn for a row and copied to the device together."""


@dataclass(frozen=True)
class StepOutput:
    """The tokens of one step, on the host.

    Attributes:
        tokens: one per row.
        logprobs: their log-probabilities.
        top: per row, the most probable (id, log-probability) pairs.
        finite: per row, whether the logits were; where not, the token means nothing.
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[tuple[tuple[int, float], ...]]
    finite: list[bool]

    @classmethod
    def unpack(cls, packed: Tensor | np.ndarray[Any, Any]) -> StepOutput:
        """Read what ``pack_outputs`` returned; copies it to the host if it is not there."""
        tokens, logprobs, finite, *rest = packed.T.tolist()
        count = len(rest) // 2
        ids = [map(int, column) for column in rest[count:]]
        columns = [zip(*pair, strict=True) for pair in zip(ids, rest[:count], strict=True)]
        return cls(
            tokens=list(map(int, tokens)),
            logprobs=logprobs,
            top=list(zip(*columns, strict=True)) if columns else [()] * len(tokens),
            finite=list(map(bool, finite)),
        )


def pack_outputs(logits: Tensor, ids: Tensor, finite: Tensor, top: int) -> Tensor:
    """Pack token, log-probability, finite flag and top-k of every row into one tensor (one copy to the host).

    logits [B,V], ids [B], finite [B] -> float64 [B,3+2·top].
    """
    chosen, values, indices = log_probabilities(logits, ids, top)
    first = torch.stack([ids.double(), chosen.double(), finite.double()], dim=1)
    return torch.cat([first, values.double(), indices.double()], dim=1)


class GraphSampler:
    """Sampling parameters, random numbers, seen tokens and biases of up to ``max_rows`` rows.

    They lie in buffers that never move, those of [rows,V] only where a row needs them.

    Each row has its own CPU generator, of which it takes one number per token, in the order in which
    ``sampling.sample`` would: so a seed means the same here. They are drawn in blocks.
    """

    def __init__(self, max_rows: int, vocab_size: int, *, top: int, device: torch.device) -> None:
        self.params: list[SamplingParams] = []
        self.generators: list[torch.Generator] = []
        self.top = top
        self.features = SamplingFeatures()
        self.knobs = params_tensor([SamplingParams()] * max_rows).to(device)
        self.uniform = torch.zeros(max_rows, BLOCK, dtype=torch.float64, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.left = 0  # numbers of the block that no step has taken
        self.vocab_size = vocab_size
        self.seen: Tensor | None = None  # bool [max_rows,V], where a repetition penalty needs it
        self.bias: Tensor | None = None  # float32 [max_rows,V], where a row has a bias

    @property
    def greedy(self) -> bool:
        """Whether every row takes the most probable token, and nothing else is asked of a step."""
        return self.features == SamplingFeatures() and self.top == 0

    def mutated_tensors(self, places: int) -> list[Tensor]:
        """What a step changes and would change again if repeated."""
        return [self.counter] + ([] if self.seen is None else [self.seen[:places]])

    def add(self, params: Sequence[SamplingParams], generators: Sequence[torch.Generator], seen: Tensor | None) -> None:
        """Append rows. ``seen`` bool [rows,V] says which tokens occurred, where a repetition penalty needs it."""
        start = len(self.params)
        self.params += params
        self.generators += generators
        self.features = SamplingFeatures.of(self.params)
        here = slice(start, len(self.params))
        self.knobs[here] = upload(params_tensor(params), self.knobs.device)
        if self.features.draw and self.left:  # the rest of the block, so that all rows exhaust it together
            self.uniform[here, BLOCK - self.left :] = upload(self._draw(here, self.left), self.uniform.device)
        if self.features.penalty and self.seen is None:
            self.seen = torch.zeros(self.knobs.shape[0], self.vocab_size, dtype=torch.bool, device=self.knobs.device)
        if self.seen is not None:
            self.seen[here] = False if seen is None else seen
        bias = bias_table(params, self.vocab_size, self.knobs.device)
        if bias is not None and self.bias is None:
            shape = self.knobs.shape[0], self.vocab_size
            self.bias = torch.zeros(shape, dtype=torch.float32, device=self.knobs.device)
        if self.bias is not None:
            self.bias[here] = 0.0 if bias is None else bias

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, which are in rising order."""
        self.params = [self.params[row] for row in rows]
        self.generators = [self.generators[row] for row in rows]
        self.features = SamplingFeatures.of(self.params)
        for tensor in (self.knobs, self.uniform, self.seen, self.bias):
            if tensor is not None:
                move_rows(tensor, rows)

    def prepare(self) -> None:
        """Make sure, before each step, that there is a number for it. Never waits for the device."""
        if not self.features.draw:
            return
        if self.left == 0:
            block = self._draw(slice(0, len(self.params)), BLOCK)
            self.uniform[: len(self.params)] = upload(block, self.uniform.device)
            self.counter.zero_()
            self.left = BLOCK
        self.left -= 1

    def _draw(self, rows: slice, count: int) -> Tensor:
        pairs = zip(self.params[rows], self.generators[rows], strict=True)
        return torch.stack([draw(params, generator, count) for params, generator in pairs])

    def sample(self, logits: Tensor, ids: Tensor, operators: DecodeOperators) -> Tensor:
        """Choose a token per row of logits [B,V] into ids [B], in place; the packed outputs float64 [B,3+2·top].

        The next step reads the ids whatever the host does later: they are 0 where logits are not finite.
        """
        count = logits.shape[0]
        # Rows with a penalty bring what they have seen, so nothing is noted while there are none.
        seen = self.seen[:count] if self.seen is not None and self.features.penalty else None
        if self.greedy:
            return operators.argmax(logits, ids)
        bias = self.bias[:count] if self.bias is not None and self.features.bias else None
        finite = finite_rows(logits, bias)
        if self.features == SamplingFeatures():
            chosen = logits.argmax(dim=-1)
        else:
            uniform = self.uniform[:count]
            if self.features.draw:  # otherwise no number is read, and none may be counted
                uniform = uniform.index_select(1, self.counter)
                self.counter.add_(1)
            chosen = choose(logits, self.knobs[:count], uniform, seen, bias, self.features)
        ids.copy_(torch.where(finite, chosen, 0))
        if seen is not None:
            seen.scatter_(1, ids[:, None], True)
        return pack_outputs(logits, ids, finite, self.top)


def move_rows(tensor: Tensor, rows: Sequence[int]) -> None:
    """Move the given rows, in rising order, to the front, in place."""
    for place, row in enumerate(rows):
        if place != row:
            tensor[place].copy_(tensor[row])


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, which is not waited for: a copy from pageable memory would wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
