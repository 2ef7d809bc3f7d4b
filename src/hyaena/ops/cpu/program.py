"""A decoding step as one call: the kernels of a step that was taken once, run one after another by a team of threads.

Calling a kernel costs more than the work of a small one: Python makes its arguments, and threads are woken. A step
calls the same kernels with the same addresses each time, since states, tables and weights do not move. So a step is
recorded while it is taken, and from then on the list is run by one compiled function. Between two kernels the threads
wait for one another.
"""

from __future__ import annotations

from array import array
from functools import cache
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hyaena.ops.cpu import team
from hyaena.ops.cpu.memory import STAMP, ask, call, function, kernel, publish, published, take, word

# Places of the arguments: 0 counts the threads that have arrived.
DONE, COUNT, CALLS, TEAM_SIZE, YIELD = range(1, 6)

PATIENCE = 1 << 12
"""Looks at a number that another thread will publish, before the processor is offered to others."""


@function
def meet(p, threads, counters):
    """Wait for the other threads. The last one clears the counters of the kernel that all of them have left."""
    done = published(p, DONE)
    if take(p, 0) == threads - 1:
        publish(counters, 0, 0)
        publish(counters, 1, 0)
        publish(p, 0, 0)
        publish(p, DONE, done + 1)
        return
    looks = 0
    while published(p, DONE) == done:
        looks += 1
        if looks % PATIENCE == 0 and word(p, YIELD):
            ask(word(p, YIELD))


@function
def run_all(p):
    """Every kernel of a list of pairs: the address of the code, and that of its arguments."""
    threads = ask(word(p, TEAM_SIZE)) if word(p, TEAM_SIZE) else 1
    calls = word(p, CALLS)
    for i in range(word(p, COUNT)):
        arguments = word(calls, 2 * i + 1)
        call(word(calls, 2 * i), arguments)
        meet(p, threads, arguments)


@cache
def _kernel() -> Any:
    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        run_all(p)

    return entry


class Program:
    """Kernels with their arguments, in the order in which a step called them.

    Attributes:
        work: numbers that they handle together.
        kept: tensors that were made between them: what their arguments point to must stay.
    """

    def __init__(self) -> None:
        self.work = 0
        self.kept: list[Tensor] = []
        self._calls = array("q")
        self._arguments: list[array[int]] = []
        self._header = array("q")

    def add(self, code: int, arguments: array[int], work: int) -> None:
        """Append a call, whose counters are zero or will be cleared here."""
        own = array("q", arguments)
        own[0] = 0
        self._calls.extend((code, own.buffer_info()[0]))
        self._arguments.append(own)
        self.work += work

    @property
    def count(self) -> int:
        return len(self._arguments)

    def run(self, threads: int) -> None:
        """Run them all on so many threads."""
        if not self._header:
            self._header.extend((0, 0, self.count, self._calls.buffer_info()[0], *team.size_and_yield()))
        team.run(_kernel().address, self._header, threads)


class Recorder(TorchDispatchMode):
    """While this is entered, notes whether torch computes anything itself, which a program would leave out.

    Kernels that no program would hold must not run meanwhile: ``ops.narrow`` leaves products to torch in such modes.

    Attributes:
        program: what kernels are added to; None once torch has computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.program: Program | None = Program()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.program is not None:
            if func._schema.name in _ALLOCATIONS:
                self.program.kept.append(result)
            elif func._schema.is_mutable or not _is_view(result, args):
                self.program = None
        return result


_ALLOCATIONS = {f"aten::{name}" for name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")}


def _is_view(result: Any, args: Any) -> bool:
    """Whether a result is the memory of an argument, seen otherwise."""
    if not isinstance(result, Tensor):
        return False
    here = result.untyped_storage().data_ptr()
    return any(isinstance(t, Tensor) and t.untyped_storage().data_ptr() == here for t in args)
