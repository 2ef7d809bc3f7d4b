"""Who chooses the kernels, what is logged of it, and what happens when they cannot run."""

import importlib.util
import logging
import re

import pytest
import torch
from torch import Tensor

from hyaena.errors import InputError, UnsupportedError
from hyaena.ops import Backend, ModalFilter, gate, hyena, resolve_backend, rms_norm, rotary_table, rotate
from hyaena.ops.backend import PLAIN, VARIABLE, log_once, use_pointwise

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("hyaena.ops.triton.device_unsupported_reason", lambda _: None)
    log_once.cache_clear()


@pytest.fixture
def unable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyaena.ops.triton.device_unsupported_reason", lambda _: "the GPU is too old")


@pytest.mark.parametrize(
    ("choice", "variable", "device", "hyena", "required_by"),
    [
        ("triton", None, CPU, True, "backend='triton'"),
        ("triton", "plain", CUDA, True, "backend='triton'"),  # the argument comes before the environment
        ("plain", "triton", CUDA, False, None),
        ("auto", "plain", CUDA, False, None),
        ("auto", "triton", CPU, True, "HYAENA_BACKEND=triton"),
        ("auto", None, CUDA, True, None),
        ("auto", "auto", CUDA, True, None),
        ("auto", None, CPU, False, None),
    ],
)
def test_the_choice(monkeypatch: pytest.MonkeyPatch, choice, variable, device, hyena, required_by) -> None:
    if variable is not None:
        monkeypatch.setenv(VARIABLE, variable)
    for gradients in (False, True):
        got = resolve_backend(choice, device=device, dtype=torch.bfloat16, gradients=gradients)
        assert got == Backend(hyena, pointwise=hyena and not gradients, required_by=required_by)


@pytest.mark.usefixtures("unable")
def test_named_and_unable_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"device": CUDA, "dtype": torch.float32}
    with pytest.raises(UnsupportedError, match=r"backend='triton' cannot run: the GPU is too old"):
        resolve_backend("triton", **options)
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(UnsupportedError, match=rf"{VARIABLE}=triton cannot run: the GPU"):
        resolve_backend("auto", **options)
    with pytest.raises(UnsupportedError, match="float64"):
        resolve_backend("auto", device=CUDA, dtype=torch.float64)
    monkeypatch.setenv(VARIABLE, "tritan")
    with pytest.raises(UnsupportedError, match="auto, triton, plain"):
        resolve_backend("auto", **options)
    with pytest.raises(InputError, match="'tritan': choose one of auto, triton, plain"):
        resolve_backend("tritan", **options)


def test_auto_logs_once_what_it_chose(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose() -> list[Backend]:
        return [resolve_backend("auto", device=CUDA, dtype=torch.float32) for _ in range(3)]

    with caplog.at_level(logging.INFO, logger="hyaena"):
        assert all(it.hyena for it in choose())
        resolve_backend("triton", device=CUDA, dtype=torch.float32)
        resolve_backend("plain", device=CUDA, dtype=torch.float32)
        monkeypatch.setattr("hyaena.ops.triton.device_unsupported_reason", lambda _: "the GPU is too old")
        assert choose() == [PLAIN] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "the Hyena operator, norms, gates and rotary positions run in the fused kernels",
        "the Hyena operator, norms, gates and rotary positions run in plain torch, not the fused kernels: the GPU is "
        "too old",
    ]


def test_pointwise_kernels_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(3)
    assert not use_pointwise("auto", x)
    assert use_pointwise("triton", x)
    monkeypatch.setenv(VARIABLE, "triton")
    assert use_pointwise("auto", x)
    assert not use_pointwise("auto", x, x.clone().requires_grad_())
    assert not use_pointwise("plain", x) and not use_pointwise(PLAIN, x)
    with torch.no_grad():
        assert use_pointwise("auto", x, x.clone().requires_grad_())
    with pytest.raises(UnsupportedError, match=rf"{VARIABLE}=triton cannot run: .* not torch.float64"):
        gate(x.double(), x.double(), "silu")
    monkeypatch.setenv(VARIABLE, "plain")
    assert not use_pointwise("auto", x)


def arguments(dtype: torch.dtype = torch.float32, modes: int = 2) -> tuple[Tensor, Tensor, None, ModalFilter]:
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    filter = ModalFilter(torch.zeros(2, modes, dtype=wide), torch.zeros(2, modes, dtype=wide))
    return torch.zeros(1, 3, 6, dtype=dtype), torch.zeros(6, 3), None, filter


def test_a_record_decides_without_another_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass resolves once: operators that are given the record read neither environment nor device."""
    monkeypatch.setattr("hyaena.ops.backend.resolve_backend", lambda *_, **__: pytest.fail("resolved again"))
    monkeypatch.setenv(VARIABLE, "nonsense")
    x = torch.randn(1, 2, 3, 4)
    rms_norm(x, torch.ones(4), 1e-6, backend=PLAIN)
    gate(x, x, "silu", backend=PLAIN)
    rotate(x, rotary_table(torch.arange(3), 4, 1e4), backend=PLAIN)
    hyena(*arguments(), backend=PLAIN)
    hyena(*arguments(), backend=PLAIN, method="fft")


def test_a_method_and_the_kernels_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    named = resolve_backend("triton", device=CPU, dtype=torch.float32)
    for backend in ("triton", named):
        with pytest.raises(InputError, match="backend='triton' and method='fft' exclude each other"):
            hyena(*arguments(), method="fft", backend=backend)
    monkeypatch.setattr("hyaena.ops.triton.unsupported_reason", lambda *_: pytest.fail("the kernel was tried"))
    monkeypatch.setenv(VARIABLE, "triton")  # the environment decides for calls without a choice of their own
    hyena(*arguments(), method="fft")
    hyena(*arguments(), method="fft", backend=resolve_backend("auto", device=CPU, dtype=torch.float32))


def test_arguments_that_the_kernel_does_not_take(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        hyena(*arguments(torch.float64), backend="triton")
    with pytest.raises(UnsupportedError, match=r"backend='triton' cannot run: .* 1 to 16 modes"):
        hyena(*arguments(modes=17), backend="triton")
    automatic = Backend(hyena=True, pointwise=True)
    with caplog.at_level(logging.INFO, logger="hyaena"):
        for _ in range(2):
            hyena(*arguments(modes=17), backend=automatic)
    (record,) = caplog.records
    assert re.match("a Hyena operator runs in plain torch, not the fused kernels: .* 16 modes", record.getMessage())


def test_without_triton_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install triton"):
        hyena(*arguments(), backend="triton")


def test_without_a_device_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(UnsupportedError, match="CUDA device, and the tensors are on 'cpu'"):
        hyena(*arguments(), backend="triton")
