"""Kernels that begin before their predecessors end: programmatic dependent launch, for the kernels of a decoding step.

Between two kernels of a stream the memory of a GPU is idle for some microseconds: the last programs of the first end
one by one, the next kernel is started, its first reads are under way. A step is 200 kernels of 2 to 60 µs, so this is
a tenth of its time. On compute capability 9.0 and newer, a kernel that is launched with an attribute may begin as soon
as every program of its predecessor has called ``release`` or ended. It does what depends on no kernel of the step, such
as asking for its weights, and then calls ``wait``, before it touches anything else. CUDA graphs keep this.

The rules, by which a step computes the same with and without:

1. ``wait`` returns when the preceding kernel has ended and all it wrote can be read. That kernel waited too, before it
   ended; so, link by link, everything before is over. Hence **every kernel of a step waits**, also where it reads
   nothing of its predecessor, or its successors would overwrite what is still being read: results are allocated where
   earlier ones were freed, and states change in place.
2. Before ``wait`` a kernel reads only what **no kernel of a step writes**: weights, and it writes nothing.
3. A kernel releases **after** it has waited. So two kernels of a step are under way at the most, and none begins before
   everything that was launched before the step is over, the kernels that wrote the weights among them.
4. Kernels of libraries neither release nor wait: they begin when everything before has ended, and what follows begins
   when they have ended.

A product releases when it has read its weights: programs of the next kernel take the places of those that only sum
up. Released at a kernel's beginning, they take bandwidth from what is to be read first: measured, and slower.

In kernels OVERLAP is a constant, false where the attribute is not given: under the interpreter, which cannot run the
instructions, and on older devices, which do not have them.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, ``griddepcontrol``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Everything before this kernel is over."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def release(OVERLAP: tl.constexpr):
    """The next kernel may begin."""
    if OVERLAP:
        gdc_launch_dependents()
