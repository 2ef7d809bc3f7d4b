"""A decoder that is kept one step ahead of whoever reads its tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from hyaena.decoding.decoder import Decoder
from hyaena.decoding.sampler import StepOutput


class PipelinedDecoder:
    """The choices of a decoder, step by step; the next step already runs while one is looked at.

    A row that leaves is one step late too: what the device computed for it in between is dropped. Its place is given
    back when half of the rows have left, since every number of rows is a graph of its own.

    Args:
        decoder: whose rows are read; nobody else may launch or fetch.
        steps: the most that will be asked for. None more is launched.
    """

    def __init__(self, decoder: Decoder, steps: int) -> None:
        self.decoder = decoder
        self.left = steps
        self.rows = list(range(decoder.rows))  # places of the rows that are still read
        self.fetched: deque[StepOutput] = deque()

    def next(self) -> StepOutput:
        """The choices of the rows that are still read, after one more step."""
        while self.left and len(self.fetched) + len(self.decoder.pending) < 2:
            self.decoder.launch()
            self.left -= 1
        choice = self.fetched.popleft() if self.fetched else self.decoder.fetch()
        return choice.select(self.rows)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these of the rows that are still read."""
        self.rows = [self.rows[row] for row in rows]
        if self.rows and 2 * len(self.rows) <= self.decoder.rows:
            self.wait()
            self.fetched = deque(choice.select(self.rows) for choice in self.fetched)
            self.decoder.keep(self.rows)
            self.rows = list(range(len(self.rows)))

    def wait(self) -> None:
        """Fetch what was launched: afterwards the device no longer works on this decoder's memory."""
        while self.decoder.pending:
            self.fetched.append(self.decoder.fetch())
