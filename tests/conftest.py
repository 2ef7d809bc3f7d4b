"""What every test shares: one torch thread, fixed seeds, and the golden cases."""

from __future__ import annotations

import functools
import gc
import os
import random
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from types import FunctionType, SimpleNamespace

# A shell that starts a run in the background has it ignore Ctrl-C, and every process under it. Tests send that signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported, and for the processes that tests start: the workers of a run share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton compiles or interprets kernels for a whole process, as this says when they are defined. They are compiled where
# there is a GPU, and interpreted elsewhere. Whoever asks for the interpreter gets what machines without a GPU do.
if os.environ.get("TRITON_INTERPRET") == "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)

# torch.device as a context looks up the functions that it redirects once, at its first use. A test that replaces one of
# them for a while must not be that first use, or later models on the meta device would be built in real memory.
with torch.device("meta"):
    torch.empty(0)

# The same examples on every run and machine, and no time limit on one that a busy machine slows down.
settings.register_profile("hyaena", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("hyaena")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state, in whatever order and process it runs."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of all golden cases; each case is a subfolder (see its README)."""
    return GOLDEN


@pytest.fixture(scope="session", params=["sh-tiny", "evo-tiny", "evo8k-tiny", "evo2-tiny", "evo2-tiny/hcm128"])
def golden_case(request: pytest.FixtureRequest) -> Path:
    """The folder of one golden case; a test that asks for it runs once per case."""
    return GOLDEN / request.param


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--wide", action="store_true", help="also test kernels at the width of the 7B, on a GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--wide") or not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("wide"):
                item.add_marker(pytest.mark.skip(reason="the 7B's width: needs --wide and a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave out of the tests' time what is no work of theirs.

    The garbage collector does not look at what collection makes, modules and thousands of tests, neither now nor later:
    to look at all of it once takes 0.3 s. Triton's interpreter exchanges the language for its own once for each
    function, not at every call of one inside a kernel.
    """
    gc.disable()
    result = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None:
        exchange = functools.cache(interpreter._patch_lang)

        def exchange_once(function: FunctionType) -> SimpleNamespace:
            exchange(function)
            return SimpleNamespace(restore=lambda: None)  # at the end of a launch

        interpreter._patch_lang = exchange_once
    return result
