"""The training loop on one device.

The order of things in a step: batch (a function of the seed and the step), forward and backward for each micro-batch,
clip, AdamW, schedule. The host never waits for the device inside a step; it does at the end of a logging interval,
where a loss that is not finite stops the run before anything is written.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from hyaena import hub
from hyaena.checkpoints import save_model
from hyaena.errors import CheckpointError, ConfigError, HyaenaError, NonFiniteError
from hyaena.files import write_atomically
from hyaena.model import StripedHyena
from hyaena.tokenizers import Tokenizer, load_tokenizer
from hyaena.train.config import TrainConfig
from hyaena.train.data import Corpus, PackedWindows, read_documents, tokenize
from hyaena.train.evaluate import Evaluation, autocast, evaluate, summed_loss
from hyaena.train.filters import parametrize_filters, plain_state_dict
from hyaena.train.optim import learning_rate, make_optimizer
from hyaena.train.storage import (
    CHECKPOINT,
    CURVE,
    METRICS,
    Metrics,
    load_checkpoint,
    plot_metrics,
    save_checkpoint,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """Where a command left the run: the steps done, whether that is all of them, and the held-out bits per byte."""

    step: int
    finished: bool
    bits_per_byte: float | None
    best_bits_per_byte: float | None


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    max_seconds: float | None = None,
    device: str = "auto",
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train, or go on training, until ``config.steps`` steps are done, ``max_seconds`` have passed or ``stop()``.

    In ``config.output``: ``config.yml`` (the resolved configuration), ``metrics.jsonl``, ``loss.png``, ``last.pt``
    (what ``resume`` needs), ``best/`` (the model with the lowest held-out loss) and, at the end, ``final/``; the two
    folders load like any other model.

    Raises:
        ConfigError, InputError: the configuration or the data cannot be used; nothing was written.
        CheckpointError: there is nothing to resume, or there is a run in the way.
        CheckpointError, OutputError: the disk is full.
        NonFiniteError: the loss became NaN or infinite; ``last.pt`` holds the last finite state that was saved.
    """
    run = Run(config, device=device)
    run.restore() if resume else run.begin()
    return run.advance(max_seconds=max_seconds, progress=progress, stop=stop)


class _Interval:
    """The steps since the last line of metrics: their losses and gradient norms stay on the device until ``read``."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.started = time.monotonic()
        self._pairs: list[Tensor] = []

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self._pairs.append(torch.stack([loss, norm]))

    def read(self) -> tuple[list[float], list[float]]:
        losses, norms = torch.stack(self._pairs).T.tolist()
        return losses, norms


class Run:
    """One training run: data, model and optimizer, and how far they are."""

    def __init__(self, config: TrainConfig, *, device: str = "auto") -> None:
        self.config = config
        self.folder = Path(config.output)
        self.device = _device(device)
        self.precision = _precision(config, self.device)
        torch.manual_seed(config.seed)
        self.model, self.tokenizer, self.tokenizer_files = _model_and_tokenizer(config)
        model_config = self.model.config
        if self.tokenizer.vocab_size > model_config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self.tokenizer.vocab_size} ids and the model only {model_config.vocab_size}: "
                "raise model.vocab_size"
            )
        self.corpus = self._corpus(config.data.train)
        self.heldout = self._corpus(config.data.heldout) if config.data.heldout else None
        self.windows = PackedWindows(self.corpus, window=config.window, batch_size=config.batch_size, seed=config.seed)
        self.model.to(self.device, dtype=torch.float32)
        parametrize_filters(self.model)
        if config.activation_checkpointing:
            for layer in self.model.layers:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        self.optimizer = make_optimizer(self.model, config.optim)
        self.loss = torch.compile(summed_loss) if config.compile else summed_loss
        self.metrics = Metrics(self.folder)
        self.step = 0
        self.elapsed = 0.0
        self.best: float | None = None
        self.latest: float | None = None

    def _corpus(self, sources: tuple[str, ...]) -> Corpus:
        return tokenize(read_documents(sources, self.config.data.pattern), self.tokenizer)

    def begin(self) -> None:
        """Make the folder of a new run; refuses to overwrite one that exists."""
        if (self.folder / CHECKPOINT).exists():
            raise CheckpointError(
                f"{self.folder} already holds a run: continue it with --resume or choose another output"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
        write_atomically(self.folder / "config.yml", lambda file: file.write(text.encode()))
        self.metrics.truncate(0)

    def restore(self) -> None:
        """Go back to the last checkpoint of this run, exactly."""
        state = load_checkpoint(self.folder)
        changed = _changed(json.loads(state["config"]), _identity(self.config))
        if changed:
            raise CheckpointError(
                f"{self.folder} was started with another {', '.join(changed)}; use the same configuration"
            )
        if state["data"] != self.corpus.checksum:
            raise CheckpointError(
                f"the training text is not the one {self.folder} began with; restore it, or start anew"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.best, self.latest = state["best"], state["latest"]
        self.metrics.truncate(self.step)

    def save(self) -> None:
        """Write ``last.pt``."""
        state: dict[str, Any] = {
            "config": json.dumps(_identity(self.config)),
            "data": self.corpus.checksum,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "elapsed": self.elapsed,
            "best": self.best,
            "latest": self.latest,
        }
        save_checkpoint(self.folder, state)

    def export(self, name: str) -> None:
        """Write the model, with raw poles, as a folder that loads like any other model."""
        with torch.device("meta"):  # no fresh weights, which would draw from the run's random numbers
            model = StripedHyena(self.model.config)
        model.load_state_dict(plain_state_dict(self.model), assign=True)
        save_model(
            model, self.folder / name, dtype=getattr(torch, self.config.export_dtype), extra_files=self.tokenizer_files
        )

    def update(self) -> tuple[Tensor, Tensor]:
        """One optimizer step: mean loss per token and gradient norm before clipping, both still on the device."""
        config = self.config
        rate = learning_rate(self.step, config.steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        batch = self.windows.batch(self.step)
        # Each micro-batch weighs by its number of targets, so accumulation equals one large batch.
        count = batch.num_targets
        total = torch.zeros((), device=self.device)
        for part in batch.split(config.micro_batch_size or config.batch_size):
            with autocast(self.device, self.precision):
                loss = self.loss(self.model, part.to(self.device)) / count
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total, norm

    def advance(self, *, max_seconds: float | None, progress: bool, stop: Callable[[], bool]) -> Result:
        """Train on from the present step; see ``train``."""
        config = self.config
        started, before = time.monotonic(), self.elapsed
        interval = _Interval(self.step)
        self.model.train()
        with tqdm(total=config.steps, initial=self.step, unit="step", disable=not progress, dynamic_ncols=True) as bar:
            leaving = self.step >= config.steps
            while not leaving:
                interval.add(*self.update())
                bar.update()
                self.elapsed = before + time.monotonic() - started
                done = self.step == config.steps
                out_of_time = max_seconds is not None and time.monotonic() - started >= max_seconds
                leaving = done or out_of_time or stop()
                evaluating = done or _due(self.step, config.eval_every)
                saving = leaving or _due(self.step, config.save_every)
                if not (evaluating or saving or _due(self.step, config.log_every)):
                    continue
                # Before anything is written: a loss that is not finite must not replace what is on the disk.
                self._log(interval, bar)
                if evaluating and self.heldout is not None:
                    self._evaluate(self.heldout, bar)
                if saving:
                    self.save()
                if evaluating or leaving:
                    self._plot()
                interval = _Interval(self.step)
        finished = self.step == config.steps
        if finished:
            self.export("final")
        return Result(self.step, finished, self.latest, self.best)

    def _log(self, interval: _Interval, bar: tqdm) -> None:
        """Wait for the device, check that all went well since the last time, and write a line of metrics."""
        config = self.config
        losses, norms = interval.read()
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=interval.first + 1):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteError(
                    f"the loss ({loss:g}, gradient norm {norm:g}) is not finite at step {step}: go back to the last "
                    f"checkpoint in {self.folder} with --resume, or start again with a lower optim.lr"
                )
        loss = sum(losses) / len(losses)
        bits = loss / math.log(2) * self.corpus.num_predictions / self.corpus.num_bytes
        speed = len(losses) * config.batch_size * config.window / (time.monotonic() - interval.started)
        self.metrics.append(
            kind="train",
            step=self.step,
            tokens=self.step * config.batch_size * config.window,
            loss=round(loss, 6),
            bits_per_byte=round(bits, 6),
            lr=learning_rate(self.step - 1, config.steps, config.optim),
            grad_norm=round(norms[-1], 5),
            tokens_per_second=round(speed),
            elapsed=round(self.elapsed, 2),
            **_peak_memory(self.device),
        )
        shown = {"bpb": f"{bits:.3f}", "tok/s": f"{speed:,.0f}"}
        bar.set_postfix(shown if self.latest is None else {**shown, "held-out": f"{self.latest:.3f}"})

    def _evaluate(self, heldout: Corpus, bar: tqdm) -> None:
        result = self.evaluate(heldout)
        self.latest = result.bits_per_byte
        self.metrics.append(
            kind="heldout",
            step=self.step,
            tokens=self.step * self.config.batch_size * self.config.window,
            loss=round(result.loss, 6),
            bits_per_byte=round(result.bits_per_byte, 6),
            elapsed=round(self.elapsed, 2),
        )
        bar.write(f"step {self.step}: held-out {result.bits_per_byte:.4f} bits per byte")
        if self.best is None or result.bits_per_byte < self.best:
            self.best = result.bits_per_byte
            self.export("best")

    def evaluate(self, corpus: Corpus) -> Evaluation:
        """Score ``corpus`` with the model as it stands."""
        config = self.config
        return evaluate(
            self.model,
            corpus,
            window=config.window,
            overlap=config.eval_overlap,
            batch_size=config.micro_batch_size or config.batch_size,
            device=self.device,
            precision=self.precision,
        )

    def _plot(self) -> None:
        try:
            plot_metrics({self.model.config.name: self.folder / METRICS}, self.folder / CURVE, title=self.folder.name)
        except HyaenaError as error:  # a picture is not worth a run
            log.warning("no loss curve: %s", error)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the device {name!r} cannot be used here; try --device cpu") from error
    return device


def _peak_memory(device: torch.device) -> dict[str, int]:
    """The most bytes that tensors took on a GPU so far, as an entry of the metrics; nothing on the CPU."""
    return {"peak_memory": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def _precision(config: TrainConfig, device: torch.device) -> str:
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if device.type == "cuda" else "float32"


def _model_and_tokenizer(config: TrainConfig) -> tuple[StripedHyena, Tokenizer, dict[str, bytes]]:
    """The model as it starts, its tokenizer, and the tokenizer's files, which go with every export."""
    if config.model is not None:
        folder = Path(config.data.tokenizer or "")
        tokenizer = load_tokenizer(folder, config.model)
        model = StripedHyena(config.model)
    else:
        assert config.init_from is not None
        folder = hub.locate(config.init_from).folder
        model, tokenizer = hub.load(config.init_from, dtype="float32", device="cpu")
    if config.window > model.config.max_length:
        raise ConfigError(f"window {config.window} is longer than the model's maximum of {model.config.max_length}")
    files: dict[str, bytes] = {}
    if model.config.tokenizer == "hf":
        folder = folder.parent if folder.is_file() else folder
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return model, tokenizer, files


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What must not change between the commands of one run; JSON-ready."""
    free = {"output", "log_every", "eval_every", "save_every", "export_dtype", "compile"}
    return {key: value for key, value in config.to_dict().items() if key not in free}


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            names += [f"{key}.{name}" for name in _changed(before, after)]
        elif before != after:
            names.append(key)
    return names
