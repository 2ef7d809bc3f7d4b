"""Decoding on one GPU: is it right, how far is it from the floor that the bytes set, and what do peers do.

    PYTHONPATH=src python3 benchmarks/decode_gpu.py --out decode.json

First every kernel against its plain twin and the captured step against the model's own forward; it stops if one is
wrong. Then SH-7B's shape with random weights in bfloat16: the products, Triton against cuBLAS; tokens per second at
batch 1 (contexts of 2k and 32k) and at batch 64 (8k), each as a part of its floor: the bytes of weights and valid
memory over the copy bandwidth measured in the same run; where a step's time goes; and transformers' Mistral-7B shape
with static cache and torch.compile at 32k. Keys, values and states are random numbers in place of a real prompt's.
About three minutes on an H100. ``--quick`` runs it all on tiny models, to see that it works, on any device.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyaena import ops
from hyaena.cache import Cache, KVCache
from hyaena.config import ModelConfig
from hyaena.decoding import Decoder
from hyaena.model import StripedHyena
from hyaena.ops import HyenaState, ModalFilter, rotary_table
from hyaena.ops.decode import DecodeOperators, Norm, Slots
from hyaena.ops.triton import gemv
from hyaena.ops.triton.decode import FusedDecodeOperators
from hyaena.sampling import SamplingParams, sample

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}

SH_7B = dataclasses.replace(
    ModelConfig.from_file(Path(__file__).parents[1] / "configs/7b-sh-32k-v1.yml"), max_length=131_072, name="SH-7B"
)
TINY = dataclasses.replace(
    SH_7B, vocab_size=320, hidden_size=64, layer_types=("hyena", "attention") * 2, intermediate_size=96,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip

TILES = [
    gemv.Tile(rows, width, warps, stages)
    for rows, width, warps, stages in (
        (4, 1024, 4, 1), (4, 1024, 4, 3), (8, 1024, 4, 1), (8, 1024, 8, 1), (8, 1024, 8, 3), (16, 512, 4, 1),
        (16, 512, 8, 3), (2, 2048, 4, 1), (4, 2048, 8, 1), (2, 1024, 2, 1), (4, 512, 2, 1), (16, 256, 4, 4),
    )
]  # fmt: skip


class CublasOperators(FusedDecodeOperators):
    """The kernels, but products by torch's library calls."""

    def project(self, *args: Any, **kwargs: Any) -> Tensor:
        return DecodeOperators.project(self, *args, **kwargs)

    def gate(self, *args: Any, **kwargs: Any) -> Tensor:
        return DecodeOperators.gate(self, *args, **kwargs)


# --- timing


def synchronize() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each run, by device events."""
    times = []
    for _ in range(repeats):
        if CUDA:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    return times


def per_launch(calls: list[Callable[[], object]], repeats: int = 10) -> float:
    """Median seconds of one of several calls, captured together as a graph so that the host does not count."""
    for call in calls[:2]:
        call()
    if not CUDA:
        return statistics.median(seconds(lambda: [call() for call in calls], 2)) / len(calls)
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return statistics.median(seconds(graph.replay, repeats)) / len(calls)


def copy_bandwidth(size: int) -> float:
    """Bytes per second of a device-to-device copy, read and written both counted."""
    source = torch.randint(-100, 100, (size,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    seconds(lambda: target.copy_(source), 3)
    return 2 * size / statistics.median(seconds(lambda: target.copy_(source), 10))


# --- is it right


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers on the device."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def check(what: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Print the relative error, and stop if it is too large."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    print(f"  {what:58s} {str(dtype)[6:]:9s} error {error:.1e}", flush=True)
    if not error <= TOLERANCE[dtype]:
        raise SystemExit(f"WRONG: {what} in {dtype}: {error}, allowed {TOLERANCE[dtype]}")


def check_kernels(config: ModelConfig, length: int) -> None:
    """Every kernel at the widths of a model against its plain twin in more precision."""
    plain = DecodeOperators()
    width, hidden, hd = config.hidden_size, config.intermediate_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    for dtype in TOLERANCE:
        fused = FusedDecodeOperators()
        norm = Norm(randn(width, dtype=dtype), 1e-5, True)
        wide = Norm(norm.weight.double(), 1e-5, True)
        a, b = (randn(hidden, width, dtype=dtype) / width**0.5 for _ in range(2))
        for batch in (1, 2):
            x, r = randn(batch, width, dtype=dtype), randn(batch, hidden, dtype=dtype)
            want = plain.project(x.double(), a.double(), norm=wide, residual=r.double())
            check(f"project, norm, residual, {batch} rows", fused.project(x, a, norm=norm, residual=r), want, dtype)
            want = plain.gate(x.double(), a.double(), b.double(), norm=wide, activation="silu")
            check(f"gate, {batch} rows", fused.gate(x, a, b, norm=norm, activation="silu"), want, dtype)
        for batch, paddings in ((1, [0]), (3, [0, length - 1, length // 3])):
            q = randn(batch, heads, hd, dtype=dtype)
            k, v = (randn(batch, groups, length + 100, hd, dtype=dtype) for _ in range(2))
            table = rotary_table(torch.arange(length + 100, device=DEVICE), hd, config.rope_theta)
            padding = torch.tensor(paddings, device=DEVICE)
            slots = Slots(torch.tensor([length], dtype=torch.int32, device=DEVICE), padding.int(), table)
            want = torch.stack([
                ops.attention(q[i : i + 1, :, None].double(), *(t[i : i + 1, :, p:length].double() for t in (k, v)))[
                    0, :, 0
                ]
                for i, p in enumerate(paddings)
            ])  # fmt: skip
            for store in (k, v):
                store[:, :, length:] = torch.nan
                for row, first in enumerate(paddings):
                    store[row, :, :first] = torch.nan
            check(f"attention, {batch} rows of {length}", fused.attend(q, k, v, slots), want, dtype)
            qkv = randn(batch, (heads + 2 * groups) * hd, dtype=dtype)
            twins = k.clone(), v.clone()
            want = plain.remember(qkv, *twins, slots)
            check(f"rotary and write, {batch} rows", fused.remember(qkv, k, v, slots), want, dtype)
            check("  its keys", k[:, :, length - 1], twins[0][:, :, length - 1], dtype)
        state = HyenaState(randn(2, 3 * width, 2, dtype=dtype), torch.complex(randn(2, width, 2), randn(2, width, 2)))
        twin = HyenaState(state.fir.float().clone(), state.iir.clone())
        polar = torch.polar(torch.rand(width, 2, device=DEVICE), randn(width, 2))
        long_filter = ModalFilter(polar, torch.complex(randn(width, 2), randn(width, 2)), randn(width, dtype=dtype))
        exact = long_filter._replace(skip=long_filter.skip.float())  # type: ignore[union-attr]
        z, w, o = randn(2, 3 * width, dtype=dtype), randn(3 * width, 3, dtype=dtype), randn(3 * width, dtype=dtype)
        got = fused.hyena(z, w, o, long_filter, state)
        check("hyena step", got, plain.hyena(z.float(), w.float(), o.float(), exact, twin), dtype)
        check("  its modes", state.iir.abs(), twin.iir.abs(), dtype)


@torch.inference_mode()
def check_steps() -> None:
    """The captured step of a small model against its forward, over unequal prompts, with rows leaving."""
    config = dataclasses.replace(TINY, hidden_size=128, num_attention_heads=8, intermediate_size=256)
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.8, top_k=9, seed=1),
        SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=2),
    ]
    for dtype in TOLERANCE:
        torch.manual_seed(0)
        model = StripedHyena(config).to(DEVICE, dtype)
        for name, p in model.named_parameters():
            if "long_filter" not in name:
                p.normal_(std=0.2)
        mask = torch.arange(50, device=DEVICE) >= torch.tensor([[0], [7], [45]], device=DEVICE)
        ids = torch.randint(config.vocab_size, mask.shape, device=DEVICE)
        caches = [model.make_cache(3, max_length=300) for _ in range(2)]
        _, last = (model(ids, cache=cache, mask=mask)[:, -1].argmax(-1) for cache in caches)
        seen = torch.zeros(3, config.vocab_size, dtype=torch.bool, device=DEVICE)
        decoder = Decoder(model, caches[0], last, params, [p.generator() for p in params], seen=seen.clone(),
                          captured=CUDA)  # fmt: skip
        generators, rows, same, total, cache = [p.generator() for p in params], [0, 1, 2], 0, 0, caches[1]
        logits = torch.zeros(0)
        for count in range(160):
            if count == 120:
                synchronize()
                decoder.keep([1, 2])
                cache, last, seen, rows = cache.select([1, 2]), last[1:], seen[1:], rows[1:]
            decoder.launch()
            choice = decoder.fetch()
            logits = model(last[:, None], cache=cache)[:, -1]
            want = sample(logits, [params[i] for i in rows], [generators[i] for i in rows], seen=seen)
            same += sum(a == b for a, b in zip(choice.tokens, want.tolist(), strict=True))
            total += len(rows)
            # Forward goes on with the decoder's choice, so that one near-tie does not make everything differ.
            last = torch.tensor(choice.tokens, device=DEVICE)
            seen.scatter_(1, last[:, None], True)
        print(f"  captured step against forward: {same} of {total} tokens the same, {len(decoder.graphs)} graphs")
        allowed = 0.99 if dtype == torch.float32 else 0.8
        if same < allowed * total:
            raise SystemExit(f"WRONG: the captured step chose {same} of {total} tokens as forward did, in {dtype}")
        got = decoder.cache()
        for i, (one, other) in enumerate(zip(got.layers, cache.layers, strict=True)):
            if isinstance(one, HyenaState) and isinstance(other, HyenaState):
                tolerance = dtype if dtype == torch.float32 else torch.bfloat16
                if dtype == torch.float32:
                    check(f"the state of layer {i} after 160 steps", one.iir.abs(), other.iir.abs(), tolerance)


# --- how fast


def compare_products(config: ModelConfig, budget: float) -> tuple[list[dict[str, Any]], dict[Any, gemv.Tile]]:
    """GB/s of every matrix of the model at one vector: torch's library call, and each tile."""
    width, hidden = config.hidden_size, config.intermediate_size
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    shapes = [
        ("project", 3 * width, width), ("project", width, width), ("project", qkv, width), ("gate", hidden, width),
        ("project", width, hidden), ("project", config.vocab_size, width),
    ]  # fmt: skip
    began, rows, best = time.perf_counter(), [], {}
    for kind, n, k in shapes:
        product = Product(kind, n, k, normed=k == width and n != width)
        row: dict[str, Any] = {
            "kind": kind,
            "shape": [product.pair * n, k],
            "bytes": product.size,
            "cublas_alone": product.size / product.pair / per_launch(product.alone()) / 1e9,
            "cublas_with_its_surroundings": product.size / per_launch(product.plain()) / 1e9,
            "tiles": {},
        }
        for tile in TILES:
            if time.perf_counter() - began > budget:
                break
            name = str(dataclasses.astuple(tile))
            try:
                row["tiles"][name] = product.size / per_launch(product.triton(tile)) / 1e9
            except Exception as error:  # a tile that does not fit this device
                row["tiles"][name] = 0.0
                print(f"  tile {tile}: {type(error).__name__}: {error}")
        if row["tiles"]:
            top = sorted(row["tiles"].items(), key=lambda item: -item[1])[:3]
            best[(kind, n, k)] = next(t for t in TILES if str(dataclasses.astuple(t)) == top[0][0])
            print(f"  {kind} {product.pair * n}x{k}: cuBLAS {row['cublas_alone']:.0f} alone, "
                  f"{row['cublas_with_its_surroundings']:.0f} with norm etc., Triton "
                  + ", ".join(f"{name} {value:.0f}" for name, value in top) + " GB/s", flush=True)  # fmt: skip
        rows.append(row)
    return rows, best


class Product:
    """One matrix shape of the model at one vector: enough copies of it to keep the caches out, and its callers."""

    def __init__(self, kind: str, n: int, k: int, *, normed: bool) -> None:
        self.kind, self.pair = kind, 2 if kind == "gate" else 1
        self.size = self.pair * n * k * 2
        copies = max(2, min(16, -(-300_000_000 // self.size)))
        made = [[randn(n, k, dtype=torch.bfloat16) for _ in range(self.pair)] for _ in range(copies)]
        self.weights = made * max(1, 16 // copies)
        self.x = randn(1, k, dtype=torch.bfloat16)
        norm = Norm(randn(k, dtype=torch.bfloat16), 1e-5, True) if normed else None
        self.options: dict[str, Any] = {"norm": norm}
        if kind == "gate":
            self.options["activation"] = "silu"
        elif not normed:
            self.options["residual"] = randn(1, n, dtype=torch.bfloat16)

    def alone(self) -> list[Callable[[], object]]:
        """The library's product and nothing else."""
        return [partial(torch.nn.functional.linear, self.x, w[0]) for w in self.weights]

    def plain(self) -> list[Callable[[], object]]:
        """With the norm, residual or activation that belongs to it."""
        function: Any = getattr(DecodeOperators(), self.kind)
        return [partial(function, self.x, *w, **self.options) for w in self.weights]

    def triton(self, tile: gemv.Tile) -> list[Callable[[], object]]:
        """All of it in one kernel."""
        function: Any = getattr(gemv, self.kind)
        return [partial(function, self.x, *w, **self.options, tile=tile) for w in self.weights]


def floor_bytes(model: StripedHyena, batch: int, context: int) -> int:
    """What a step has to read and write: all weights but the embedding's other rows, and the valid memory."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if model.lm_head is not None:
        weights -= model.embed_tokens.weight.numel() * model.embed_tokens.weight.element_size()
    size = model.embed_tokens.weight.element_size()
    attention, hyena = (config.layer_types.count(kind) for kind in ("attention", "hyena"))
    slot = attention * 2 * config.num_key_value_heads * config.head_dim * size
    state = hyena * config.hidden_size * (3 * (config.short_filter_length - 1) * size + 8 * config.state_size)
    return weights + batch * (context * slot + 2 * state)


def filled(model: StripedHyena, batch: int, context: int, room: int) -> Cache:
    """A cache as if a prompt of ``context`` tokens had been read."""
    cache = model.make_cache(batch, max_length=context + room)
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values) if isinstance(layer, KVCache) else layer:
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            for part in real:
                part.normal_()
    cache.length = context
    return cache


def measure(
    model: StripedHyena, batch: int, context: int, bandwidth: float, operators: DecodeOperators, label: str, steps: int,
    params: SamplingParams | None = None, profile: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Tokens per second as users get them: launched, fetched a step late, read by the host."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    room = 8 * steps + 16
    rows = [params or SamplingParams()] * batch
    with torch.inference_mode():
        cache = filled(model, batch, context, room)
    decoder = Decoder(model, cache, torch.ones(batch, dtype=torch.int64, device=DEVICE), rows,
                      [p.generator() for p in rows], captured=CUDA, operators=operators)  # fmt: skip
    began = time.perf_counter()
    decoder.launch()
    decoder.fetch()
    start = time.perf_counter() - began
    times = []
    for _ in range(6):
        synchronize()
        began = time.perf_counter()
        decoder.launch()
        for _ in range(steps - 1):
            decoder.launch()
            assert all(decoder.fetch().finite)
        decoder.fetch()
        times.append((time.perf_counter() - began) / steps)
    took = statistics.median(times[1:])
    size = floor_bytes(model, batch, context + 4 * steps)
    floor = size / bandwidth
    out = {
        "what": label, "batch": batch, "context": context, "ms": took * 1e3, "spread_ms": [t * 1e3 for t in times],
        "tokens_per_second": batch / took, "floor_bytes": size, "floor_tokens_per_second": batch / floor,
        "of_floor": floor / took, "first_step_seconds": start,
    }  # fmt: skip
    print(f"  {label}: {took * 1e3:.3f} ms, {batch / took:.1f} tokens/s, {floor / took:.1%} of the floor, "
          f"first step {start:.2f} s", flush=True)  # fmt: skip
    if profile and CUDA:
        try:
            out["kernels"] = kernels_of(decoder)
        except Exception as error:  # the times above stand without it
            print(f"    no profile: {type(error).__name__}: {error}")
    return out


def kernels_of(decoder: Decoder, steps: int = 5) -> list[dict[str, Any]]:
    """Launches and microseconds of every kernel in a step, the most expensive first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(steps):
            decoder.launch()
            decoder.fetch()
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            sums[event.name[:70]][0] += 1 / steps
            sums[event.name[:70]][1] += event.time_range.elapsed_us() / steps
    ranked = sorted(sums.items(), key=lambda item: -item[1][1])
    print(f"    a step: {sum(n for n, _ in sums.values()):.0f} kernels, {sum(t for _, t in sums.values()):.0f} us")
    for name, (count, took) in ranked[:16]:
        print(f"    {took:9.1f} us in {count:5.1f}: {name}")
    return [{"name": name, "launches": count, "us": took} for name, (count, took) in ranked]


def mistral(quick: bool, context: int) -> None:
    """transformers' MistralForCausalLM of the same widths, static cache, torch.compile; prints one line of JSON."""
    from transformers import MistralConfig, MistralForCausalLM, StaticCache

    config = TINY if quick else SH_7B
    torch.set_default_dtype(torch.bfloat16)
    widths: dict[str, Any] = dict(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, max_position_embeddings=131_072, sliding_window=None,
        tie_word_embeddings=False, attn_implementation="sdpa", dtype="bfloat16",
    )  # fmt: skip
    with torch.device(DEVICE):
        model: Any = MistralForCausalLM(MistralConfig(**widths)).eval()
    cache: Any = StaticCache(config=model.config, max_cache_len=context + 512)
    cache.early_initialization(1, config.num_key_value_heads, config.head_dim, torch.bfloat16, torch.device(DEVICE))
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    position = torch.full((1, 1), context, device=DEVICE)
    began = time.perf_counter()
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if CUDA else model.forward

    def step(ids: Tensor) -> Tensor:
        logits = forward(input_ids=ids, past_key_values=cache, position_ids=position, use_cache=True).logits
        position.add_(1)
        return logits[:, -1:].argmax(-1).clone()

    ids = torch.ones(1, 1, dtype=torch.int64, device=DEVICE)
    with torch.inference_mode():
        for _ in range(4):
            ids = step(ids)
        synchronize()
        start = time.perf_counter() - began
        times = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(20):
                ids = step(ids)
            synchronize()
            times.append((time.perf_counter() - began) / 20)
    took = statistics.median(times)
    print(json.dumps({"what": "transformers Mistral", "batch": 1, "context": context, "ms": took * 1e3,
                      "tokens_per_second": 1 / took, "spread_ms": [t * 1e3 for t in times],
                      "first_steps_seconds": start}))  # fmt: skip


def main() -> None:
    """Parse, check, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on any device: shows that it works")
    parser.add_argument("--limit", type=float, default=200, help="seconds after which nothing new is begun")
    parser.add_argument("--mistral", type=int, metavar="CONTEXT", help="measure only the peer, in this process")
    options = parser.parse_args()
    if options.mistral:
        mistral(options.quick, options.mistral)
        return
    began = time.perf_counter()
    report: dict[str, Any] = {"command": sys.argv, "torch": torch.__version__, "rows": []}
    if CUDA:
        properties = torch.cuda.get_device_properties(0)
        report["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)

    def left() -> float:
        return options.limit - (time.perf_counter() - began)

    def save() -> None:
        report["seconds"] = time.perf_counter() - began
        if options.out:
            options.out.write_text(json.dumps(report, indent=1))

    config = TINY if options.quick else SH_7B
    print("is it right", flush=True)
    with torch.inference_mode():
        check_kernels(config, 300 if options.quick else 5000)
        check_steps()
    bandwidth = copy_bandwidth(10**6 if options.quick else 4 * 2**30)
    report["copy_bandwidth"] = bandwidth
    print(f"copy bandwidth {bandwidth / 1e12:.3f} TB/s; {time.perf_counter() - began:.0f} s so far", flush=True)
    if options.quick:
        TILES[:] = [gemv.Tile(8, 64, 1, 1), gemv.Tile(4, 32, 1, 2)]
    with torch.inference_mode():
        report["products"], best = compare_products(config, 50)
    save()
    print(f"{time.perf_counter() - began:.0f} s so far; building {config.name}", flush=True)

    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = StripedHyena(config).eval()
    torch.set_default_dtype(torch.float32)
    steps, many = (2, 5) if options.quick else (24, 64)
    rule, tuned = FusedDecodeOperators(), FusedDecodeOperators(best)
    library = CublasOperators()
    short, long, middle = (60, 300, 100) if options.quick else (2048, 32_768, 8192)
    drawn = SamplingParams(temperature=0.8, top_p=0.95, seed=0)
    plan: list[tuple[int, int, DecodeOperators, str, SamplingParams | None, bool]] = [
        (1, short, tuned, "batch 1, 2k, tuned tiles", None, True),
        (1, short, rule, "batch 1, 2k, tiles by rule", None, False),
        (1, short, library, "batch 1, 2k, cuBLAS products", None, True),
        (1, long, tuned, "batch 1, 32k, tuned tiles", None, True),
        (1, short, tuned, "batch 1, 2k, tuned tiles, top-p", drawn, False),
        (4, middle, rule, "batch 4, 8k", None, False),
        (many, middle, rule, f"batch {many}, 8k", None, True),
    ]
    for batch, context, operators, label, params, profile in plan:
        if left() < 10:
            print(f"  {label}: no time left")
            continue
        try:
            report["rows"].append(measure(model, batch, context, bandwidth, operators, label, steps, params, profile))
        except Exception as error:
            print(f"  {label}: failed: {type(error).__name__}: {error}")
            traceback.print_exc()
        save()
    report["tuned_tiles"] = {str(key): dataclasses.astuple(tile) for key, tile in best.items()}
    del model, rule, tuned, library, plan, operators
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    if left() > 30 or options.quick:
        command = [sys.executable, __file__, "--mistral", str(long), *(["--quick"] if options.quick else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(left(), 60), check=True)
            report["rows"].append(json.loads(done.stdout.strip().splitlines()[-1]))
        except subprocess.TimeoutExpired:
            print("  transformers Mistral: not measured, its time was up")
        except subprocess.CalledProcessError as error:
            print(f"  transformers Mistral: not measured: {error.stderr[-1500:]}")
    save()

    print(f"\n{report.get('device', DEVICE)}, torch {torch.__version__}, copy {bandwidth / 1e12:.3f} TB/s, "
          f"{time.perf_counter() - began:.0f} s\n")  # fmt: skip
    print(f"{'product (GB/s)':28s} {'cuBLAS':>7s} {'+norm…':>7s} {'Triton':>7s}  tile")
    for row in report["products"]:
        if row["tiles"]:
            name = max(row["tiles"], key=lambda key: row["tiles"][key])
            print(f"{row['kind']:8s} {row['shape']!s:19s} {row['cublas_alone']:7.0f} "
                  f"{row['cublas_with_its_surroundings']:7.0f} {row['tiles'][name]:7.0f}  {name}")  # fmt: skip
    print(f"{'decoding':34s} {'ms':>8s} {'tok/s':>8s} {'floor':>8s} {'of it':>6s} {'start s':>7s}")
    for row in report["rows"]:
        floor, part = row.get("floor_tokens_per_second"), row.get("of_floor")
        print(f"{row['what']:34s} {row['ms']:8.3f} {row['tokens_per_second']:8.1f} "
              f"{'' if floor is None else f'{floor:.1f}':>8s} {'' if part is None else f'{part:.1%}':>6s} "
              f"{row.get('first_step_seconds', row.get('first_steps_seconds')):7.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
