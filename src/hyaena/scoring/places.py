"""Where vectors are taken from a model: layers by number, modules by our name or the original's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from hyaena.arguments import as_whole
from hyaena.errors import InputError, nearest, shown
from hyaena.formats.stripedhyena.modules import INPUT, original_module, our_module
from hyaena.hooks import observing
from hyaena.model import StripedHyena
from hyaena.scoring.reader import Reader, Span

Layer = int | str
Observe = Callable[[str, Tensor, Sequence[Span]], None]

NORM, HEAD = "norm", "lm_head"
_LAYER = re.compile(r"layers\.(\d+)(\..+)?")


class Place(NamedTuple):
    """A place in a model.

    Attributes:
        name: of the module, as in ``named_modules``, with ``.input`` where its input is meant.
        depth: how many layers have to run to get there, one more than there are for the final norm.
    """

    name: str
    depth: int


def find_place(model: StripedHyena, layer: Layer) -> Place:
    """Find what a number or a name means.

    ``i`` is the residual stream behind layer i, from 0 (negative numbers count from the end, so -1 is what the final
    norm reads); ``"embed"`` is what layer 0 reads, ``"norm"`` the final norm, ``"unembed"`` the logits. Other names are
    those of modules, ours (``"layers.20.mlp.down_proj"``) or the original's (``"blocks.20.mlp.l3"``), and mean their
    outputs; with ``.input`` behind them what they read.

    Raises:
        InputError: a layer or a module that this model does not have; the message names the nearest.
    """
    count = len(model.layers)
    number = as_whole(layer)
    if number is not None:
        if not -count <= number < count:
            raise InputError(f"layer {number} does not exist: this model has layers 0 … {count - 1} (or -{count} … -1)")
        return Place(f"layers.{number % count}", number % count + 1)
    if not isinstance(layer, str):
        raise InputError(f"a layer is a number or the name of a module, not {shown(layer)}")
    modules = dict(model.named_modules())
    name = {"embed": "embed_tokens", "lm_head": HEAD}.get(layer)
    for candidate in (name, layer, our_module(layer)):
        module = (candidate or "").removesuffix(INPUT)
        if candidate is not None and (candidate == HEAD or (module and module in modules)):
            return Place(candidate, _depth(candidate, count))
    known = [name for name in modules if name and not isinstance(modules[name], nn.ModuleList)]
    near = nearest(layer, ["embed", NORM, "unembed", *known, *filter(None, map(original_module, known))])
    hint = f"did you mean {near}?" if near else f"name a number from 0 to {count - 1} or a module of the model"
    raise InputError(f"the model has no layer {shown(layer)}: {hint}")


def _depth(name: str, count: int) -> int:
    if name.removesuffix(INPUT) == "embed_tokens":
        return 0
    layer = _LAYER.fullmatch(name)
    return count + 1 if layer is None else int(layer[1]) + 1


@contextmanager
def watching(reader: Reader, names: Iterable[str], observe: Observe) -> Iterator[None]:
    """Call ``observe(name, x, spans)`` with what modules return (or read) while ``reader`` reads, x [1,t,…].

    Other threads may use the model meanwhile: what it computes for them is not observed.

    Raises:
        InputError: while reading, where a module does not return one vector per token.
    """

    def hook(name: str) -> Callable[..., None]:
        def take(value: Any) -> None:
            x = value[0] if isinstance(value, tuple) and value else value
            length = reader.spans[-1].rows.stop
            if not isinstance(x, Tensor) or x.ndim < 3 or x.shape[:2] != (1, length):
                raise InputError(f"{name} does not hold one vector per token: take another module")
            observe(name, x, reader.spans)

        if name.endswith(INPUT):
            return lambda module, args: take(args)
        return lambda module, args, output: take(output)

    read: list[tuple[nn.Module, Callable[..., None]]] = []
    returned: list[tuple[nn.Module, Callable[..., None]]] = []
    for name in names:
        module = reader.model.get_submodule(name.removesuffix(INPUT))
        (read if name.endswith(INPUT) else returned).append((module, hook(name)))
    with observing(read, before=True), observing(returned):
        yield
