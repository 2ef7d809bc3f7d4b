"""The threads that compute a decoding step: those that torch computes with.

torch and its parallel operators run on the threads of an OpenMP library. A second pool beside it would wait for the
cores that the first one still spins on. So kernels are handed to that library itself, through the entry point that
compilers call for a parallel region: ``GOMP_parallel(function, data, threads, flags)``, which GNU's library defines and
LLVM's and Intel's define as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from array import array
from collections.abc import Callable
from pathlib import Path

import torch


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The OpenMP library that torch was linked with, through torch's own, and no other; None where there is none."""
    folder = Path(torch.__file__).parent / "lib"
    for path in (folder / "libtorch_cpu.so", folder / "libtorch_cpu.dylib"):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(str(path))
            if hasattr(library, "GOMP_parallel") and hasattr(library, "omp_get_num_threads"):
                return library
    return None


@functools.cache
def _fork() -> Callable[..., None] | None:
    """``GOMP_parallel``; None where there is no such library."""
    library = _library()
    if library is None:
        return None
    function = library.GOMP_parallel
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


@functools.cache
def size_and_yield() -> tuple[int, int]:
    """Addresses of ``omp_get_num_threads`` and of what offers the processor to others; 0 where there is none."""
    library = _library()
    if library is None:
        return 0, 0
    offer = getattr(ctypes.CDLL(None), "sched_yield", None)
    found = [library.omp_get_num_threads, offer]
    size, offer = (0 if f is None else ctypes.cast(f, ctypes.c_void_p).value or 0 for f in found)
    return size, offer


@functools.cache
def compute_alone_behind_forks() -> None:
    """Have children of this process that are forks of it compute on one thread.

    A fork has none of the threads of its parent. GNU's library waits for them nonetheless: the first parallel operator
    of a child, be it one of torch's, would never end. Other libraries start new ones.
    """
    library = _library()
    if hasattr(os, "register_at_fork") and not hasattr(library, "__kmpc_fork_call"):
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@functools.cache
def _direct(address: int) -> Callable[..., None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def run(kernel: int, arguments: array[int], threads: int) -> None:
    """Run a kernel on so many threads; they share its work by counting in the first of its arguments.

    Args:
        kernel: the address of a function ``void(int64 *arguments)``.
        arguments: 64-bit numbers, of this call alone.
        threads: at most; the kernel may end before all of them have begun.
    """
    data, _ = arguments.buffer_info()
    fork = _fork() if threads > 1 else None
    if fork is None:
        _direct(kernel)(data)
    else:
        fork(kernel, data, threads, 0)
