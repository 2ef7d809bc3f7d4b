"""Capture of CUDA graphs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_one = threading.Lock()
"""Captures one graph at a time: the collector runs again at the end of each."""


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, other: torch.cuda.CUDAGraph | None) -> Iterator[None]:
    """Capture what the body launches, in the memory of another graph where one is given.

    Other threads may use the device meanwhile. Python's collector of reference cycles may not run: the driver gives a
    capture up when an older graph is destroyed, or memory is freed, within it.
    """
    with _one:
        collects = gc.isenabled()
        gc.disable()
        try:
            pool = None if other is None else other.pool()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                yield
        finally:
            if collects:
                gc.enable()
