"""Whether a model of the 7B's shape with narrow weights loads and decodes within a machine's memory.

    python -m benchmarks.cpu.narrow_7b FOLDER --config sh-7b --weights int4

Writes a model of random weights to FOLDER (about 5 GB of disk), loads it in a process of its own, decodes, and prints
the largest memory of that process (the peak of its resident set).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import hyaena
from hyaena.bench.measure import filled_cache, stepper
from hyaena.bench.rates import measure_bandwidth
from hyaena.config import ModelConfig
from hyaena.decoding import resolve_decoding
from hyaena.model import StripedHyena
from hyaena.sizes import ModelSizes


def write(folder: Path, config: ModelConfig) -> None:
    """A checkpoint of random weights, one layer at a time. Narrow numbers are drawn, not rounded from wide ones."""
    with torch.device("meta"):
        model = StripedHyena(config).bfloat16()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    parts = {"rest": [name for name in model.state_dict() if not name.startswith("layers.")]}
    for i in range(config.num_layers):
        parts[f"layer-{i}"] = [name for name in model.state_dict() if name.startswith(f"layers.{i}.")]
    files = {part: f"model-{n:05}-of-{len(parts):05}.safetensors" for n, part in enumerate(parts, 1)}
    weight_map = {name: files[part] for part, names in parts.items() for name in names}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for part, names in parts.items():
        made = {name: draw(name, tensor) for name, tensor in model.state_dict().items() if name in names}
        save_file(made, folder / files[part], metadata={"format": "pt"})


def draw(name: str, like: torch.Tensor) -> torch.Tensor:
    """Random numbers in the place of a tensor, of a size at which nothing overflows."""
    leaf = name.rpartition(".")[2]
    if leaf == "codes":  # every byte is a number, or two
        return torch.randint(0, 256, like.shape, dtype=torch.uint8).view(like.dtype)
    tensor = torch.empty(like.shape, dtype=like.dtype)
    if leaf == "scale":
        return tensor.fill_(0.002)
    if leaf == "minimum":
        return tensor.fill_(-0.015)
    if leaf == "poles":
        return tensor.normal_(0, 0.3).clamp_(-0.6, 0.6)
    return tensor.fill_(1) if "norm" in name else tensor.normal_(0, 0.02)


def decode(folder: Path, tokens: int) -> None:
    """Load, decode after 16 tokens, print the rate, the share of the bound, and the peak; no prompt is read."""
    began = time.perf_counter()
    model, _ = hyaena.load(folder, dtype="bfloat16")
    print(f"loaded in {time.perf_counter() - began:.0f} s", flush=True)
    way = resolve_decoding(model, "auto", "auto")
    run = stepper(model, filled_cache(model, 1, 16, room=tokens + 2), way)
    run(1)  # compiles
    began = time.perf_counter()
    run(tokens)
    rate = tokens / (time.perf_counter() - began)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    step = ModelSizes(model.config).decode_bytes(1, tokens, 2)
    bandwidth = measure_bandwidth(torch.device("cpu"), step)
    stored = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{stored / 1e9:.2f} GB on disk, {rate:.2f} tokens/s ({way}) "
        f"({step * rate / 1e9:.1f} GB/s, {step * rate / bandwidth.median:.0%} of {bandwidth.kernel} at "
        f"{bandwidth.median / 1e9:.1f} GB/s), peak of the process {peak / 1e9:.2f} GB",
        flush=True,
    )


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
