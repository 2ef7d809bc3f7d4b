"""Scores and embeddings on many machines: actors for Ray Data.

    import ray

    from hyaena.ray import Scorer

    records = ray.data.read_parquet("genes.parquet")                       # columns name and text
    scores = records.map_batches(
        Scorer,
        fn_constructor_kwargs={"model": "cub", "both_strands": True},
        compute=ray.data.ActorPoolStrategy(size=2),
        batch_size=256,
        num_gpus=1,
    )
    scores.write_parquet("scores")

Each actor loads the model once. Ray Data reads, distributes, retries and writes; nothing here depends on it, so the
classes work wherever batches are dictionaries of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hyaena import hub
from hyaena.errors import InputError, NonFiniteError, printable, shown
from hyaena.scoring import NonFiniteRecordError, RecordError, iter_embeddings, iter_scores
from hyaena.scoring.places import Layer

Batch = dict[str, Any]
"""Columns of equal lengths, as Ray Data gives them with ``batch_format="numpy"``, its default."""


class _Actor:
    """Loads a model, and adds columns of results to batches.

    Args:
        model: a bundled name, a folder, a weights file or a hub id.
        text: the column of the texts.
        device: where the model goes; by default the GPU that Ray gives the actor, or the CPU if there is none.
        dtype, revision, config: see ``hyaena.load``.
    """

    def __init__(
        self,
        model: str,
        *,
        text: str,
        device: str | None,
        dtype: str | None,
        revision: str | None,
        config: str | None,
    ) -> None:
        import torch

        device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        origin: dict[str, Any] = {"device": device, "dtype": dtype, "revision": revision, "config": config}
        self.model, self.tokenizer = hub.load(model, **origin)
        self.text = text

    def _texts(self, batch: Batch) -> list[Any]:
        if self.text not in batch:
            raise InputError(
                f"the batch has no column {shown(self.text)} but {printable(', '.join(batch))}: name it with text="
            )
        return list(batch[self.text])


class Scorer(_Actor):
    """Adds to each batch the columns ``tokens``, ``predicted``, ``sum``, ``mean`` and ``perplexity`` of its texts.

    Args:
        per_token: also add lists: ``ids``, ``logprobs``, ``entropies``, and ``ranks`` unless both strands are read.
        options: of ``hyaena.iter_scores``: ``both_strands``, ``bos``, ``method``, …
        model, text, device, dtype, revision, config: the model, its place, and the column of the texts (``text``).

    Raises:
        InputError: at a call, a text that cannot be read; the message has its name, if there is a column ``name``.
    """

    def __init__(
        self,
        model: str = "cub",
        *,
        text: str = "text",
        per_token: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        config: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, text=text, device=device, dtype=dtype, revision=revision, config=config)
        self.per_token = per_token
        self.options = {"entropy": per_token, "rank": per_token and not options.get("both_strands"), **options}
        iter_scores(self.model, self.tokenizer, [], **self.options)  # a wrong option fails now

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the columns."""
        with _Named(batch):
            found = [one for _, one in iter_scores(self.model, self.tokenizer, self._texts(batch), **self.options)]
        columns: Batch = {
            "tokens": np.array([len(one.tokens) for one in found], np.int64),
            "predicted": np.array([one.count for one in found], np.int64),
            **{name: np.array([getattr(one, name) for one in found]) for name in ("sum", "mean", "perplexity")},
        }
        if self.per_token:
            columns |= {
                "ids": _ragged([one.tokens for one in found]),
                "logprobs": _ragged([one.logprobs for one in found]),
                "entropies": _ragged([one.entropies for one in found]),
            }
        if self.options["rank"]:
            columns["ranks"] = _ragged([one.ranks for one in found])
        return {**batch, **columns}


class Embedder(_Actor):
    """Adds to each batch a column of vectors per layer, named as the layer: float32 [D], or [T,D] without pooling.

    Args:
        layers, pool, options: see ``hyaena.iter_embeddings``.
        model, text, device, dtype, revision, config: the model, its place, and the column of the texts (``text``).

    Raises:
        InputError: as ``Scorer``.
    """

    def __init__(
        self,
        model: str = "cub",
        *,
        text: str = "text",
        layers: Layer | Sequence[Layer] = "norm",
        pool: Any = "mean",
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        config: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, text=text, device=device, dtype=dtype, revision=revision, config=config)
        self.layers = [layers] if isinstance(layers, int | str) else list(layers)
        self.options = {"layers": self.layers, "pool": pool, **options}
        iter_embeddings(self.model, self.tokenizer, [], **self.options)

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the columns."""
        with _Named(batch):
            found = [one for _, one in iter_embeddings(self.model, self.tokenizer, self._texts(batch), **self.options)]
        pooled = self.options["pool"] in ("mean", "last")
        columns = {}
        for layer in self.layers:
            vectors = [one[layer] for one in found]
            columns[str(layer)] = np.stack(vectors) if pooled and vectors else _ragged(vectors)
        return {**batch, **columns}


class _Named:
    """Within it, an error of one text names the record, where the batch has names."""

    def __init__(self, batch: Batch) -> None:
        self.names = batch.get("name")

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.names is not None and isinstance(error, RecordError | NonFiniteRecordError):
            raised = NonFiniteError if isinstance(error, NonFiniteError) else InputError
            raise raised(f"record {shown(str(self.names[error.index]))}: {error.reason}") from error


def _ragged(arrays: list[Any]) -> Any:
    """An array of arrays whose lengths differ."""
    column = np.empty(len(arrays), object)
    column[:] = arrays
    return column
