"""Filters of explicit taps; the state is a window of past inputs.

    y[t] = Σ_{k<W} h[k]·x[t-k]

Three ways: a sum over taps or steps (``direct``), matrix products of chunks of steps with the inputs that they see
(``blocked``), and one FFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyaena.errors import InputError
from hyaena.ops.long_conv.blocked import segmented_product
from hyaena.ops.long_conv.fft import fft_size
from hyaena.ops.long_conv.filters import SHORT, Stop, by_document, check_shape, wide_dtype
from hyaena.ops.long_conv.reference import fir_reference

FEW = 8
"""Taps up to which a sum over taps is cheaper than an FFT (on a CPU; 64 channels, 4,096 steps: 6 ms against 12 ms at 7
taps, 14 against 20 at 16, 53 against 10 at 64)."""

CHUNK = 64
"""Steps of a chunk at least; with W taps, a chunk of W steps costs two multiplications per tap."""


class ExplicitFilter(NamedTuple):
    """F long filters of W taps each; the state is the last W-1 inputs, real [B,D,W-1], oldest first.

    The window is float32 at least, whatever the dtype of taps and inputs: inputs of any dtype pass through a state
    unchanged.

    Attributes:
        taps: h[0 … W-1], real [F,W], W >= 1; ``taps[k]`` multiplies ``x[t-k]``.
        skip: the instantaneous gain that is added to h[0], real [D], or None for none.
    """

    taps: Tensor
    skip: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.taps.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return wide_dtype(self.taps)

    def initial_state(self, batch: int, channels: int, method: str = "auto") -> Tensor:
        window = self.taps.shape[1] - 1
        return torch.zeros(batch, channels, window, dtype=self.dtype, device=self.taps.device)

    def check_state(self, state: Tensor, batch: int, channels: int, method: str = "auto") -> None:
        if state.is_complex():
            raise InputError("a filter of taps has a real window for a state, and was given a complex one")
        check_shape(state, (batch, channels, self.taps.shape[1] - 1))

    def choose_method(self, length: int, state: Tensor | None = None) -> str:
        taps = self.taps.shape[1]
        if taps <= FEW or (not torch.compiler.is_exporting() and length < SHORT):
            return "direct"
        return "fft"

    def states(self, x: Tensor, state: Tensor, stops: Sequence[Stop]) -> list[Tensor] | None:
        past = torch.cat([state, x.transpose(1, 2).to(state.dtype)], dim=-1)  # [B,F,W-1+T]
        return [window_at(past, stop, state.shape[-1]) for stop in stops]

    def evaluate(self, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """The filter by the method that suits its length: see ``Evaluate``."""
        return self.methods[self.choose_method(x.shape[1])](self, x, state, reset)

    def _reference(self, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        return fir_reference(x, self.taps, state, reset)

    def _direct(self, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        return fir_direct(x, self.taps.to(x.dtype), state, reset)

    def _blocked(self, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        return fir_blocked(x, self.taps.to(x.dtype), state, reset)

    def _fft(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return fir_fft(x, self.taps.to(x.dtype), state)

    methods = {  # noqa: RUF012, an annotation would make it a field
        "reference": _reference,
        "recurrence": _direct,
        "direct": _direct,
        "fft": by_document(_fft),
        "blocked": _blocked,
        "truncated": evaluate,
    }


def fir_direct(x: Tensor, taps: Tensor, state: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x real [B,T,F], taps [F,W], state [B,F,W-1] -> (y [B,T,F], state): one sum per step, or one addition per tap."""
    length, count = x.shape[1], taps.shape[-1]
    if not torch.compiler.is_exporting() and length < count:  # a graph for every length cannot ask which is longer
        past = torch.cat([state.to(x.dtype), x.transpose(1, 2)], dim=-1)  # [B,F,W-1+T]
        mirrored, seen = taps.flip(-1), past
        if reset is not None:
            document = document_numbers(reset, count)
        outputs = []
        for t in range(length):
            seen = past[..., t : t + count]
            if reset is not None:
                same = document[:, t : t + count] == document[:, t + count - 1, None]
                seen = torch.where(same.unsqueeze(1), seen, 0)
            outputs.append((seen * mirrored).sum(-1))
        y = torch.stack(outputs, dim=1)
    else:
        padded = torch.cat([state.transpose(1, 2).to(x.dtype), x], dim=1)  # [B,W-1+T,F]
        y = fir_sum(padded, taps, None, reset)
    return y, next_window(x, state, reset)


def fir_sum(padded: Tensor, taps: Tensor, bias: Tensor | None, reset: Tensor | None) -> Tensor:
    """``bias + Σ_k taps[k]·padded[t+W-1-k]``, accumulated in the dtype of the taps, one addition per tap.

    Args:
        padded: [B,W-1+T,E], the window and the inputs.
        taps: [E,W].
        bias: [E] or None.
        reset: bool [B,T].
    """
    count = taps.shape[-1]
    length = padded.shape[1] - count + 1
    now = padded[:, count - 1 :]
    y = now * taps[:, 0] if bias is None else torch.addcmul(bias, now, taps[:, 0])
    keep = None  # [B,T,1]: no boundary between the tap's step and the current one
    for k in range(1, count):
        past = padded[:, count - 1 - k : count - 1 - k + length]
        if reset is not None:
            crossed = torch.nn.functional.pad(reset, (k - 1, 0))[:, :length].unsqueeze(-1)  # a boundary k-1 steps ago
            keep = ~crossed if keep is None else keep & ~crossed
            past = torch.where(keep, past, 0)
        y.addcmul_(past, taps[:, k])
    return y


def fir_blocked(x: Tensor, taps: Tensor, state: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x real [B,T,F], taps [F,W], state [B,F,W-1] -> (y [B,T,F], state): chunks of C steps times a matrix [W-1+C,C]."""
    batch, length, channels = x.shape
    window = taps.shape[-1] - 1
    chunk = min(max(CHUNK, window + 1), length)
    count = -(-length // chunk)
    padding = count * chunk - length
    past = torch.cat([state.to(x.dtype), x.transpose(1, 2)], dim=-1)
    past = torch.nn.functional.pad(past, (0, padding)).transpose(0, 1)  # [F,B,W-1+c·C]
    inputs = past.unfold(-1, window + chunk, chunk).reshape(channels, batch * count, window + chunk)  # [F,B·c,W-1+C]
    steps = torch.arange(window + chunk, device=x.device)
    lag = window + steps[:chunk] - steps[:, None]  # of input i for output j
    matrix = torch.where((lag >= 0) & (lag <= window), taps[:, lag.clamp(0, window)], 0)  # [F,W-1+C,C]
    if reset is None:
        y = inputs @ matrix
    else:
        document = torch.nn.functional.pad(document_numbers(reset, window + 1), (0, padding), mode="replicate")
        rows = document.unfold(-1, window + chunk, chunk).flatten(0, 1)  # [B·c,W-1+C]
        rows = rows - rows[:, :1]
        y = segmented_product(inputs, matrix, rows, rows[:, window:])
    y = y.unflatten(1, (batch, count)).permute(1, 2, 3, 0).reshape(batch, count * chunk, channels)
    return y[:, :length], next_window(x, state, reset)


def fir_fft(x: Tensor, taps: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """x real [B,T,F], taps [F,W], state [B,F,W-1] -> (y [B,T,F], state).

    One FFT of window and input, no longer than both together: the wrap-around falls on the outputs at the window's
    steps, which are dropped.
    """
    window, length = taps.shape[-1] - 1, x.shape[1]
    past = torch.cat([state.to(x.dtype), x.transpose(1, 2)], dim=-1)  # [B,F,W-1+T]
    size = past.shape[-1]
    size = 2 * size if torch.compiler.is_exporting() else fft_size(size)  # even for any length
    spectrum = torch.fft.rfft(past, n=size) * torch.fft.rfft(taps, n=size)
    y = torch.fft.irfft(spectrum, n=size)[..., window : window + length].transpose(1, 2)
    return y, next_window(x, state, None)


def next_window(x: Tensor, state: Tensor, reset: Tensor | None) -> Tensor:
    """The last W-1 steps of ``state ++ x``, [B,F,W-1], zero where a boundary came after them."""
    window, length = state.shape[-1], x.shape[1]
    if torch.compiler.is_exporting():  # which of the two is longer must not be decided in a graph for every length
        after = torch.cat([state, x.transpose(1, 2).to(state.dtype)], dim=-1).narrow(-1, length, window)
    else:
        recent = x[:, max(length - window, 0) :].transpose(1, 2).to(state.dtype)
        after = torch.cat([state[..., min(length, window) :], recent], dim=-1)
    if reset is None or window == 0:
        return after
    document = document_numbers(reset, window + 1)[:, -window:]
    return torch.where((document == document[:, -1:]).unsqueeze(1), after, 0)


def window_at(past: Tensor, stop: Stop, size: int) -> Tensor:
    """The window after so many steps: of past [B,F,size+T], which begins with the window before them, [B,F,size]."""
    if not isinstance(stop, Tensor):
        return past[..., stop : stop + size]
    places = stop[:, None, None] + torch.arange(size, device=past.device)
    return past.gather(-1, places.expand(-1, past.shape[1], -1))


def document_numbers(reset: Tensor, taps: int) -> Tensor:
    """The number of each step's document, counting up from 0 at the window before x: bool [B,T] -> int [B,W-1+T]."""
    return torch.nn.functional.pad(reset, (taps - 1, 0)).cumsum(1)
