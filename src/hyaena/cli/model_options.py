"""The options by which commands choose a model."""

from __future__ import annotations

import argparse

from hyaena.schemes import SCHEMES


def add_model_options(group: argparse._ActionsContainer) -> None:
    """Add the arguments of hub.load: --model, --config, --revision, --device, --dtype, --weights, --fp8."""
    group.add_argument("--model", default="cub", help="a bundled name, a folder, a weights file or a hub id (cub)")
    group.add_argument("--config", metavar="FILE", help="the configuration of a weights file")
    group.add_argument("--revision", help="the revision of a hub id")
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (a GPU if there is one)")
    group.add_argument("--dtype", help="float32, bfloat16 or float16 (on a CPU float32, elsewhere as stored)")
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
