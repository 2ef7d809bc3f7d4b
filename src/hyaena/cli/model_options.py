"""The options by which commands choose a model, and what jobs know of it before its weights are loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hyaena.errors import InputError
from hyaena.schemes import CACHE_DTYPES, SCHEMES

if TYPE_CHECKING:
    import torch

    from hyaena.model import StripedHyena
    from hyaena.tokenizers import Tokenizer


DTYPE_HELP = (
    "float32, bfloat16, float16, or auto: bfloat16 on a CPU that multiplies it natively (default: float32 on a "
    "CPU, elsewhere as stored)"
)


def add_model_options(group: argparse._ActionsContainer) -> None:
    """Add the arguments of hub.load: --model, --config, --revision, --device, --dtype, and those of precision."""
    group.add_argument("--model", default="cub", help="a bundled name, a folder, a weights file or a hub id (cub)")
    group.add_argument("--config", metavar="FILE", help="the configuration of a weights file, or the name of a preset")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (a GPU if there is one)")
    group.add_argument("--dtype", help=DTYPE_HELP)
    add_precision_options(group)


def add_precision_options(group: argparse._ActionsContainer) -> None:
    """Add --weights, --fp8 and --cache-dtype: the bits of linear layers, and of keys and values."""
    group.add_argument(
        "--weights",
        choices=tuple(SCHEMES),
        help="make the linear layers narrow while they are read (docs/quantization.md)",
    )
    group.add_argument(
        "--fp8",
        choices=("auto", "exact", "off"),
        default="auto",
        help="the FP8 products of Evo 2: auto, on Hopper GPUs; exact, on other devices too, slowly; off (auto)",
    )
    add_cache_option(group)


def add_cache_option(group: argparse._ActionsContainer) -> None:
    """Add --cache-dtype: the bits of keys and values."""
    group.add_argument(
        "--cache-dtype",
        choices=("auto", *CACHE_DTYPES),
        default="auto",
        help="of keys and values; int8 takes half the memory of 16 bits (docs/quantization.md); auto: the model's",
    )


def choose_device(args: argparse.Namespace) -> torch.device:
    """The device that --device names; a GPU if there is one and none is named.

    Raises:
        InputError: there is no such device.
    """
    if args.device == "":
        raise InputError("--device is empty: name one, such as cpu")

    import torch

    from hyaena.checkpoints import as_device

    return as_device(("cuda" if torch.cuda.is_available() else "cpu") if args.device is None else args.device)


@dataclass(frozen=True)
class PreparedModel:
    """A model without its weights: enough to check options and texts.

    Attributes:
        tokenizer: of the model.
        shape: the model on the meta device.
        device: where ``load`` puts it.
        options: all that results depend on, by the names of the command's options; see ``jobs.open_job``.
    """

    tokenizer: Tokenizer
    shape: StripedHyena
    device: torch.device
    options: Mapping[str, Any]
    _name: str
    _loading: Mapping[str, Any]

    def load(self) -> StripedHyena:
        """Load the weights."""
        from hyaena import hub

        return hub.load_model(self._name, device=self.device, **self._loading)


def prepare_model(args: argparse.Namespace) -> PreparedModel:
    """Find the model that ``add_model_options`` chose, and read its configuration and tokenizer.

    Raises:
        HyaenaError: there is no such model, device or dtype.
    """
    device = choose_device(args)

    import torch

    from hyaena import checkpoints, hub
    from hyaena.fp8 import check_fp8
    from hyaena.model import StripedHyena

    dtype = hub.choose_dtype(args.dtype, device)
    origin = {"revision": args.revision, "config": args.config}
    config, tokenizer = hub.load_tokenizer_of(args.model, **origin)
    check_fp8(args.fp8, config.fp8_input_projections)
    hub.check_cache_dtype(args.cache_dtype, config)
    with torch.device("meta"):
        shape = StripedHyena(config)
    options = {
        "--model": args.model,
        "the digest of the model's files": checkpoints.fingerprint(hub.locate(args.model, **origin)),
        "--dtype": str(dtype or "stored").removeprefix("torch."),
        "--fp8": args.fp8,
    }
    if args.weights is not None:
        options["--weights"] = args.weights
    if args.cache_dtype != "auto":
        options["--cache-dtype"] = args.cache_dtype
    loading = {"dtype": args.dtype, "fp8": args.fp8, "weights": args.weights, "cache_dtype": args.cache_dtype, **origin}
    return PreparedModel(tokenizer, shape, device, options, args.model, loading)


def tell_what_is_cut(model: StripedHyena, method: str) -> None:
    """Say on standard error how far the method ``truncated`` cuts the filters, which no command does in silence."""
    from hyaena.ops import TRUNCATION_TOLERANCE

    if method == "truncated" and (windows := model.truncation_windows()):
        print(
            f"hyaena: long filters cut to {min(windows.values()):,} … {max(windows.values()):,} taps, "
            f"which drops at most {TRUNCATION_TOLERANCE:.0e} of a filter's energy",
            file=sys.stderr,
        )
