"""Whether a model of the 7B's shape with narrow weights loads and decodes within a machine's memory.

    python -m benchmarks.cpu.narrow_7b FOLDER --config sh-7b --weights int4

Writes a model of random weights to FOLDER (about 5 GB of disk), loads it in a process of its own, decodes, and prints
the largest memory of that process (the peak of its resident set).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import hyaena
from hyaena import checkpoints
from hyaena.config import ModelConfig
from hyaena.model import StripedHyena
from hyaena.sizes import ModelSizes


def write(folder: Path, config: ModelConfig) -> None:
    """A checkpoint of random weights; no wide copy of the model is made."""
    with torch.device("meta"):
        model = StripedHyena(config).bfloat16()
    model.to_empty(device="cpu").init_weights()
    checkpoints.save_model(model, folder, max_shard_size=500_000_000)


def decode(folder: Path, tokens: int) -> None:
    """Load, decode, print rate and peak."""
    began = time.perf_counter()
    model, tokenizer = hyaena.load(folder, dtype="bfloat16")
    loaded = time.perf_counter()
    stats = hyaena.generate(model, tokenizer, "abc", max_new_tokens=tokens, temperature=0).stats
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    print(f"loaded in {loaded - began:.0f} s; {stats}; peak {peak / 1e9:.2f} GB", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", default="sh-7b")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--step", choices=("write", "decode"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = replace(ModelConfig.from_name(arguments.config), weights=arguments.weights, tokenizer="bytes")
    if arguments.step == "write":
        write(arguments.folder, config)
    elif arguments.step == "decode":
        decode(arguments.folder, arguments.tokens)
    else:
        print(f"{arguments.config}, {arguments.weights}: {ModelSizes(config).weight_bytes(2) / 1e9:.2f} GB of weights")
        for step in ("write", "decode"):
            subprocess.run(
                [sys.executable, "-m", "benchmarks.cpu.narrow_7b", *sys.argv[1:], "--step", step], check=True
            )


if __name__ == "__main__":
    main()
