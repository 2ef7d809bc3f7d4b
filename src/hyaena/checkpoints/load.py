"""Weights files -> a model, one tensor at a time.

The model is built on the meta device, so it costs nothing; every tensor is then read, cast and put on its device. Peak
host memory is the model's size and one tensor.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Literal

import torch
from torch import Tensor, nn

from hyaena.checkpoints.files import Checkpoint, find, listed
from hyaena.checkpoints.shards import FLOATING
from hyaena.checkpoints.weights import Item, Weights, open_weights
from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError, ConfigError, InputError, counted, printable
from hyaena.filters import Float32Parameters
from hyaena.formats.names import part
from hyaena.formats.tensors import OPTIONAL, REPEATED, SCALES, check_repeated, check_tied, format_of
from hyaena.layers import MIXERS, Mixers
from hyaena.model import StripedHyena
from hyaena.ops.fp8 import E4M3
from hyaena.quant import fixed_tensors, quantized_layers
from hyaena.schemes import scheme_of
from hyaena.tensor_files import memory

logger = logging.getLogger(__name__)

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING}
_SHORT = {
    "double": torch.float64,
    "fp64": torch.float64,
    "float": torch.float32,
    "fp32": torch.float32,
    "half": torch.float16,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
_QUANTIZED = "quantized weights (save them as bfloat16 or float32)"
_LARGE = 1_000_000_000
"""Bytes from which on reading takes long enough for a progress bar."""


def load_model(
    source: Checkpoint | str | PathLike[str],
    config: ModelConfig | str | PathLike[str] | None = None,
    *,
    dtype: str | torch.dtype | Literal["stored"] | None = None,
    device: str | torch.device | None = None,
    mixers: Mixers = MIXERS,
    weights: str | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> StripedHyena:
    """The model of a checkpoint, in evaluation mode.

    Args:
        source: a checkpoint that ``find`` found, or what ``find`` takes: a folder, or a weights file.
        config: the configuration or its path, when it does not lie beside the weights or should be another.
        dtype: of the weights; by default, as the embedding is stored; ``"stored"`` keeps every tensor as it is
            stored. Poles and residues are float32 in any case (float64 with float64).
        device: where the model goes; by default the CPU.
        mixers: what makes the mixer of each kind of layer; see ``StripedHyena``.
        weights: a scheme of ``schemes.SCHEMES``: the weights of linear layers are made narrow, one at a time.
        moments: second moments of the inputs of linear layers by name, see ``quant.collect_moments``.

    Raises:
        InputError: an unknown scheme, one that does not fit the sizes, or weights that are narrow already; moments of
            other layers or inputs.
        CheckpointError: naming the tensors that are missing, unexpected, misshapen, quantized or not finite; or a file
            that is missing, truncated, corrupt or unsafe; or one that was replaced meanwhile.
        ConfigError: the configuration cannot be used.
    """
    if isinstance(source, Checkpoint) and config is not None:
        raise InputError("a checkpoint has its configuration: give config to the function that finds it")
    stored, device = dtype == "stored", as_device(device)
    wanted = None if stored else as_dtype(dtype)
    checkpoint = source if isinstance(source, Checkpoint) else find(source, config)
    if weights is not None:
        check_scheme(checkpoint, weights)
    try:
        with open_weights(checkpoint) as opened:
            if wanted is None and not stored:
                wanted = opened.dtype
            model = Loading(checkpoint, opened, device, wanted, mixers, scheme=weights, moments=moments or {}).run()
    except CheckpointError:
        checkpoint.check_unchanged()  # a better explanation, where it is true
        raise
    checkpoint.check_unchanged()
    return model.eval()


def check_scheme(checkpoint: Checkpoint, weights: str) -> None:
    """Refuse a scheme that is unknown, or for a checkpoint that has another one already.

    Raises:
        InputError: it is one of these.
    """
    scheme_of(weights)
    there = checkpoint.config.weights
    if there not in (None, weights):
        raise InputError(
            f"{checkpoint.path}: has {there} weights already: leave weights out, or quantize the model that it was "
            "made from"
        )


def check_names_and_shapes(checkpoint: Checkpoint) -> None:
    """Compare the tensors that a checkpoint names with those of its configuration; no tensor is read.

    Raises:
        CheckpointError: naming the tensors that are missing, unexpected, misshapen or quantized.
        ConfigError: the configuration makes no model.
    """
    with open_weights(checkpoint) as weights:
        Loading(checkpoint, weights, torch.device("meta"), None, MIXERS, reads=False).run()


def read_tensors(checkpoint: Checkpoint, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint, under our names and in our layout, as they are stored; nothing else is read.

    Raises:
        CheckpointError: a file is damaged.
    """
    return dict(stream_tensors(checkpoint, wanted))


def stream_tensors(checkpoint: Checkpoint, wanted: Callable[[str], bool] = bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint, all or some, one at a time: our name and our layout, as they are stored.

    Raises:
        CheckpointError: a file is damaged.
    """
    original = format_of(checkpoint.config)
    with open_weights(checkpoint) as weights:
        for item in weights.items:
            name = original.our_name(item.name)
            if name is not None and wanted(name) and isinstance(item.stored.dtype, torch.dtype):
                ours = original.to_ours(item.name, item.read(), checkpoint.config)
                if ours is not None:
                    yield ours


def as_device(device: str | torch.device | None) -> torch.device:
    """A device that is there, from its name; by default the CPU.

    Raises:
        InputError: this machine or this build of torch has no such device.
    """
    if device == "":
        raise InputError("the device is empty: name one, such as cpu")
    try:
        found = torch.empty(0, device="cpu" if device is None else device).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = printable(str(error).split("\n")[0], limit=200)
        raise InputError(f"device {device} cannot be used ({reason}): choose another, such as cpu") from None
    if found.type == "meta":
        raise InputError("device meta has no memory for weights: choose another, such as cpu")
    return found


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype from its name, such as ``"bfloat16"`` or ``"bf16"``.

    Raises:
        InputError: the name is not that of a floating-point dtype that a model can have.
    """
    known = {**_DTYPES, **_SHORT}
    found = known.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in FLOATING:
        raise InputError(f"dtype {printable(str(dtype))} cannot hold a model: choose one of {', '.join(_DTYPES)}")
    return found


def wide_parameters(model: nn.Module) -> set[str]:
    """Names of the tensors that are float32 at least in a model of any dtype: poles, residues, rotary frequencies."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Float32Parameters)
        for name in module.wide_tensors()
    }


def dtype_in(dtype: torch.dtype, *, wide: bool) -> torch.dtype:
    """The dtype of a parameter in a model of a dtype; ``wide`` ones are float32 at least."""
    return torch.promote_types(dtype, torch.float32) if wide else dtype


class Loading:
    """The work of one ``load_model``: fill a meta model, and remember everything that does not fit.

    With ``reads=False`` names, dtypes and shapes are compared, and the model stays empty. With a scheme that the
    checkpoint has not, the model is made with it, and takes the weights of its linear layers as they are stored.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype | None,
        mixers: Mixers,
        *,
        reads: bool = True,
        scheme: str | None = None,
        moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.checkpoint, self.weights, self.device, self.dtype = checkpoint, weights, device, dtype
        self.reads = reads
        self.config, self.original = checkpoint.config, format_of(checkpoint.config)
        self.moments = moments or {}
        narrowed = scheme is not None and self.config.weights is None
        self.model = self._empty_model(replace(self.config, weights=scheme) if narrowed else self.config, mixers)
        self.remaining = self.model.state_dict(keep_vars=True)
        self.fixed = fixed_tensors(self.model)
        self.to_narrow = {f"{name}.weight": layer for name, layer in quantized_layers(self.model).items()}
        if narrowed:  # the files have the weights themselves
            for name in self.fixed:
                del self.remaining[name]
            for name, layer in self.to_narrow.items():
                self.remaining[name] = torch.empty(layer.out_features, layer.in_features, device="meta")
            self.fixed = set()
        else:
            self.to_narrow = {}
        if others := [name for name in self.moments if f"{name}.weight" not in self.to_narrow]:
            raise InputError(
                f"moments of {listed(others, most=3)}, whose weights do not become narrow: take moments from "
                "quant.collect_moments of this model, and give weights with them"
            )
        self.expected = dict(self.remaining)
        self.scales = [name for name in self.remaining if part(name) == SCALES]
        for name in (*(OPTIONAL & self.remaining.keys()), *(self.scales if weights.in_original_names else ())):
            del self.remaining[name]
        self.taken: set[str] = set()
        self.shelf = memory.Shelf()
        self.wide = wide_parameters(self.model)
        self.problems: dict[str, list[str]] = {
            "unexpected": [],
            "twice": [],
            "wrong shape": [],
            _QUANTIZED: [],
            "not finite": [],
        }
        self.unreadable: list[str] = []
        self.tied_head: Tensor | None = None

    def _empty_model(self, config: ModelConfig, mixers: Mixers) -> StripedHyena:
        """The model on the meta device, built only where the files have as many tensors as it has layers."""
        if self.config.num_layers > len(self.weights.items):
            raise CheckpointError(
                f"{self.checkpoint.path}: the configuration has {counted(self.config.num_layers, 'layer')}, and the "
                f"files {counted(len(self.weights.items), 'tensor')}; do the configuration and the weights belong "
                "together?"
            )
        try:
            with torch.device("meta"):
                return StripedHyena(config, mixers=mixers)
        except (RuntimeError, OverflowError) as error:
            reason = printable(str(error).split("\n")[0], limit=200)
            raise ConfigError(f"{self.checkpoint.path}: its configuration makes no model ({reason})") from None

    def run(self) -> StripedHyena:
        for item in _with_progress(self.weights.items) if self.reads else self.weights.items:
            self._take(item)
        if self.tied_head is not None and not self.remaining:
            check_tied(self.model.embed_tokens.weight.detach(), self.tied_head)
        missing = [self._shown(name) for name in self.remaining]
        told = {"missing": missing, **self.problems}
        if any(told.values()):
            words = "; ".join(f"{what}: {listed(names, most=3)}" for what, names in told.items() if names)
            raise CheckpointError(
                f"{self.checkpoint.path}: {words}; do the configuration and the weights belong together?"
            )
        if self.unreadable:
            raise CheckpointError(f"{self.checkpoint.path}: {self.unreadable[0]}")
        if self.model.rotary.frequencies is not None and "rotary.frequencies" not in self.taken and self.reads:
            self._put("rotary.frequencies", self._placed("rotary.frequencies", self.model.rotary.powers()))
        if self.reads and (lacking := [name for name in self.scales if name not in self.taken]):
            logger.warning(
                "%s: no FP8 scales of %d of %d input projections: they are 1, as in the original",
                self.checkpoint.path, len(lacking), len(self.scales),
            )  # fmt: skip
            for name in lacking:
                self._put(name, self._placed(name, torch.ones(2, dtype=torch.float32, device="cpu")))
        return self.model

    def _take(self, item: Item) -> None:
        name = self.original.our_name(item.name)
        if name is None:  # what the original recomputes
            return
        tied = name == "lm_head.weight" and self.config.tie_embeddings
        expected = "embed_tokens.weight" if tied else name
        if expected not in self.expected:
            if part(name) != SCALES or name == item.name:  # others are of a model that runs without FP8
                self.problems["unexpected"].append(item.key)
            return
        again = name in self.taken
        if again and not tied and name not in REPEATED:
            self.problems["twice"].append(item.key)
            return
        self.taken.add(name)
        if not tied:
            self.remaining.pop(name, None)
        state = part(name) == SCALES and name != item.name
        if name in self.fixed:
            readable = item.stored.dtype == self.expected[name].dtype
        else:
            readable = item.stored.dtype in FLOATING or (state and item.stored.dtype == torch.uint8)
        if not readable:
            kind = str(item.stored.dtype).removeprefix("torch.")
            self.problems[_QUANTIZED].append(f"{item.key} is {kind}")
            return
        if not self._fits(item, self.expected[expected].shape):
            self.problems["wrong shape"].append(self._shapes(item, expected))
            return
        if not self.reads:
            return
        try:
            ours = self.original.to_ours(item.name, item.read(), self.config)
        except CheckpointError as error:  # told at the end, unless the configuration is of another model
            self.unreadable.append(str(error))
            return
        assert ours is not None
        tensor = ours[1]
        kept = self._placed(name, tensor)
        if tied:
            self.tied_head = kept
            return
        if again:
            check_repeated(item.key, self.model.get_buffer(name), kept)
            return
        if not _all_finite(kept):
            lost = _all_finite(tensor)
            self.problems["not finite"].append(
                f"{item.key} (as {kept.dtype}: choose a wider dtype)" if lost else item.key
            )
            return
        self._put(name, kept)

    def _put(self, name: str, tensor: Tensor) -> None:
        """Make a tensor the parameter or buffer of a name, or the narrow weight of a layer."""
        owner, _, leaf = name.rpartition(".")
        if name in self.to_narrow:
            layer = self.to_narrow[name]
            try:
                layer.narrow(tensor, self.moments.get(owner))
            except InputError as error:
                raise InputError(f"{self.checkpoint.path}, {self._shown(name)}: {error}") from None
            for leaf in ("codes", "scale", "minimum"):
                if (numbers := getattr(layer, leaf)) is not None:
                    setattr(layer, leaf, self.shelf.settled(numbers))
            return
        expected, tensor = self.expected[name], self.shelf.settled(tensor)
        if isinstance(expected, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=expected.requires_grad)
        setattr(self.model.get_submodule(owner), leaf, tensor)

    def _placed(self, name: str, tensor: Tensor) -> Tensor:
        try:
            if name in self.fixed or name in self.to_narrow:
                return tensor.to(self.device)
            return tensor.to(self.device, dtype_in(self.dtype or tensor.dtype, wide=name in self.wide))
        except torch.OutOfMemoryError:
            raise CheckpointError(
                f"{self.checkpoint.path}: does not fit into the memory of {self.device}: "
                "choose a narrower dtype or another device"
            ) from None

    def _fits(self, item: Item, shape: torch.Size) -> bool:
        """Whether a stored tensor has a parameter's shape, in our layout; decided without reading it."""
        try:
            ours = self.original.to_ours(item.name, torch.empty(item.stored.shape, device="meta"), self.config)
        except (RuntimeError, OverflowError):  # sizes that no tensor can have
            return False
        return ours is not None and ours[1].shape == shape

    def _shown(self, name: str) -> str:
        """A parameter in the words of the file: the original's name where the file is the original's."""
        if not self.weights.in_original_names:
            return name
        theirs = self.original.to_theirs(name, self.expected[name], self.config)
        return name if theirs is None else theirs[0]

    def _shapes(self, item: Item, name: str) -> str:
        expected = self.expected[name]
        if self.weights.in_original_names:
            theirs = self.original.to_theirs(name, expected, self.config)
            expected = expected if theirs is None else theirs[1]
        return f"{item.key} is {printable(str(list(item.stored.shape)))}, expected {list(expected.shape)}"


def _with_progress(items: Sequence[Item]) -> Iterator[Item]:
    """The items; for large files, with a progress bar where the standard error is a terminal."""
    total = sum(item.stored.nbytes for item in items)
    if total < _LARGE or not sys.stderr.isatty():
        yield from items
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", leave=False) as bar:
        for item in items:
            yield item
            bar.update(item.stored.nbytes)


def _all_finite(tensor: Tensor) -> bool:
    # NaN and infinity survive a sum, which is one pass without a mask the size of the tensor, and many times faster.
    # A sum may also overflow by itself, so one that is not finite is looked at again.
    if tensor.dtype == E4M3:
        tensor = tensor.half()  # torch sums no numbers of 8 bits
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
