"""Noticing that a model was changed: recorded steps and graphs hold the addresses of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import is_

from torch import Tensor, nn

from hyaena.hooks import hooks_here

PLAIN = (Tensor, nn.Parameter)
"""Types of tensors that surely have an address."""

END = object()
"""Stands behind all parts: where there are more or fewer than before, it is compared with another."""


class Parts:
    """The modules, tensors and hooks of a model at one moment.

    To compare takes some microseconds, so it is done before each step. Numbers that were changed in place are no
    change: steps read them where they are. Their memory is kept, so that no other numbers can lie at an address.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        tables = [table for m in modules for table in (m._modules, m._parameters, m._buffers)]
        self._tables = [table for table in tables if table]  # modules and tensors are named where there are some
        self._hook_tables = [table for m in modules for table in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks = self._hooks_now()
        self._values = list(self._now())
        self._tensors = [t for t in self._values if isinstance(t, Tensor) and type(t) in PLAIN]
        self._memory = [t.untyped_storage() for t in self._tensors]
        self._places = self._addresses()

    def unchanged(self) -> bool:
        """Whether the model still has these parts alone, each where it was."""
        if self._hooks_now() != self._hooks or not all(map(is_, self._now(), self._values)):
            return False
        return self._addresses() == self._places

    def _hooks_now(self) -> list[object]:
        """Those that a step of this thread would have to call."""
        return hooks_here(filter(None, self._hook_tables))

    def _now(self) -> Iterator[object]:
        return chain(chain.from_iterable(map(dict.values, self._tables)), (END,))

    def _addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))
