"""The 129M model against llama.cpp with a Mistral of the same widths: one benchmark for each precision."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cpu import models
from benchmarks.cpu.prefill_decode import check_way, prefill_ours, prompt
from benchmarks.llama import LlamaCpp, require_llama, require_survival, round_weights, write_gguf
from benchmarks.mistral import Mistral
from benchmarks.registry import Row, Session, Step, Summary, Target, pairwise, require_equal
from hyaena.bench.clock import Samples, Side, take_turns
from hyaena.bench.measure import filled_cache, stepper
from hyaena.decoding import resolve_decoding
from hyaena.model import StripedHyena
from hyaena.ops import cpu

KEYS = torch.bfloat16
"""Of our keys and values while decoding; those of llama.cpp are float16."""
PAUSE = 0.03
"""Seconds before each turn: the threads of the other library have stopped waiting for work by then."""

PATIENCE = 130.0
"""Seconds for all turns of a prefill, of which there is one at least."""


@dataclass(frozen=True)
class Precision:
    """One precision on both sides.

    Attributes:
        name: ours: a dtype, or a scheme of narrow weights, computed in the dtype that ``dtype="auto"`` takes here.
        kind: llama.cpp's, of all its matrices.
        same: of the largest logit: how far llama.cpp may be from transformers with the same numbers. From bfloat16 on
            it rounds what goes into a product as well, to bfloat16 or to blocks of 8 bits.
        prefill: targets at 512, 2,048 and 8,192 tokens.
        decode: targets at contexts 512 and 8,192.
    """

    name: str
    kind: str
    same: float
    prefill: tuple[float, ...] | None
    decode: tuple[float, float]

    def model(self, *, quick: bool) -> StripedHyena:
        """Our side."""
        if self.name in ("float32", "bfloat16"):
            return models.striped(quick).to(getattr(torch, self.name))
        torch.manual_seed(0)
        model = StripedHyena(replace(models.TINY if quick else models.STRIPED, weights=self.name)).eval()
        return model.to(_automatic())

    def wide(self, *, quick: bool) -> tuple[str, StripedHyena]:
        """Our model with weights of the dtype that a narrow one computes in, and its name."""
        return _name(_automatic()), models.striped(quick).to(_automatic())

    @property
    def described(self) -> str:
        """For the name of a row."""
        return self.name if self.name in ("float32", "bfloat16") else f"{self.name} and {_name(_automatic())}"


def _automatic() -> torch.dtype:
    """The dtype that ``dtype="auto"`` takes on this processor."""
    return torch.bfloat16 if cpu.multiplies_bfloat16() else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


FLOAT32 = Precision("float32", "F32", 1e-5, (1.0, 1.1, 1.4), (1.0, 1.3))
BFLOAT16 = Precision("bfloat16", "BF16", 2e-2, (1.0, 1.1, 1.4), (1.0, 1.3))
INT8 = Precision("int8", "Q8_0", 5e-2, None, (1.0, 1.3))
INT4 = Precision("int4", "Q4_0", 5e-2, None, (0.9, 1.3))


def prefill(session: Session, precision: Precision) -> Iterator[Step]:
    """Prompts of three lengths, after both sides were found to compute what they should."""
    lengths = (32, 64, 96) if session.quick else (512, 2048, 8192)
    with opened(session, precision, lengths[-1]) as (pair, ids):
        targets = precision.prefill or (None, None, None)
        for length, target in zip(lengths, targets, strict=True):
            yield Step(
                f"{length:,} tokens", lambda n=length, t=target: pair.prefill(ids[:, :n], t, quick=session.quick)
            )


def decode(session: Session, precision: Precision) -> Iterator[Step]:
    """Single steps at two contexts, after both sides were found to compute what they should."""
    contexts = (32, 96) if session.quick else (512, 8192)
    steps, rounds = (4, 3) if session.quick else (16, 15)
    with opened(session, precision, contexts[-1] + 1 + (rounds + 1) * steps) as (pair, ids):
        for context, target in zip(contexts, precision.decode, strict=True):
            yield Step(f"context {context:,}", lambda n=context, t=target: pair.decode(ids[:, :n], t, steps, rounds))


prefill_float32, decode_float32 = partial(prefill, precision=FLOAT32), partial(decode, precision=FLOAT32)
prefill_bfloat16, decode_bfloat16 = partial(prefill, precision=BFLOAT16), partial(decode, precision=BFLOAT16)
prefill_int8, decode_int8 = partial(prefill, precision=INT8), partial(decode, precision=INT8)
prefill_int4, decode_int4 = partial(prefill, precision=INT4), partial(decode, precision=INT4)


@contextlib.contextmanager
def opened(session: Session, precision: Precision, context: int) -> Iterator[tuple[Pair, Tensor]]:
    """Both sides, checked, with room for so many tokens, and the ids of a prompt."""
    require_llama()
    model = precision.model(quick=session.quick)
    ids = prompt(model.config, context)
    check_way(model, ids[:, :64], resolve_decoding(model, "auto", "auto"), keys=KEYS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"mistral-{precision.kind}.gguf"
        size = check_llama(precision, model, ids[:, :64], path)
        theirs = LlamaCpp(path, context, threads=torch.get_num_threads())
    try:
        yield Pair(precision, model, theirs, f"llama.cpp {precision.kind}, Mistral ({size / 1e6:.1f}M)"), ids
    finally:
        theirs.close()


def check_llama(precision: Precision, model: StripedHyena, ids: Tensor, path: Path) -> int:
    """Write the file of a Mistral; llama.cpp's logits are those of transformers with the same numbers.

    Returns the number of parameters.
    """
    baseline = Mistral(model.config)
    write_gguf(baseline, path, precision.kind)
    require_survival(path, torch.get_num_threads())
    round_weights(baseline, precision.kind)
    llama = LlamaCpp(path, ids.shape[1], threads=torch.get_num_threads(), exact=True)
    with torch.inference_mode():
        want = baseline.prefill(ids)[0]
    got = llama.read(ids[0].tolist())
    require_equal(f"logits of llama.cpp {precision.kind} and of transformers", got, want, precision.same)
    llama.close()
    return baseline.num_parameters


@dataclass
class Pair:
    """Our model and its counterpart.

    Attributes:
        precision, model, llama: of both.
        name: of the other side.
        seconds: that a turn of both sides took per token, as far as is known.
    """

    precision: Precision
    model: StripedHyena
    llama: LlamaCpp
    name: str
    seconds: float = 0.0

    def prefill(self, ids: Tensor, target: float | None, *, quick: bool) -> list[Row]:
        """A prompt, ours to the first token, llama.cpp's to the last logits; narrow weights against wide ones too."""
        tokens, length = ids[0].tolist(), ids.shape[1]

        def forget() -> None:
            self.llama.rewind(0)
            _pause()

        sides = {
            "ours": Side(lambda: prefill_ours(self.model, ids), prepare=_pause),
            self.name: Side(lambda: self.llama.read(tokens), prepare=forget),
        }
        wide = ""
        if self.precision.prefill is None:
            dtype, model = self.precision.wide(quick=quick)
            wide = f"ours in {dtype}"
            sides[wide] = Side(lambda: prefill_ours(model, ids), prepare=_pause)
        if not self.seconds:
            take_turns(sides, 1)
        rounds = max(1, min(7, int(PATIENCE / (length * self.seconds)))) if self.seconds else 7
        seconds = take_turns(sides, rounds)
        self.seconds = sum(s.median for s in seconds.values()) / length
        what = f"prefill of {length:,} tokens in {self.precision.described}, {models.size_of(self.model)}"
        rates = {name: s.map(lambda t: length / t) for name, s in seconds.items()}
        rows = [_row(what, rates, self.name, "ours / llama.cpp", target)]
        if wide:
            rows.append(_row(what, rates, wide, "narrow / wide", 1.0))
        return rows

    def decode(self, ids: Tensor, target: float, steps: int, rounds: int) -> list[Row]:
        """Greedy steps after a prompt, with keys and values in 16 bits on both sides."""
        context = ids.shape[1]
        way = resolve_decoding(self.model, "auto", "auto")
        cache = filled_cache(self.model, 1, context, room=1 + (rounds + 1) * steps, dtype=KEYS)
        step = stepper(self.model, cache, way)
        self.llama.rewind(0)
        last = int(self.llama.read(ids[0].tolist()).argmax())

        def theirs() -> None:
            nonlocal last
            for _ in range(steps):
                last = int(self.llama.read([last]).argmax())

        sides = {"ours": Side(lambda: step(steps), prepare=_pause), self.name: Side(theirs, prepare=_pause)}
        for side in sides.values():
            side.run()
        seconds = take_turns(sides, rounds)
        rates = {name: s.map(lambda t: steps / t) for name, s in seconds.items()}
        what = f"decoding at context {context:,} in {self.precision.described} ({way}), {models.size_of(self.model)}"
        return [_row(what, rates, self.name, "ours / llama.cpp", target)]


def _row(what: str, rates: dict[str, Samples], other: str, ratio: str, target: float | None) -> Row:
    return Row(
        what=what,
        unit="tokens/s",
        ours=Summary.of(rates["ours"].values),
        baseline_name=other,
        baseline=Summary.of(rates[other].values),
        ratio=pairwise(rates["ours"].values, rates[other].values),
        ratio_name=ratio,
        target=None if target is None else Target(">=", target),
    )


def _pause() -> None:
    time.sleep(PAUSE)
