"""Streams complete characters and stops before the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from hyaena.tokenizers import TextStream, Tokenizer


class StopStringFilter:
    """Turns the tokens of one row into text, up to the first stop string.

    The stop string that is complete first counts (the longer one, if two are complete with the same character), so
    the result does not depend on how the text is cut into tokens. Text that may become a stop string is held back.

    Args:
        tokenizer: of the row.
        prompt: ids before the text, known to be of the vocabulary.
        stops: that end it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer, prompt)  # it looks at the last ones only
        self._stops = stops
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token; return the text to show now, and whether a stop string is complete."""
        if not self._stops:
            return self._stream.push(token), False
        return self._show(self._stream.push(token), last=False)

    def finish(self) -> tuple[str, bool]:
        """End the row; return the text that was held back, and whether a stop string is complete."""
        return self._show(self._stream.flush(), last=True)

    def _show(self, new: str, *, last: bool) -> tuple[str, bool]:
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)[1]], True
        shown = len(text) if last else len(text) - self._unfinished(text)
        self._held = text[shown:]
        return text[:shown], False

    def _unfinished(self, text: str) -> int:
        """Count the characters at the end of the text that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops):
                return count
        return 0
