"""Many requests, submitted together: ours, and by continuous batching of transformers on Mistral's shape.

    python -m benchmarks.gpu.continuous [--quick]

prints the baseline's seconds as one line of JSON, in a process of its own with the whole device. The baseline is what
``MistralForCausalLM.generate_batch`` runs, through the manager that takes a length for every request: keys and values
in pages, continuous batching, CUDA graphs, the settings that transformers chooses, greedy, no end of text. Its warm-up
and a first, shorter round are not timed. Both sides read and write the same numbers of tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu import baseline
from benchmarks.gpu.engine import prompt_of, request_shapes, time_requests
from benchmarks.gpu.session import GpuSession
from benchmarks.gpu.sizes import FULL, QUICK, Sizes
from benchmarks.mistral import Mistral
from benchmarks.registry import IncorrectError, Row, Step, Summary, Target

TIMES = 3
"""Tokens per second against the baseline."""
WARM = 16
"""Answers of the round that is not timed."""


def main() -> None:
    """Build the baseline, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on any device")
    options = parser.parse_args()
    small = {"num_blocks": 64, "max_batch_tokens": 64} if options.quick else {}
    print(json.dumps(measure(QUICK if options.quick else FULL, **small)), flush=True)


@torch.no_grad()  # tensors of inference mode could not be changed in the baseline's own thread
def measure(sizes: Sizes, **memory: int) -> dict[str, Any]:
    """Seconds of the baseline for all requests, and how many tokens it wrote.

    Args:
        memory: settings of the baseline's memory; what transformers chooses by the device's unless given.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Mistral(sizes.config, dtype=torch.bfloat16, device=device).model
    settings = GenerationConfig(do_sample=False, max_new_tokens=sizes.requests[2][1], eos_token_id=-1, pad_token_id=0)
    shapes = request_shapes(sizes)[: sizes.compared_requests]
    rng = random.Random(2)
    began = time.perf_counter()
    with model.continuous_batching_context_manager(
        generation_config=settings,
        continuous_batching_config=ContinuousBatchingConfig(**memory),
        block=True,
        timeout=5,
    ) as manager:
        run(manager, [(prompt_of(rng, n), min(WARM, new)) for n, new in shapes[: len(shapes) // 2]])
        started = time.perf_counter() - began
        seconds, tokens = run(manager, [(prompt_of(rng, n), new) for n, new in shapes])
        how = f"attention {model.config._attn_implementation}"
    return {"seconds": seconds, "tokens": tokens, "start": started, "note": how}


def run(manager: Any, requests: list[tuple[list[int], int]]) -> tuple[float, int]:
    """Seconds from the first request to the end of the last, and all tokens that were written.

    Raises:
        RuntimeError: a request failed, or the manager ended.
    """
    began = time.perf_counter()
    keys = {manager.add_request(ids, max_new_tokens=new) for ids, new in requests}
    written = 0
    while keys:
        found = manager.get_result(timeout=1.0)
        if found is None:
            if not manager.is_running():
                raise RuntimeError("continuous batching ended before all requests")
            continue
        if found.error:
            raise RuntimeError(f"a request failed: {found.error}")
        if found.is_finished():
            keys.discard(found.request_id)
            written += len(found.generated_tokens)
    return time.perf_counter() - began, written


def compare(session: GpuSession) -> Iterator[Step]:
    """Ours, then the baseline in a process of its own."""
    yield Step("many requests beside generate_batch", lambda: [beside(session)])


def beside(session: GpuSession) -> Row:
    """Tokens per second that both write.

    Raises:
        IncorrectError: the baseline wrote another number of tokens.
        RuntimeError: the baseline did not finish.
    """
    shapes = request_shapes(session.sizes)[: session.sizes.compared_requests]
    ours, _ = time_requests(session, shapes)
    session.forget_model()
    arguments = ["--quick"] if session.quick else []
    lines, error = baseline.finish(baseline.start(*arguments, module="benchmarks.gpu.continuous"), session.left)
    if not lines:
        raise RuntimeError(f"the baseline: {error or 'it printed nothing'}")
    theirs, tokens = lines[-1], sum(new for _, new in shapes)
    if theirs["tokens"] != tokens:
        raise IncorrectError(f"the baseline wrote {theirs['tokens']} tokens, and was asked for {tokens}")
    return Row(
        what=f"{len(shapes)} requests at once, against generate_batch on Mistral's shape",
        unit="tokens/s",
        ours=Summary.of([tokens / ours]),
        baseline_name="Mistral's shape, generate_batch",
        baseline=Summary.of([tokens / theirs["seconds"]]),
        ratio=Summary.of([theirs["seconds"] / ours]),
        ratio_name="ours / baseline",
        target=Target(">=", TIMES),
        note=f"Ours {ours:.1f} s; the baseline {theirs['seconds']:.1f} s, {theirs['note']}, after "
        f"{theirs['start']:.0f} s of start-up and a first round.",
    )


if __name__ == "__main__":
    sys.exit(main())
