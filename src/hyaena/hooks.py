"""Forward hooks of one thread: other threads may use the model meanwhile, as if the hooks were not there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class OwnHook:
    """A hook that is called where the thread that made it calls the module, and nowhere else.

    Args:
        function: of a module and its arguments, and behind a forward also of what it returned.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.thread = function, threading.get_ident()

    def __call__(self, *args: Any) -> Any:
        return self.function(*args) if self.thread == threading.get_ident() else None


@contextmanager
def observing(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]], *, before: bool = False) -> Iterator[None]:
    """Within it, functions are hooks of modules in this thread: behind their forwards, or ``before`` them."""
    handles = []
    try:
        for module, function in hooks:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            handles.append(register(OwnHook(function)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module in this thread does more than its forward: kernels that read its weights would leave
    that out.
    """
    after, before = module._forward_hooks, module._forward_pre_hooks
    return bool(after or before) and bool(hooks_here((after, before)))


def hooks_here(tables: Iterable[dict[int, Any]]) -> list[Any]:
    """The hooks in tables that this thread calls."""
    here = threading.get_ident()
    # lists: another thread may add and remove its own meanwhile
    hooks = (hook for table in tables for hook in list(table.values()))
    return [hook for hook in hooks if not isinstance(hook, OwnHook) or hook.thread == here]
