"""Variants in shared windows against scoring both full windows: an Evo 2 7B on a GPU, a small model on a CPU."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

import hyaena
from benchmarks.cpu import models
from benchmarks.gpu.session import GpuSession
from benchmarks.registry import IncorrectError, Row, Session, Step, Summary, Target, pairwise
from hyaena.bench.clock import Side, take_turns, wall_seconds
from hyaena.bench.run import random_model
from hyaena.config import ModelConfig
from hyaena.model import StripedHyena
from hyaena.records import Variant
from hyaena.scoring import EditScore, score_variants
from hyaena.tokenizers import CharacterTokenizer

SPACING = 100
"""Letters from one variant to the next, on average: 2,000 SNVs in 200,000 letters."""
SAME = 1e-3
"""Of differences of log-likelihoods in float32: two evaluations of the same windows."""
SECONDS = 45.0
"""For the timed calls on a GPU, together."""


@dataclass(frozen=True)
class Task:
    """SNVs of a synthetic genome.

    Attributes:
        genome: one contig, the same one each time.
        variants: in order.
        window, grid: of ``score_variants``.
    """

    genome: dict[str, str]
    variants: list[Variant]
    window: int
    grid: int

    @classmethod
    def make(cls, count: int, window: int, grid: int) -> Task:
        """So many SNVs, ``SPACING`` letters apart on average, away from the ends of the contig."""
        draw = random.Random(0)
        length = count * SPACING
        contig = "".join(draw.choices("ACGT", k=length + 2 * window))
        starts = sorted(draw.sample(range(window, window + length), count))
        others = {letter: "ACGT".replace(letter, "") for letter in "ACGT"}
        variants = [Variant("chr1", p, contig[p], draw.choice(others[contig[p]])) for p in starts]
        return cls({"chr1": contig}, variants, window, grid)

    def windows(self, grid: int) -> Iterator[tuple[str, str]]:
        """Both windows of each variant, written out."""
        contig = self.genome["chr1"]
        for variant in self.variants:
            first = (variant.start - self.window // 2) // grid * grid
            text, at = contig[first : first + self.window], variant.start - first
            yield text, text[:at] + variant.alternative + text[at + 1 :]

    def full(self, model: StripedHyena, grid: int = 1) -> list[float]:
        """Differences by scoring both full windows of each variant, packed into passes as any texts are."""
        texts = (text for pair in self.windows(grid) for text in pair)
        tokenizer = CharacterTokenizer(model.config.vocab_size)
        sums = [found.sum for _, found in hyaena.iter_scores(model, tokenizer, texts, entropy=False, rank=False)]
        return [b - a for a, b in zip(sums[::2], sums[1::2], strict=True)]

    def shared(self, model: StripedHyena, grid: int = 1) -> list[EditScore]:
        """The same by windows that are read once."""
        tokenizer = CharacterTokenizer(model.config.vocab_size)
        return score_variants(model, tokenizer, self.genome, self.variants, window=self.window, grid=grid)

    def part(self, start: int, stop: int) -> Task:
        """Some of the variants, which are neighbours."""
        return replace(self, variants=self.variants[start:stop])


def evo2_7b() -> ModelConfig:
    """Evo 2 7B; its input projections in the model's dtype, in which both roads round alike."""
    return replace(ModelConfig.from_name("evo2-7b"), fp8_input_projections=False)


def on_gpu(session: GpuSession) -> Iterator[Step]:
    """Four layers in float32 first, then the whole model."""
    quick = session.quick
    config = replace(session.sizes.config, vocab_size=512, name="small") if quick else evo2_7b()
    kinds = ("hyena_se", "hyena_mr", "hyena_li", "attention")
    four = replace(config, layer_types=kinds, name="four layers")
    task = Task.make(6, 128 if quick else 8192, 32 if quick else 1024)
    yield Step(
        "four layers, float32",
        lambda: [agree(random_model(four, session.device, torch.float32), task, "evo2_7b's width, four layers")],
    )
    session.forget_model()
    yield Step("the model", partial(timed, session, four if quick else config))


@torch.inference_mode()
def agree(model: StripedHyena, task: Task, name: str) -> Row:
    """Both roads to the same windows give the same differences.

    Raises:
        IncorrectError: they do not.
    """
    worst, largest = 0.0, 0.0
    for grid in (1, task.grid):
        full, shared = task.full(model, grid), task.shared(model, grid)
        worst = max(worst, *(abs(a - b.difference) for a, b in zip(full, shared, strict=True)))
        largest = max(largest, *map(abs, full))
    if not worst <= SAME:
        raise IncorrectError(f"differences of log-likelihoods differ by {worst:.2g}, allowed {SAME:g}")
    return Row(
        what=f"differences of {len(task.variants)} SNVs by shared and by full windows of {task.window:,}, {name}",
        unit="tests",
        ours=Summary.of([0]),
        target=Target("<=", 0),
        note=f"Exact windows and grid {task.grid:,}, float32: largest disagreement {worst:.2g}, allowed {SAME:g}; the "
        f"largest difference is {largest:.2g}.",
    )


def timed(session: GpuSession, config: ModelConfig) -> list[Row]:
    """As many SNVs as fit into the time, in three parts, each by all three ways."""
    torch.manual_seed(0)
    model = random_model(config, session.device, session.dtype)
    window, grid = (128, 32) if session.quick else (8192, 1024)
    trial = Task.make(8, window, grid)
    ways = (trial.full, trial.shared, partial(trial.shared, grid=grid))
    for way in ways:
        way(model)  # compile
    one = wall_seconds(lambda: trial.full(model)) / 8
    count = 12 if session.quick else max(12, min(2000, int(SECONDS / (one * 2.1))))
    task = Task.make(2000, window, grid).part(0, count)
    cut = [round(i * count / 3) for i in range(4)]
    parts = [task.part(a, b) for a, b in itertools.pairwise(cut)]
    return compare(model, parts, "evo2_7b, bfloat16", {"both": 1.3, "grid": 3.0})


def on_cpu(session: Session) -> Iterator[Step]:
    """A small model of Evo's kind; windows of 2,048."""
    yield Step("SNVs", partial(small_model, session))


SMALL = replace(
    models.EVO,
    hidden_size=384,
    layer_types=("hyena", "hyena", "hyena", "attention", "hyena", "hyena"),
    intermediate_size=1024,
    num_attention_heads=6,
    num_key_value_heads=6,
    name="11M",
)
"""10,914,048 parameters: wide enough that tokens cost more than calls."""


def small_model(session: Session) -> list[Row]:
    """Correct first, then timed."""
    torch.manual_seed(0)
    model = StripedHyena(models.EVO if session.quick else SMALL).eval()
    with torch.no_grad():
        model.embed_tokens.weight.mul_(4)  # the head, too: fresh weights predict nearly the same of every letter
    task = Task.make(6, 128, 32) if session.quick else Task.make(24, 2048, 256)
    checked = agree(model, task.part(0, 6), "11M parameters of Evo's kind")
    third = len(task.variants) // 3
    parts = [task.part(i * third, (i + 1) * third) for i in range(3)]
    return [checked, *compare(model, parts, "11M parameters of Evo's kind, float32", {})]


def compare(model: StripedHyena, parts: Sequence[Task], name: str, targets: dict[str, float]) -> list[Row]:
    """Times of the three ways, part by part, side by side."""
    times: dict[str, list[float]] = {"full": [], "both": [], "grid": []}
    window, grid = parts[0].window, parts[0].grid
    for task in parts:
        sides = {
            "full": Side(partial(task.full, model)),
            "both": Side(partial(task.shared, model)),
            "grid": Side(partial(task.shared, model, grid=grid)),
        }
        for key, samples in take_turns(sides, 1).items():
            times[key] += samples.values
    counts = [len(task.variants) for task in parts]
    rows = []
    for key, how in (("both", "exact windows"), ("grid", f"--grid {grid}")):
        rows.append(
            Row(
                what=f"{sum(counts)} SNVs, window {window:,}, {how}, {name}",
                unit="variants/s",
                ours=Summary.of(n / s for n, s in zip(counts, times[key], strict=True)),
                baseline_name="both full windows",
                baseline=Summary.of(n / s for n, s in zip(counts, times["full"], strict=True)),
                ratio=pairwise(times["full"], times[key]),
                ratio_name="ours / both full windows",
                target=Target(">=", targets[key]) if key in targets else None,
                note=f"{SPACING} letters from one SNV to the next on average. The scores on the host, in "
                f"{len(parts)} parts, each by all three ways in turn.",
            )
        )
    return rows
