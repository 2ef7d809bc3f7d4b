"""What programs import from the original's ``utils``."""

from __future__ import annotations

from typing import Any

import torch.distributed


class dotdict(dict):
    """A dictionary whose items are attributes, too; a missing attribute is None.

    ``Loader``, which programs hand on from ``yaml.load``, is not an item.
    """

    def __init__(self, *args: Any, Loader: Any = None, **items: Any) -> None:
        super().__init__(*args, **items)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for special methods, and None is not one
            raise AttributeError(name)
        return self.get(name)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary; libraries such as PEFT read a model's configuration by this method."""
        return dict(self)

    __setattr__ = dict.__setitem__  # type: ignore[assignment]
    __delattr__ = dict.__delitem__  # type: ignore[assignment]


def print_rank_0(message: object, debug: bool = False, end: str = "\n") -> None:
    """Print, in the first of several processes only."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(message, flush=True, end=end)
