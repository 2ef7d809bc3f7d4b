"""The kernels at the width of the 7B, compiled: ``pytest --wide`` on a GPU, before anything is timed."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena.bench.run import SH_7B
from hyaena.ops import (
    DecodeOperators,
    Dense,
    HyenaState,
    KVState,
    ModalFilter,
    RMSNormWeight,
    StepContext,
    hyena,
    rotary_table,
)
from hyaena.ops.triton.decode.operators import FusedDecodeOperators

pytestmark = pytest.mark.wide

CONFIG = replace(SH_7B, layer_types=("hyena", "attention"))
PLAIN = DecodeOperators()
# Rounding of the output's own type (half an ulp, and some for those on the way); float32 sums over up to 10^5 steps.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
STEP = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
# Gradients of float32 parameters sum over T once more than outputs do.
PARAMETERS = 5e-5


class Case(NamedTuple):
    batch: int
    length: int
    width: int
    modes: int
    taps: int
    dtype: torch.dtype
    state: bool
    padded: bool


CASES = [
    Case(2, 1000, CONFIG.hidden_size, 2, 3, torch.bfloat16, True, True),
    Case(1, 20_000, CONFIG.hidden_size, 2, 3, torch.bfloat16, False, False),
    Case(2, 1025, 768, 2, 3, torch.float16, True, False),
    Case(1, 5000, 256, 4, 4, torch.float32, True, False),
    Case(2, 3001, 128, 8, 3, torch.bfloat16, True, True),
    Case(1, 2049, 96, 16, 3, torch.float32, True, True),
    Case(1, 131_072, 64, 2, 3, torch.float32, False, False),
]


class Problem(NamedTuple):
    """The operator's arguments; states and mask may be None."""

    z: Tensor
    weight: Tensor
    bias: Tensor
    filter: ModalFilter
    past: HyenaState | None
    mask: Tensor | None

    def run(self, method: str, here: slice = slice(None), past: HyenaState | None = None) -> tuple[Tensor, HyenaState]:
        """The operator on some of the steps, from its own state or a given one."""
        mask = None if self.mask is None else self.mask[:, here]
        way = {"backend": "triton"} if method == "triton" else {"method": method}
        return hyena(self.z[:, here], self.weight, self.bias, self.filter, past or self.past, mask=mask, **way)

    def exact(self) -> Problem:
        """The same in float64."""
        skip = None if self.filter.skip is None else self.filter.skip.double()
        wide = ModalFilter(self.filter.poles.to(torch.complex128), self.filter.residues.to(torch.complex128), skip)
        past = self.past and HyenaState(self.past.short.double(), self.past.long.to(torch.complex128))
        return Problem(self.z.double(), self.weight.double(), self.bias.double(), wide, past, self.mask)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def make(case: Case) -> Problem:
    """Poles up to the unit circle, padding on the left."""
    batch, length, width, modes, taps, dtype, state, padded = case
    size = 1 - torch.rand(width, modes, device=DEVICE) ** 4 * 0.9
    poles = torch.polar(size, torch.rand(width, modes, device=DEVICE) * 3)
    residues = randn(width, modes, dtype=torch.complex64) * (1 - size + 1e-3).sqrt()
    past = mask = None
    if state:
        past = HyenaState(
            randn(batch, 3 * width, taps - 1, dtype=dtype), randn(batch, width, modes, dtype=torch.complex64)
        )
    if padded:
        mask = torch.arange(length, device=DEVICE) >= torch.randint(0, length, (batch, 1), device=DEVICE)
    weight, bias = randn(3 * width, taps, dtype=dtype), randn(3 * width, dtype=dtype)
    filter = ModalFilter(poles, residues, randn(width))
    return Problem(randn(batch, length, 3 * width, dtype=dtype), weight, bias, filter, past, mask)


def close(value: Tensor, expected: Tensor, tolerance: float) -> None:
    if expected.numel():
        error = float((value.to(expected.dtype) - expected).norm() / expected.norm().clamp(min=1e-30))
        assert error <= tolerance, error  # NaN fails too


def agree(got: tuple[Tensor, HyenaState], expected: tuple[Tensor, HyenaState]) -> None:
    for value, want in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        close(value, want, TOLERANCE[torch.float32 if value.is_complex() else value.dtype])


def name(case: Case) -> str:
    return f"B{case.batch}-T{case.length}-D{case.width}-N{case.modes}-{str(case.dtype)[6:]}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_forward_whole_and_cut_in_two(case: Case) -> None:
    problem, cut = make(case), case.length // 3
    expected = problem.exact().run("blocked")
    agree(problem.run("triton"), expected)
    first, past = problem.run("triton", slice(cut))
    rest, last = problem.run("triton", slice(cut, None), past)
    agree((torch.cat([first, rest], dim=1), last), expected)


@pytest.mark.parametrize("case", [c for c in CASES if c.state], ids=name)
def test_gradients_through_the_operators(case: Case) -> None:
    problem = make(case)
    dy = torch.randn_like(problem.z[..., : case.width])
    assert problem.past is not None
    slopes = [torch.randn_like(t) for t in problem.past]

    def gradients(problem: Problem, method: str) -> tuple[Tensor, ...]:
        assert problem.past is not None
        leaves = [*problem[:3], *problem.filter, *problem.past]
        leaves = [t.detach().requires_grad_() for t in leaves if t is not None]
        again = Problem(*leaves[:3], ModalFilter(*leaves[3:6]), HyenaState(*leaves[6:]), problem.mask)
        y, state = again.run(method)
        loss = (y * dy.to(y.dtype)).sum()
        for t, slope in zip(state, slopes, strict=True):
            loss = loss + (t * slope.to(t.dtype)).real.sum()
        return torch.autograd.grad(loss, leaves)

    for got, want in zip(gradients(problem, "triton"), gradients(problem.exact(), "blocked"), strict=True):
        close(got, want, TOLERANCE[got.dtype] if got.dtype in (torch.bfloat16, torch.float16) else PARAMETERS)


# --- a decoding step


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("batch", [1, 2])
def test_products(dtype: torch.dtype, batch: int) -> None:
    width, inner, fused = CONFIG.hidden_size, CONFIG.intermediate_size, FusedDecodeOperators()
    norm = RMSNormWeight(randn(width, dtype=dtype), 1e-5, True)
    exact = norm._replace(weight=norm.weight.double())
    a, b = (randn(inner, width, dtype=dtype) / width**0.5 for _ in range(2))
    x, r = randn(batch, width, dtype=dtype), randn(batch, inner, dtype=dtype)
    want = PLAIN.linear(x.double(), Dense(a.double()), norm=exact, residual=r.double())
    close(fused.linear(x, Dense(a), norm=norm, residual=r), want, STEP[dtype])
    want = PLAIN.gate(x.double(), Dense(a.double()), Dense(b.double()), norm=exact, activation="silu")
    close(fused.gate(x, Dense(a), Dense(b), norm=norm, activation="silu"), want, STEP[dtype])


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("lengths", [[5000], [5000, 1, 3334]])
def test_attention_and_its_cache(dtype: torch.dtype, lengths: list[int]) -> None:
    heads, groups, head_dim = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim
    fused, batch = FusedDecodeOperators(), len(lengths)

    def context() -> StepContext:
        table = rotary_table(torch.arange(max(lengths) + 1, device=DEVICE), head_dim, CONFIG.rope_theta)
        on_device = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        return StepContext(fused, on_device, on_device + 1, table)

    state = KVState.allocate(1, groups, 1, head_dim, dtype, DEVICE).select([0] * batch)
    state = state.reserve([length + 100 for length in lengths])
    for tensor in state.tensors():
        tensor.normal_()
    qkv, plain = randn(batch, (heads + 2 * groups) * head_dim, dtype=dtype), state.select(list(range(batch)))
    want = PLAIN.attention(qkv.double(), plain, context())
    for i, n in enumerate(lengths):
        state.keys(i)[:, n - 1 :] = torch.nan
        state.values(i)[:, n - 1 :] = torch.nan
    close(fused.attention(qkv, state, context()), want, STEP[dtype])
    for i, n in enumerate(lengths):
        close(state.keys(i)[:, n - 1], plain.keys(i)[:, n - 1], STEP[dtype])
        close(state.values(i)[:, n - 1], plain.values(i)[:, n - 1], STEP[dtype])


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("batch", [1, 5])
def test_the_hyena_step_in_place(dtype: torch.dtype, batch: int) -> None:
    problem = make(Case(batch, 1, CONFIG.hidden_size, 2, 3, dtype, True, False))
    want = problem.exact().run("blocked")
    z, weight, bias, filter, past, _ = problem
    assert past is not None and filter.skip is not None
    y = FusedDecodeOperators().hyena(z[:, 0], weight, bias, filter._replace(skip=filter.skip.to(dtype)), past)
    close(y, want[0][:, 0], STEP[dtype])
    close(past.long, want[1].long, TOLERANCE[torch.float32])
    assert torch.equal(past.short.double(), want[1].short)
