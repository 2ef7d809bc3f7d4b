"""Rounding that makes the error of a layer's output small for inputs of known second moments."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from hyaena.errors import InputError
from hyaena.ops import cpu, widen
from hyaena.ops.narrow import Narrow
from hyaena.quant import QuantizedLinear, feed_back, feedback, round_weight
from hyaena.quant.moments import blocks_of, expected_moments, in_blocks
from hyaena.quant.rounding import limits_of
from hyaena.schemes import SCHEMES

ALL = pytest.mark.parametrize("name", SCHEMES)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def correlated(inputs: int, blocks: int = 1) -> Tensor:
    """Second moments of inputs that are mixtures of fewer ones."""
    x = numbers(4 * inputs, inputs // 2) @ numbers(inputs // 2, inputs) + 0.3 * numbers(4 * inputs, inputs)
    x = x.unflatten(-1, (blocks, -1)).transpose(0, 1)
    return x.mT @ x / x.shape[1]


def output_error(layer: Narrow, weight: Tensor, moments: Tensor) -> Tensor:
    """Of each output, the mean of its square."""
    blocks = (widen(layer, torch.float32) - weight).unflatten(-1, (len(moments), -1)).transpose(0, 1)
    return ((blocks @ moments) * blocks).sum((0, 2))


@ALL
@pytest.mark.parametrize("blocks", [1, 3])
def test_outputs_are_nearer_than_those_of_the_nearest_numbers(name: str, blocks: int) -> None:
    weight, moments = numbers(40, 384), correlated(384, blocks)
    plain = round_weight(weight, SCHEMES[name])
    found = feed_back(weight, plain, SCHEMES[name], moments)
    assert torch.equal(found.scale, plain.scale) and found.codes.dtype == plain.codes.dtype
    assert output_error(found, weight, moments).mean() < 0.8 * output_error(plain, weight, moments).mean()


@ALL
def test_a_trained_weight_tells_of_its_inputs(name: str) -> None:
    """Outputs for inputs that were never shown: a sum of steps of gradient descent lies in their directions."""
    x = numbers(600, 64) @ numbers(64, 128) + 0.3 * numbers(600, 128)
    weight, moments = numbers(96, 600) @ x, (x.T @ x / 600)[None]
    layer = QuantizedLinear(128, 96, SCHEMES[name])
    layer.narrow(weight)
    plain = round_weight(weight, SCHEMES[name])
    assert output_error(layer.record(), weight, moments).mean() < 0.8 * output_error(plain, weight, moments).mean()


def test_what_weights_tell() -> None:
    weight = numbers(5, 6)
    products = weight.T @ weight
    expected = (products / products.diagonal().mean() + 2 * torch.eye(6)) / 3
    torch.testing.assert_close(expected_moments(weight)[0], expected)
    torch.testing.assert_close(expected_moments(1e38 / 4 * weight)[0], expected)
    assert torch.equal(expected_moments(0 * weight)[0], torch.eye(6))


def test_widths_that_have_no_divisor_are_blocks_too() -> None:
    assert blocks_of(4096) == (2, 2048) and blocks_of(2053) == (2, 1027)
    weight, x = numbers(16, 131), numbers(300, 30) @ numbers(30, 131)
    blocks = in_blocks(x, 60)
    moments = blocks.mT @ blocks / 300
    assert moments.shape == (3, 44, 44)
    plain = round_weight(weight, SCHEMES["int8"])
    found, none = feed_back(weight, plain, SCHEMES["int8"], moments), torch.zeros(16, 1)
    errors = [
        sum(((d @ h) * d).sum() for d, h in zip(torch.cat([e, none], 1).split(44, 1), moments, strict=True))
        for e in (widen(layer, torch.float32) - weight for layer in (found, plain))
    ]
    assert errors[0] < 0.7 * errors[1]


@ALL
def test_inputs_that_have_nothing_in_common_leave_the_nearest_numbers(name: str) -> None:
    weight = numbers(7, 256)
    plain = round_weight(weight, SCHEMES[name])
    found = feed_back(weight, plain, SCHEMES[name], torch.diag(numbers(256).square())[None])
    torch.testing.assert_close(widen(found, torch.float32), widen(plain, torch.float32))
    never = feed_back(weight, plain, SCHEMES[name], torch.zeros(2, 128, 128))
    torch.testing.assert_close(widen(never, torch.float32), widen(plain, torch.float32))


def test_two_columns_by_hand() -> None:
    """Inputs that are always the same: what is rounded up in one column is rounded down in the other."""
    weight = torch.tensor([[0.4, 0.4, 127.0], [-0.6, -0.6, 127.0], [0.2, 0.2, 127.0]])
    moments = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    plain = Narrow(weight.round().to(torch.int8), torch.ones(3, 1))
    found = feed_back(weight, plain, SCHEMES["int8"], moments).codes[:, :2]
    assert plain.codes[:, :2].sum(1).tolist() == [0, -2, 0] and found.sum(1).tolist() == [1, -1, 0]


def test_columns_taken_together_are_those_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments = numbers(16, 96), correlated(96)
    plain = round_weight(weight, SCHEMES["int4"])
    monkeypatch.setattr(feedback, "STEP", 1)
    one = feed_back(weight, plain, SCHEMES["int4"], moments)
    monkeypatch.setattr(feedback, "STEP", 40)
    monkeypatch.setattr(feedback, "ROWS", {"cpu": 7})
    many = feed_back(weight, plain, SCHEMES["int4"], moments)
    torch.testing.assert_close(*(output_error(layer, weight, moments) for layer in (one, many)), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("columns", "rows"), [(64, 70), (5, 64), (1, 3)])
@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if not scheme.floating])
def test_the_compiled_step_is_the_plain_one(name: str, columns: int, rows: int) -> None:
    """All numbers are eighths, so that no sum is rounded, and equal ones are: halves go to the even number."""
    if (reason := cpu.unsupported_reason(torch.float32)) is not None:
        pytest.skip(reason)
    from hyaena.quant import compiled_feedback

    draw = torch.Generator().manual_seed(rows)
    wanted, later = (torch.randint(-200, 200, (columns, rows), generator=draw) / 8 for _ in range(2))
    scale = 2.0 ** torch.randint(-2, 3, (rows,), generator=draw).expand(columns, rows).contiguous()
    later *= scale
    factor = torch.randint(-1, 2, (columns, columns + 9), generator=draw).float()[:, :columns]
    results = []
    for choose in (
        partial(feedback.choose_columns, scheme=SCHEMES[name]),
        partial(compiled_feedback.choose_columns, limits=limits_of(SCHEMES[name])[:2]),
    ):
        q, error = torch.empty(2, columns, rows)
        choose(wanted, 1 / scale, scale, later.clone(), factor, q, error)
        results.append((q, error))
    (q, error), compiled = results
    assert torch.equal(q, compiled[0]) and torch.equal(error, compiled[1])
    assert len(q.unique()) > 1


def test_fewer_tokens_than_inputs_are_no_obstacle() -> None:
    weight, x = numbers(5, 128), numbers(3, 128)
    plain = round_weight(weight, SCHEMES["int4"])
    moments = (x.T @ x / 3)[None]
    found = feed_back(weight.bfloat16(), plain, SCHEMES["int4"], moments)
    assert output_error(found, weight, moments).sum() < 0.1 * output_error(plain, weight, moments).sum()


def test_inputs_whose_squares_float32_hardly_holds_leave_the_nearest_numbers() -> None:
    """Products of 1e-22 are a few of the smallest steps of float32: rounded, they are no moments."""
    weight, x = numbers(5, 128), 1e-22 * numbers(1, 128)
    plain = round_weight(weight, SCHEMES["int4"])
    found = feed_back(weight, plain, SCHEMES["int4"], (x.T @ x)[None])
    torch.testing.assert_close(widen(found, torch.float32), widen(plain, torch.float32))


@pytest.mark.parametrize("moments", [-torch.eye(128), torch.full((128, 128), torch.nan)])
def test_moments_that_no_inputs_have_are_refused(moments: Tensor) -> None:
    weight = numbers(5, 128)
    with pytest.raises(InputError, match="moments are not those of any inputs: take them from"):
        feed_back(weight, round_weight(weight, SCHEMES["int8"]), SCHEMES["int8"], moments[None])
