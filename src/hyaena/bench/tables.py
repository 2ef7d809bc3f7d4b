"""Tables for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Cells = Sequence[str]


def text_table(header: Cells, rows: Iterable[Cells], *, right: bool = False) -> str:
    """A table for a terminal, its columns aligned on the left or on the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(c.rjust(w) if right else c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown_table(header: Cells, rows: Iterable[Cells]) -> str:
    """A table, as Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))
