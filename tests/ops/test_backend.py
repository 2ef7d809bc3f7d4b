"""Who chooses the kernel, what is said of it, and what happens when it cannot run."""

import importlib.util
import logging

import pytest
import torch

from hyaena.errors import UnsupportedError
from hyaena.ops import FUSED_METHODS, METHODS, ModalFilter, gate, hyena
from hyaena.ops.backend import VARIABLE, log_once, use_kernels, use_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def able() -> None:
    return None


def unable() -> str:
    return "the sun is too bright"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    log_once.cache_clear()


@pytest.mark.parametrize(
    ("method", "variable", "device", "obstacle", "expected"),
    [
        ("triton", None, CPU, able, True),
        ("triton", "plain", CUDA, able, True),  # the argument comes before the environment
        ("fft", "triton", CUDA, able, False),
        ("auto", "plain", CUDA, able, False),
        ("auto", "triton", CPU, able, True),
        ("auto", None, CUDA, able, True),
        ("auto", "auto", CUDA, unable, False),
        ("auto", None, CPU, able, False),
    ],
)
def test_the_choice(monkeypatch: pytest.MonkeyPatch, method, variable, device, obstacle, expected) -> None:
    if variable is not None:
        monkeypatch.setenv(VARIABLE, variable)
    assert use_triton(method, obstacle, device) is expected


def test_asked_for_by_name_and_unable_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"method 'triton' cannot run: the sun is too bright"):
        use_triton("triton", unable, CUDA)
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(UnsupportedError, match=rf"{VARIABLE}=triton cannot run: the sun"):
        use_triton("auto", unable, CPU)
    monkeypatch.setenv(VARIABLE, "tritan")
    with pytest.raises(UnsupportedError, match="auto, triton, plain"):
        use_triton("auto", able, CPU)


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hyaena"):
        for _ in range(3):
            use_triton("auto", able, CUDA)
            use_triton("auto", unable, CUDA)
            use_triton("triton", able, CUDA)
            use_triton("fft", able, CUDA)
    assert [record.getMessage() for record in caplog.records] == [
        "the Hyena operator runs in the fused kernels",
        "the Hyena operator runs in plain torch, not the fused kernels: the sun is too bright",
    ]


def test_pointwise_kernels_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyaena.ops.triton.device_unsupported_reason", lambda _: None)
    x = torch.zeros(3)
    assert not use_kernels(x)
    monkeypatch.setenv(VARIABLE, "triton")
    assert use_kernels(x)
    assert not use_kernels(x, x.clone().requires_grad_())
    with torch.no_grad():
        assert use_kernels(x, x.clone().requires_grad_())
    with pytest.raises(UnsupportedError, match=rf"{VARIABLE}=triton cannot run: .* not torch.float64"):
        gate(x.double(), x.double(), "silu")
    monkeypatch.setenv(VARIABLE, "plain")
    assert not use_kernels(x)


def test_pointwise_kernels_say_for_themselves_what_was_chosen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hyaena"):
        for _ in range(2):
            use_kernels(torch.zeros(3))
    (record,) = caplog.records
    assert record.getMessage().startswith("norms, gates and rotary positions run in plain torch, not the fused kernels")


def call(dtype: torch.dtype = torch.float32, modes: int = 2) -> None:
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    filter = ModalFilter(torch.zeros(2, modes, dtype=wide), torch.zeros(2, modes, dtype=wide))
    hyena(torch.zeros(1, 3, 6, dtype=dtype), torch.zeros(6, 3), None, filter, method="triton")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"dtype": torch.float64}, "float64"), ({"modes": 17}, "1 to 16 modes")],
)
def test_arguments_that_the_kernel_does_not_take(arguments, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        call(**arguments)


def test_without_triton_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install triton"):
        call()


def test_without_a_device_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(UnsupportedError, match="CUDA device, and the tensors are on 'cpu'"):
        call()


def test_the_names_of_fused_methods_are_their_own() -> None:
    assert set(FUSED_METHODS) == {"triton"}
    assert not set(FUSED_METHODS) & set(METHODS)
    assert FUSED_METHODS["triton"].reset
