"""The training loop on one device.

The order of things in a step: batch (a function of the seed and the step), forward and backward for each micro-batch,
clip, AdamW, schedule. The host never waits for the device inside a step; it does at the end of a logging interval,
where a loss that is not finite stops the run before anything is written.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from hyaena.arguments import kind_of
from hyaena.checkpoints import as_device, save_model
from hyaena.errors import (
    CheckpointError,
    ConfigError,
    HyaenaError,
    InputError,
    NonFiniteError,
    OutputError,
    counted,
    shown,
)
from hyaena.files import locked, write_atomically
from hyaena.train.config import TrainConfig
from hyaena.train.corpus import Corpus, tokenize
from hyaena.train.data import PackedWindows
from hyaena.train.documents import find_files, read_documents
from hyaena.train.evaluate import Evaluation, autocast, evaluate, summed_loss
from hyaena.train.filters import parametrize_filters, poles_outside
from hyaena.train.optim import learning_rate, load_optimizer, make_optimizer
from hyaena.train.plot import plot_metrics
from hyaena.train.start import Start, find_start, initial_model, saved_start
from hyaena.train.storage import (
    BEST,
    CHECKPOINT,
    CONFIG,
    CURVE,
    FINAL,
    METRICS,
    Metrics,
    build_empty,
    is_written_by_run,
    load_checkpoint,
    read_metrics,
    save_checkpoint,
    with_raw_poles,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """Where a command left the run.

    Attributes:
        step: the steps done.
        finished: that is all of them.
        bits_per_byte: the latest on held-out text, or None without such text.
        best_bits_per_byte: the lowest after step 0.
        initial_bits_per_byte: before the first step.
    """

    step: int
    finished: bool
    bits_per_byte: float | None
    best_bits_per_byte: float | None
    initial_bits_per_byte: float | None


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
    (what ``resume`` needs, and the model: see ``storage.export_model``), ``best/`` (the model with the lowest held-out
    loss after the start) and, at the end, ``final/``; the two folders load like any other model.

    ``progress`` draws a bar where the standard error is a terminal.

    Raises:
        ConfigError, InputError: the configuration or the data cannot be used; nothing was written.
        CheckpointError: there is nothing to resume, or it is damaged; there is a run in the way; or a change that a
            run cannot take.
        CheckpointError, OutputError: the disk is full, or another process trains in this folder.
        NonFiniteError: the loss became NaN or infinite; ``last.pt`` holds the last finite state that was saved.
    """
    seconds = math.inf if max_seconds is None else max_seconds
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
        raise InputError(f"max_seconds must be a number, 0 or more, not {shown(max_seconds)}")
    with open_run(config, resume=resume, device=device) as trainer:
        return trainer.advance(max_seconds=max_seconds, progress=progress, stop=stop)


@contextlib.contextmanager
def open_run(config: TrainConfig, *, resume: bool = False, device: str = "auto") -> Iterator[Trainer]:
    """Make a run ready to advance, and hold its folder against other processes; the errors are those of ``train``.

    What costs little is checked first: the device, the folder, the files of the data and, to resume, the
    configuration; then the text is read; weights are read or downloaded last.
    """
    if not isinstance(config, TrainConfig):
        raise InputError(f"config must be a TrainConfig, not {kind_of(config)}: TrainConfig.from_file reads one")
    used = _device(device)
    folder = Path(config.output)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ConfigError(f"output {folder} is a file: name a folder")
    for sources in (config.data.train, config.data.heldout):
        find_files(sources, config.data.pattern, without=functools.partial(is_written_by_run, folder=folder))
    if resume and not os.path.isfile(folder / CHECKPOINT):
        raise CheckpointError(f"nothing to resume: {folder / CHECKPOINT} does not exist; run without --resume")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except OSError as error:
            raise OutputError(f"cannot write into {folder}: {error.strerror}; choose another output") from error
        if not resume and (folder / CHECKPOINT).exists():
            raise CheckpointError(f"{folder} already holds a run: continue it with --resume or choose another output")
        state = load_checkpoint(folder) if resume else None
        if state is not None:
            _check_unchanged(config, state)
            if (folder / METRICS).exists():
                read_metrics(folder / METRICS)  # refuses a damaged file, before the text is read
        trainer = Trainer(config, device=used, state=state)
        del state
        trainer.write_config()
        yield trainer


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


class Trainer:
    """One training run: data, model and optimizer, and how far they are.

    Args:
        config: the run.
        device: where it trains.
        state: from ``storage.load_checkpoint``, to go on from exactly there; None to begin.
    """

    def __init__(
        self, config: TrainConfig, *, device: torch.device | str = "cpu", state: dict[str, Any] | None = None
    ) -> None:
        self.config = config
        self.folder = Path(config.output)
        self.device = torch.device(device)
        self.precision = _precision(config, self.device)
        torch.manual_seed(config.seed)
        self.start: Start = find_start(config) if state is None else self._saved_start(state)
        self.corpus = self._corpus(config.data.train)
        self.heldout = self._corpus(config.data.heldout) if config.data.heldout else None
        self.windows = PackedWindows(self.corpus, window=config.window, batch_size=config.batch_size, seed=config.seed)
        if state is not None and state["data"] != self._checksum():
            raise CheckpointError(
                f"the training text or the held-out text is not the one {self.folder} began with; restore it, or start "
                "anew"
            )
        if state is None:
            self.model = initial_model(config, self.start)
            self.model.to(self.device, dtype=torch.float32)
            parametrize_filters(self.model)
            outside = poles_outside(self.model)
            if outside.count:
                log.warning("%s: kept as they are; training may pull them inside", outside)
        else:
            self.model = build_empty(self.start.config)
            with self._fitting_state():
                self.model.load_state_dict(state["model"], assign=True)
            self.model.to(self.device)
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
        self.initial: float | None = None
        self.scored: int | None = None  # the step of the latest evaluation
        if state is not None:
            with self._fitting_state():
                load_optimizer(self.optimizer, state["optimizer"])
                torch.set_rng_state(state["rng"])
            self.step, self.elapsed = state["step"], state["elapsed"]
            self.best, self.latest, self.initial = state["best"], state["latest"], state["initial"]
            self.scored = state["scored"]
            self._announce_steps(json.loads(state["config"])["steps"])
        count = sum(parameter.numel() for parameter in self.model.parameters())
        log.info(
            f"{count:,} parameters; {counted(len(self.corpus.tokens), 'token')} of training text in "
            f"{counted(len(self.corpus.starts), 'document')}; {self.precision} on {self.device}"
        )

    @contextlib.contextmanager
    def _fitting_state(self) -> Iterator[None]:
        """Within it, a saved state that does not fit the model or the optimizer is a ``CheckpointError``."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder / CHECKPOINT} does not fit the model and optimizer of this run "
                f"({type(error).__name__}): restore it, or start a new run"
            ) from error

    def _saved_start(self, state: dict[str, Any]) -> Start:
        with self._fitting_state():
            return saved_start(state)

    def _corpus(self, sources: tuple[str, ...]) -> Corpus:
        own = functools.partial(is_written_by_run, folder=self.folder)
        pieces = read_documents(sources, self.config.data.pattern, without=own)
        folder = self.folder if self.folder.is_dir() else None  # on the disk that holds the run
        return tokenize(pieces, self.start.tokenizer, window=self.config.window, folder=folder)

    def _checksum(self) -> int:
        """CRC-32 of all text: scores of two held-out texts are not to be compared, and ``best/`` is chosen by them."""
        texts = [self.corpus] if self.heldout is None else [self.corpus, self.heldout]
        return zlib.crc32(json.dumps([text.checksum for text in texts]).encode())

    def _announce_steps(self, before: int) -> None:
        """Log what another number of steps changes in a run that goes on."""
        config = self.config
        if config.steps == before:
            return
        rates = [learning_rate(max(self.step - 1, 0), before, config.optim)]
        rates.append(learning_rate(min(self.step, config.steps - 1), config.steps, config.optim))
        log.warning(
            f"steps: {config.steps} instead of {before}; the learning rate now falls until step {config.steps}: "
            f"at step {self.step} it goes on from {rates[0]:.3g} to {rates[1]:.3g}"
        )

    def write_config(self) -> None:
        """Write the resolved configuration, and remove metrics of steps that are not part of the run."""
        self.metrics.truncate(self.step if (self.folder / CHECKPOINT).exists() else -1)
        text = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
        write_atomically(self.folder / CONFIG, lambda file: file.write(text.encode()))

    def save(self) -> None:
        """Write ``last.pt``."""
        state: dict[str, Any] = {
            "config": json.dumps(_identity(self.config)),
            "model_config": json.dumps(self.start.config.to_dict()),
            "tokenizer": {name: _text(content) for name, content in self.start.tokenizer_files.items()},
            "data": self._checksum(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "elapsed": self.elapsed,
            "best": self.best,
            "latest": self.latest,
            "initial": self.initial,
            "scored": self.scored,
        }
        save_checkpoint(self.folder, state)

    def export(self, name: str) -> None:
        """Write the model, with raw poles, as a folder that loads like any other model."""
        save_model(
            with_raw_poles(self.model),
            self.folder / name,
            dtype=getattr(torch, self.config.export_dtype),
            extra_files=self.start.tokenizer_files,
        )

    def update(self) -> tuple[Tensor, Tensor]:
        """Take one optimizer step.

        Returns the mean loss per token and the gradient norm before clipping, both still on the device.
        """
        config = self.config
        rate = learning_rate(self.step, config.steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        batch = self.windows.batch(self.step)
        # Each micro-batch weighs by its number of targets, so accumulation equals one large batch.
        count = max(batch.num_targets, 1)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
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
        self.model.train()
        drawn = progress and sys.stderr is not None and sys.stderr.isatty()
        with tqdm(total=config.steps, initial=self.step, unit="step", disable=not drawn, dynamic_ncols=True) as bar:
            if self.heldout is not None and self.initial is None:
                self._evaluate(self.heldout)
            interval = _Interval(self.step)
            leaving = self.step >= config.steps
            if leaving:
                if self.heldout is not None and self.scored != self.step:  # steps was lowered to where the run is
                    self._evaluate(self.heldout)
                    self.save()
                self._plot()  # again, if the command before was killed while it did so
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
                    self._evaluate(self.heldout)
                if saving:
                    self.save()
                if evaluating or leaving:
                    self._plot()
                interval = _Interval(self.step)
        finished = self.step == config.steps
        if finished:
            self.export(FINAL)
        return Result(self.step, finished, self.latest, self.best, self.initial)

    def _log(self, interval: _Interval, bar: tqdm) -> None:
        """Wait for the device, check that all went well since the last time, and write a line of metrics."""
        config = self.config
        losses, norms = interval.read()
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=interval.first + 1):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                saved = (self.folder / CHECKPOINT).is_file()
                back = f"go back to the last checkpoint in {self.folder} with --resume, or " if saved else ""
                raise NonFiniteError(
                    f"the loss ({loss:g}, gradient norm {norm:g}) is not finite at step {step}: {back}start again with "
                    "a lower optim.lr"
                )
        loss = sum(losses) / len(losses)
        bits = loss / math.log(2) * self.corpus.num_predictions / self.corpus.num_bytes
        speed = len(losses) * config.batch_size * config.window / (time.monotonic() - interval.started)
        self.metrics.append(
            kind="train",
            step=self.step,
            tokens=self.step * config.batch_size * config.window,
            loss=round(loss, 6),
            losses=[round(value, 6) for value in losses],
            bits_per_byte=round(bits, 6),
            lr=learning_rate(self.step - 1, config.steps, config.optim),
            grad_norm=round(norms[-1], 5),
            tokens_per_second=round(speed),
            elapsed=round(self.elapsed, 2),
            **_peak_memory(self.device),
        )
        shown = {"bpb": f"{bits:.3f}", "tok/s": f"{speed:,.0f}"}
        bar.set_postfix(shown if self.latest is None else {**shown, "held-out": f"{self.latest:.3f}"})

    def _evaluate(self, heldout: Corpus) -> None:
        """Score the held-out text, write a line of metrics, and export the model where it is the best so far.

        The score before the first step shows where the run began; it is no candidate for ``best/``.
        """
        result = self.evaluate(heldout)
        bits = result.bits_per_byte
        self.metrics.append(
            kind="heldout",
            step=self.step,
            tokens=self.step * self.config.batch_size * self.config.window,
            loss=round(result.loss, 6),
            bits_per_byte=round(bits, 6),
            elapsed=round(self.elapsed, 2),
        )
        log.info("step %d: held-out %.4f bits per byte", self.step, bits)
        self.latest, self.scored = bits, self.step
        if self.step == 0:
            self.initial = bits
        elif self.best is None or bits < self.best:
            self.best = bits
            self.export(BEST)

    def evaluate(self, corpus: Corpus) -> Evaluation:
        """Score ``corpus`` with the present weights."""
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


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="surrogateescape")  # storage.load_run encodes it again


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return as_device(name)


def _peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak bytes of tensors on a GPU as an entry of the metrics; nothing on the CPU."""
    return {"peak_memory": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def _precision(config: TrainConfig, device: torch.device) -> str:
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if device.type == "cuda" else "float32"


def _check_unchanged(config: TrainConfig, state: dict[str, Any]) -> None:
    """Refuse a configuration with which a run cannot go on; the number of steps may change."""
    changed = [name for name in _changed(json.loads(state["config"]), _identity(config)) if name != "steps"]
    if changed:
        raise CheckpointError(
            f"{config.output} was started with another {', '.join(changed)}; use the same configuration "
            "(steps may change), or start a new run"
        )
    if config.steps < state["step"]:
        raise CheckpointError(
            f"{config.output} has done {state['step']} steps, so steps cannot become {config.steps}; set more, or "
            f"export the model as it is: hyaena convert {config.output} FOLDER"
        )


def _identity(config: TrainConfig) -> dict[str, Any]:
    """The part of a configuration that a run depends on; JSON-ready."""
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
