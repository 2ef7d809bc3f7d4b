"""Kernels that begin before their predecessors end: programmatic dependent launch, for the kernels of a decoding step.

Between two kernels of a stream the memory of a GPU is idle for some microseconds: the last programs of the first end
one by one, the next kernel is started, its first reads are under way. A step is 200 kernels of 2 to 60 µs, so this is
a tenth of its time. On compute capability 9.0 and newer, a kernel that is launched with an attribute may begin as soon
as every program of its predecessor has begun and called ``release``. It does what depends on no kernel of the step,
such as asking for its first weights, and then calls ``wait``, before it touches anything else. CUDA graphs keep this.

The rules, by which a step computes the same with and without:

1. ``wait`` returns when the preceding kernel has ended and all it wrote can be read. That kernel waited too, before it
   ended; so, link by link, everything before is over. Hence **every kernel of a step waits**, also where it reads
   nothing of its predecessor, or its successors would overwrite what is still being read: results are allocated where
   earlier ones were freed, and states change in place.
2. Before ``wait`` a kernel reads only what **no kernel of a step writes**: weights, and it writes nothing. Its
   predecessors may not have begun to wait themselves: several kernels may be under way at once.
3. The first kernel of a step waits *before* it releases. So no kernel of a step begins before everything that was
   launched before the step is over, the kernels that wrote the weights among them.
4. Kernels of libraries neither release nor wait: they begin when everything before has ended, and what follows begins
   when they have ended.

Releasing takes nothing from the kernel that does it: the next one's programs follow when all of its own have begun.

In kernels the mode is a constant, ``OFF`` where the attribute is not given: under the interpreter, which cannot run the
instructions, and on older devices, which do not have them.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, ``griddepcontrol``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

OFF, EARLY, LATE = 0, 1, 2
"""No overlap; the next kernel is released at a kernel's beginning, or before its end."""


@triton.jit
def release_early(MODE: tl.constexpr):
    """At a kernel's beginning: the next one may begin."""
    if MODE == 1:
        gdc_launch_dependents()


@triton.jit
def wait(MODE: tl.constexpr):
    """Everything before this kernel is over."""
    if MODE > 0:
        gdc_wait()


@triton.jit
def release_late(MODE: tl.constexpr):
    """Before a kernel's last results: the next one may begin."""
    if MODE == 2:
        gdc_launch_dependents()
