from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from hyaena.config import ModelConfig
from hyaena.errors import NonFiniteError
from hyaena.model import StripedHyena
from hyaena.tokenizers import ByteTokenizer
from hyaena.train.corpus import Corpus, tokenize
from hyaena.train.data import Batch, PackedWindows
from hyaena.train.documents import Piece
from hyaena.train.evaluate import evaluate, summed_loss

CONFIG = ModelConfig(
    vocab_size=264,
    hidden_size=16,
    layer_types=("hyena", "attention", "hyena"),
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    state_size=3,
    tie_embeddings=True,
    tokenizer="bytes",
)
TEXTS = ["first document, of some length\n" * 3, "b", "and a third one " * 5, "x" * 50]


def corpus_of(texts: list[str]) -> Corpus:
    return tokenize(map(Piece, texts), ByteTokenizer())


class Uniform(nn.Module):
    """Every byte equally likely: 8 bits each."""

    def forward(self, ids: torch.Tensor, *, segment_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, 256)


def test_bits_per_byte_of_a_uniform_model() -> None:
    corpus = corpus_of(TEXTS)
    # Start and end tokens within the 256 values of the toy model.
    corpus = dataclasses.replace(corpus, tokens=np.where(corpus.tokens > 255, 0, corpus.tokens))
    result = evaluate(Uniform(), corpus, window=16, overlap=4)
    # End tokens are paid for.
    assert result.bits_per_byte == pytest.approx(8 * (corpus.num_bytes + len(TEXTS)) / corpus.num_bytes)
    assert result.loss == pytest.approx(math.log(256))
    assert (result.num_bytes, result.num_tokens) == (corpus.num_bytes, corpus.num_bytes + len(TEXTS))


def test_windows_that_hold_everything_give_the_loss_of_the_documents_alone() -> None:
    model = StripedHyena(CONFIG).eval()
    corpus = corpus_of(TEXTS)
    packed = evaluate(model, corpus, window=400)
    alone = sum(evaluate(model, corpus_of([text]), window=150).loss * (len(text) + 1) for text in TEXTS)
    # Sums of a few hundred float32 terms.
    assert packed.loss * packed.num_tokens == pytest.approx(alone, rel=1e-5)


def test_more_context_does_not_change_what_is_counted() -> None:
    model = StripedHyena(CONFIG)
    corpus = corpus_of(TEXTS)
    results = [evaluate(model, corpus, window=32, overlap=overlap, batch_size=3) for overlap in (0, 16, 31)]
    assert len({result.num_tokens for result in results}) == 1
    assert model.training


def test_nan_is_an_error() -> None:
    model = StripedHyena(CONFIG)
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="not finite"):
        evaluate(model, corpus_of(TEXTS), window=32)


def losses_of_each_document(model: nn.Module, batch: Batch) -> dict[tuple[int, int], torch.Tensor]:
    logits = model(batch.ids.long(), segment_ids=batch.segments).float()
    each = nn.functional.cross_entropy(logits.transpose(1, 2), batch.targets.long(), reduction="none")
    found = {}
    for row in range(len(batch.ids)):
        for segment in batch.segments[row].unique().tolist():
            found[row, segment] = each[row, batch.segments[row] == segment]
    return found


def test_no_document_of_a_window_sees_another() -> None:
    """Exact equality: a document's losses are the same numbers whatever its neighbours hold."""
    model = StripedHyena(CONFIG).eval()
    texts = [letter * length for letter, length in zip("abcdefghij", [3, 70, 1, 40, 9, 33, 64, 2, 25, 90], strict=True)]
    batch = PackedWindows(corpus_of(texts), window=96, batch_size=3, seed=0).batch(0)
    before = losses_of_each_document(model, batch)
    assert max(segment for _, segment in before) >= 2
    with torch.no_grad():
        for row, segment in before:
            inside = batch.segments[row] == segment
            changed = Batch(batch.ids.clone(), batch.targets, batch.segments)
            changed.ids[row, inside] = torch.randint(256, (int(inside.sum()),), dtype=torch.int32)
            after = losses_of_each_document(model, changed)
            for other, losses in before.items():
                assert torch.equal(after[other], losses) == (other != (row, segment)), (row, segment, other)


def test_gradients_do_not_cross_documents_either() -> None:
    model = StripedHyena(CONFIG)
    batch = PackedWindows(corpus_of(TEXTS), window=96, batch_size=1, seed=0).batch(0)
    assert int(batch.segments.max()) >= 1
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[0]

    model.embed_tokens.register_forward_hook(keep)
    last = int(batch.segments.max())
    only = Batch(batch.ids, batch.targets.masked_fill(batch.segments != last, -100), batch.segments)
    summed_loss(model, only).backward()
    gradient = seen[0].grad
    assert gradient is not None
    assert (gradient[batch.segments != last] == 0).all()
    assert (gradient[batch.segments == last] != 0).any()
