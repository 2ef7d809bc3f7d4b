"""What the benchmarks of a GPU measure, and what each figure has to reach."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.registry import Target
from hyaena.bench.run import SH_7B
from hyaena.config import ModelConfig


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run.

    Attributes:
        config: our model; the baseline has its widths, and attention in every layer.
        operator: lengths of the fused operator, forward.
        operator_gradients: its length, forward and backward.
        operator_kinds: lengths at which it is measured with every kind of filter.
        prompts: lengths of prefills; the baseline reads those from ``long`` on.
        long: where the baseline begins.
        decodes: batch and context of decoding, each with the target of its memory-bandwidth utilisation, or None.
        baseline_decodes: batch and context where the baseline decodes too, each with its target.
        steps: of a round of decoding.
        repeats: of an operator's call.
        training: window of a training step, with the target of the unpacked step against attention layers, and of the
            packed step against the unpacked one.
        documents: least and most tokens of a packed document.
        training_rounds: steps of each side.
        lora_length: window of a LoRA step.
        lora_rounds: steps of each side.
        first_tokens: lengths of prompts whose first token is timed.
        requests: how many are submitted together, least and most tokens of their prompts, and of their answers.
        compared_requests: how many of them the baseline is given too.
        rows: that the engine decodes together.
        most_memory: GB that a prefill of the longest prompt may allocate beside weights, keys and values.
    """

    config: ModelConfig
    operator: tuple[int, ...]
    operator_gradients: int
    operator_kinds: tuple[int, ...]
    prompts: tuple[int, ...]
    long: int
    decodes: tuple[tuple[int, int, float | None], ...]
    baseline_decodes: tuple[tuple[int, int, Target], ...]
    steps: int
    repeats: int
    training: tuple[tuple[int, float, float | None], ...]
    documents: tuple[int, int]
    training_rounds: int
    lora_length: int
    lora_rounds: int
    first_tokens: tuple[int, ...]
    requests: tuple[int, tuple[int, int], tuple[int, int]]
    compared_requests: int
    rows: int
    most_memory: float = 8.0

    @property
    def training_config(self) -> ModelConfig:
        """Two Hyena and two attention layers of the model's width; a small vocabulary, so that layers are measured."""
        return replace(
            self.config, layer_types=("hyena", "attention") * 2, vocab_size=512, max_length=2**20, name="four layers"
        )


FULL = Sizes(
    config=SH_7B,
    operator=(32_768, 131_072),
    operator_gradients=32_768,
    operator_kinds=(8192, 32_768),
    prompts=(8192, 32_768, 131_072),
    long=32_768,
    decodes=((1, 2048, 0.92), (1, 32_768, 0.92), (2, 2048, 0.92), (16, 2048, 0.92), (64, 2048, 0.92), (64, 8192, None)),
    baseline_decodes=((1, 32_768, Target(">", 1)), (64, 8192, Target(">=", 1.5))),
    steps=24,
    repeats=30,
    training=((32_768, 1.25, 1.1), (65_536, 1.4, None), (131_072, 1.57, None)),
    documents=(256, 8192),
    training_rounds=3,
    lora_length=8192,
    lora_rounds=10,
    first_tokens=(16, 128, 512),
    requests=(512, (64, 4096), (16, 512)),
    compared_requests=128,
    rows=128,
)

TINY = replace(
    SH_7B,
    vocab_size=320,
    hidden_size=64,
    layer_types=("hyena", "attention") * 2,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    name="tiny",
)

QUICK = Sizes(
    config=TINY,
    operator=(20, 40),
    operator_gradients=20,
    operator_kinds=(20,),
    prompts=(24, 48, 96),
    long=48,
    decodes=((1, 16, 0.92), (1, 48, 0.92), (3, 24, None)),
    baseline_decodes=((1, 48, Target(">", 1)), (3, 24, Target(">=", 1.5))),
    steps=2,
    repeats=2,
    training=((40, 1.25, 1.1), (80, 1.4, None)),
    documents=(4, 16),
    training_rounds=2,
    lora_length=40,
    lora_rounds=2,
    first_tokens=(4, 9),
    requests=(6, (4, 30), (2, 8)),
    compared_requests=3,
    rows=2,
)
"""For ``--quick``: shows that everything runs, and nothing about speed."""
