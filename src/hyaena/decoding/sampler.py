"""Choosing tokens on the device, in storage that never moves: ``sampling`` without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyaena.decoding.memory import move_rows
from hyaena.ops.step import DecodeOperators
from hyaena.sampling import (
    SamplingFeatures,
    SamplingParams,
    choose,
    draw,
    finite_rows,
    log_probabilities,
    params_tensor,
)

BLOCK = 256
"""Numbers that are drawn for a row and brought to the device at once."""


@dataclass(frozen=True)
class StepOutput:
    """The tokens of one step, on the host.

    Attributes:
        tokens: one per row.
        logprobs: theirs.
        top: per row, the most probable (id, log-probability) pairs.
        finite: per row, whether the logits were; where not, the token means nothing.
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[tuple[tuple[int, float], ...]]
    finite: list[bool]

    def select(self, rows: Sequence[int]) -> StepOutput:
        """Of these rows, in this order."""
        return StepOutput(
            tokens=[self.tokens[row] for row in rows],
            logprobs=[self.logprobs[row] for row in rows],
            top=[self.top[row] for row in rows],
            finite=[self.finite[row] for row in rows],
        )

    @classmethod
    def unpack(cls, packed: Tensor) -> StepOutput:
        """From what ``pack`` returns; brings it to the host if it is not there."""
        rows = packed.tolist()
        count = (packed.shape[1] - 3) // 2
        return cls(
            tokens=[int(row[0]) for row in rows],
            logprobs=[row[1] for row in rows],
            top=[
                tuple((int(i), value) for value, i in zip(row[3 : 3 + count], row[3 + count :], strict=True))
                for row in rows
            ],
            finite=[bool(row[2]) for row in rows],
        )


def pack_outputs(logits: Tensor, ids: Tensor, finite: Tensor, top: int) -> Tensor:
    """All that is said of ids [B] chosen from logits [B,V], for one copy to the host: float64 [B,3+2·top]."""
    chosen, values, indices = log_probabilities(logits, ids, top)
    said = torch.stack([ids.double(), chosen.double(), finite.double()], dim=1)
    return torch.cat([said, values.double(), indices.double()], dim=1)


class GraphSampler:
    """Everything that choosing needs, for up to as many rows as there are parameters.

    Each row has its own CPU generator, of which it takes one number per token, in the order in which
    ``sampling.sample`` would: so a seed means the same here. They are drawn a block ahead.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        generators: Sequence[torch.Generator],
        *,
        seen: Tensor | None,
        top: int,
        device: torch.device,
    ) -> None:
        self.params = list(params)
        self.generators = list(generators)
        self.seen = seen
        self.top = top
        self.needs = SamplingFeatures.of(self.params)
        self.knobs = params_tensor(self.params).to(device)
        self.uniform = torch.zeros(len(self.params), BLOCK, dtype=torch.float64, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.left = 0  # numbers of the block that no step has taken

    def changing(self) -> list[Tensor]:
        """What a step changes."""
        return [self.counter] + ([] if self.seen is None else [self.seen])

    def prepare(self) -> None:
        """Before each step: see that there is a number left for it. Never waits for the device."""
        if not self.needs.draw:
            return
        if self.left == 0:
            pairs = zip(self.params, self.generators, strict=True)
            block = torch.stack([draw(params, generator, BLOCK) for params, generator in pairs])
            if self.uniform.is_cuda:
                block = block.pin_memory()  # a copy from pageable memory would wait
            self.uniform[: len(self.params)].copy_(block, non_blocking=True)
            self.counter.zero_()
            self.left = BLOCK
        self.left -= 1

    def choose(self, logits: Tensor, ids: Tensor, operators: DecodeOperators) -> Tensor:
        """The tokens after logits [B,V] into ids [B], in place; all that is said of them, packed: float64 [B,3+2·top].

        The next step reads the ids, whatever the host does later: they are 0 where logits are not finite.
        """
        count = logits.shape[0]
        seen = None if self.seen is None else self.seen[:count]
        if self.needs == SamplingFeatures() and seen is None and self.top == 0:
            return operators.greedy(logits, ids)
        finite = finite_rows(logits)
        if self.needs == SamplingFeatures():
            chosen = logits.argmax(dim=-1)
        else:
            uniform = self.uniform[:count].index_select(1, self.counter)
            chosen = choose(logits, self.knobs[:count], uniform, seen, self.needs)
            self.counter.add_(1)
        ids.copy_(torch.where(finite, chosen, 0))
        if seen is not None:
            seen.scatter_(1, ids[:, None], True)
        return pack_outputs(logits, ids, finite, self.top)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in rising order."""
        self.params = [self.params[row] for row in rows]
        self.generators = [self.generators[row] for row in rows]
        self.needs = SamplingFeatures.of(self.params)
        move_rows([self.knobs, self.uniform] + ([] if self.seen is None else [self.seen]), rows)
