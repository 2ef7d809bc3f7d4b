"""What ``benchmarks.gpu`` measures, and what each figure has to reach."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.registry import Bar, Row, Spread, Unit
from hyaena.bench.run import SH_7B
from hyaena.config import ModelConfig


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run.

    Attributes:
        config: our model; the peer has its widths, and attention in every layer.
        operator: lengths of the fused operator, forward.
        trained: its length, forward and backward.
        prompts: lengths of prefills; the peer reads those from ``long`` on.
        long: where the peer begins.
        decodes: batch and context of decoding, each with the bar of its part of the floor, or None.
        duels: batch and context where the peer decodes too, each with its bar.
        steps: of a round of decoding.
        repeats: of an operator's call.
        spare: what a prefill of the longest prompt may hold beside weights, keys and values, GB.
    """

    config: ModelConfig
    operator: tuple[int, ...]
    trained: int
    prompts: tuple[int, ...]
    long: int
    decodes: tuple[tuple[int, int, float | None], ...]
    duels: tuple[tuple[int, int, Bar], ...]
    steps: int
    repeats: int
    spare: float = 8.0


FULL = Sizes(
    config=SH_7B,
    operator=(32_768, 131_072),
    trained=32_768,
    prompts=(8192, 32_768, 131_072),
    long=32_768,
    decodes=((1, 2048, 0.85), (1, 32_768, 0.85), (64, 8192, None)),
    duels=((1, 32_768, Bar(">", 1)), (64, 8192, Bar(">=", 1.5))),
    steps=24,
    repeats=30,
)

TINY = replace(
    SH_7B,
    vocab_size=320,
    hidden_size=64,
    layer_types=("hyena", "attention") * 2,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    name="tiny",
)

QUICK = Sizes(
    config=TINY,
    operator=(20, 40),
    trained=20,
    prompts=(24, 48, 96),
    long=48,
    decodes=((1, 16, 0.85), (1, 48, 0.85), (3, 24, None)),
    duels=((1, 48, Bar(">", 1)), (3, 24, Bar(">=", 1.5))),
    steps=2,
    repeats=2,
)
"""For ``--quick``: shows that everything runs, and nothing about speed."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A row of the table before it is measured.

    Attributes:
        phase: which part of the run measures it.
        what, unit, peer_name, bar: those of the row.
        ratio: which way the bar is held: ours over the other side, the reverse, or None without another side.
    """

    phase: str
    what: str
    unit: Unit
    peer_name: str = ""
    ratio: Literal["ours / floor", "ours / peer", "peer / ours"] | None = None
    bar: Bar | None = None

    def row(self, ours: Spread, peer: Spread | None = None, note: str = "") -> Row:
        """The row. Both sides ran after each other, so a ratio spans all that their extremes allow."""
        ratio = None
        if self.ratio is not None:
            assert peer is not None
            over, under = (peer, ours) if self.ratio == "peer / ours" else (ours, peer)
            count = min(over.count, under.count)
            ratio = Spread(over.min / under.max, over.median / under.median, over.max / under.min, count)
        return Row(
            what=self.what,
            unit=self.unit,
            ours=ours,
            peer_name=self.peer_name,
            peer=peer,
            ratio=ratio,
            ratio_name=self.ratio or "",
            bar=self.bar,
            note=note,
        )


def claims(sizes: Sizes) -> dict[str, Claim]:
    """Every row of the table by a short name, in the table's order."""
    known: dict[str, Claim] = {
        "copy": Claim(phase="rates", what="copy on the device, read and written bytes", unit="TB/s"),
        "product": Claim(phase="rates", what="large matrix product, bfloat16", unit="TFLOP/s"),
    }
    shape = f"B 1, D {sizes.config.hidden_size}, bfloat16"
    for length in sizes.operator:
        what = f"fused operator, T {length:,}, {shape}"
        known[f"operator {length} floor"] = Claim(
            phase="operator", what=what, unit="s", peer_name="memory floor", ratio="ours / floor", bar=Bar("<=", 1.5)
        )
        known[f"operator {length} fft"] = Claim(
            phase="operator", what=what, unit="s", peer_name="fft", ratio="peer / ours", bar=Bar(">=", 10)
        )
    known["training"] = Claim(
        phase="operator",
        what=f"forward and backward of it, T {sizes.trained:,}",
        unit="s",
        peer_name="autograd through fft",
        ratio="peer / ours",
        bar=Bar(">=", 5),
    )
    for length in sizes.prompts:
        known[f"prefill {length} floor"] = Claim(
            phase="prefill",
            what=f"prefill of {length:,} tokens",
            unit="tokens/s",
            peer_name="FLOP floor",
            ratio="ours / floor",
            bar=Bar(">=", 0.7),
        )
    known["memory"] = Claim(
        phase="prefill",
        what=f"its peak memory at {max(sizes.prompts):,}, less weights, keys and values",
        unit="GB",
        bar=Bar("<=", sizes.spare),
    )
    for batch, context, bar in sizes.decodes:
        known[f"decode {batch} {context} floor"] = Claim(
            phase="decode",
            what=f"decoding, batch {batch}, context {context:,}",
            unit="tokens/s",
            peer_name="bytes floor",
            ratio="ours / floor",
            bar=None if bar is None else Bar(">=", bar),
        )
    for length in (n for n in sizes.prompts if n >= sizes.long):
        known[f"prefill {length} peer"] = Claim(
            phase="peer",
            what=f"prefill of {length:,} tokens",
            unit="tokens/s",
            peer_name="Mistral's shape",
            ratio="ours / peer",
            bar=Bar(">", 1),
        )
    for batch, context, bar in sizes.duels:
        known[f"decode {batch} {context} peer"] = Claim(
            phase="peer",
            what=f"decoding, batch {batch}, context {context:,}",
            unit="tokens/s",
            peer_name="Mistral's shape, compiled",
            ratio="ours / peer",
            bar=bar,
        )
    return known
