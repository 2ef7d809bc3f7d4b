"""The operator's long convolution by matrix products in chunks, against the FFT."""

from __future__ import annotations

import torch

from benchmarks.registry import Row, Session, Summary, Target, pairwise, require_equal
from hyaena.bench.clock import Side, take_turns
from hyaena.ops import ModalFilter, long_conv


def blocked_against_fft(session: Session) -> list[Row]:
    """One sequence, float32, from an empty state; both sides also produce the final state."""
    channels, modes, length, rounds = (32, 2, 256, 3) if session.quick else (768, 2, 8192, 15)
    torch.manual_seed(0)
    x = torch.randn(1, length, channels)
    magnitude = 0.999 - 0.5 * torch.rand(channels, modes)
    poles = torch.polar(magnitude, torch.pi * (2 * torch.rand(channels, modes) - 1))
    residues = torch.randn(channels, modes, dtype=torch.complex64) / modes
    filter = ModalFilter(poles, residues, torch.randn(channels))

    def evaluate(method: str) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            return long_conv(x, filter, method=method)

    (y_blocked, state_blocked), (y_fft, state_fft) = evaluate("blocked"), evaluate("fft")
    # An FFT of 16,384 points in float32 leaves about 1e-6 of the largest output.
    require_equal("output of blocked and fft", y_blocked, y_fft, 2e-5)
    require_equal("final state of blocked and fft", state_blocked, state_fft, 2e-5)

    seconds = take_turns({m: Side(lambda m=m: evaluate(m)) for m in ("blocked", "fft")}, rounds)
    return [
        Row(
            what=f"long convolution, D {channels}, N {modes}, T {length:,}",
            unit="s",
            ours=Summary.of(seconds["blocked"].values),
            baseline_name="fft",
            baseline=Summary.of(seconds["fft"].values),
            ratio=pairwise(seconds["fft"].values, seconds["blocked"].values),
            ratio_name="fft / blocked",
            target=Target(">=", 5),
            note="One call each, filter tables and final state included.",
        )
    ]
