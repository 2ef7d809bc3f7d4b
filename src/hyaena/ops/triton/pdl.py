"""Programmatic dependent launch: kernels that start before their predecessors end, above all those of a decoding step.

Between two kernels of a stream the memory of a GPU is idle for some microseconds: the last programs of the first end
one by one, the next kernel is launched, its first reads are in flight. A step is 160 kernels of 2 to 60 µs, so this is
a tenth of its time. On compute capability 9.0 and newer, a kernel that is launched with an attribute may start as soon
as every program of its predecessor has called ``gdc_launch_dependents`` or ended. It does what depends on no kernel of
the step, such as loading its weights, and then calls ``gdc_wait``, before it touches anything else. CUDA graphs keep
this.

The rules under which a step computes the same with and without:

1. ``gdc_wait`` returns when the preceding kernel has ended and all it wrote can be read. That kernel waited too, before
   it ended, and so did every kernel before it. Hence **every kernel of a step waits**, also where it reads nothing of
   its predecessor: otherwise its successors would overwrite what is still being read, because results are allocated
   where earlier ones were freed, and states change in place.
2. Before ``gdc_wait`` a kernel reads only what **no kernel of a step writes** (weights), and writes nothing.
3. A kernel launches its dependents **after** it has waited. So at most two kernels of a step are in flight, and none
   starts before everything that was launched before the step has ended, the kernels that wrote the weights included.
4. Kernels of libraries, and ours that are launched without the attribute (the norm of several rows), neither wait nor
   launch early: they start when everything before has ended, and what follows starts when they have ended.

The kernels of one call of ``hyena`` overlap by the same rules. The first of them is launched without the attribute and
may launch the next when it begins: all that was launched before the call has ended then.

A product launches its dependents when it has read its weights: programs of the next kernel take the places of those
that only sum up. Launched at a kernel's beginning, they take bandwidth from its own reads: measured, and slower.

In kernels OVERLAP is a constant, false where the attribute is not given: under the interpreter, which cannot run the
instructions, and on older devices, which do not have them.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, ``griddepcontrol``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def gdc_wait(OVERLAP: tl.constexpr):
    """Wait until the preceding kernel has ended and its writes are visible (griddepcontrol.wait)."""
    if OVERLAP:
        cuda.gdc_wait()


@triton.jit
def gdc_launch_dependents(OVERLAP: tl.constexpr):
    """Let the dependent kernel launch (griddepcontrol.launch_dependents)."""
    if OVERLAP:
        cuda.gdc_launch_dependents()
