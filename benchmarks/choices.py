"""Multiple choice as lm-evaluation-harness asks it: our model class against its HFLM over ``hyaena.hf``, one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.registry import IncorrectError, Row, Session, Step, Summary, Target, pairwise
from hyaena.bench.clock import Side, take_turns

if TYPE_CHECKING:
    from benchmarks.gpu.session import GpuSession
    from hyaena.model import StripedHyena

CONTEXT, ANSWER, CHOICES = 2000, 16, 4
Requests = list[tuple[Any, list[int], list[int]]]


def cpu(session: Session) -> Iterator[Step]:
    """Two models in float32: cub, whose head is small, and the 129M model with a vocabulary of 32,000."""
    from benchmarks.cpu import models

    def rows(model: Callable[[], StripedHyena]) -> list[Row]:
        return compare(model(), questions=1, rounds=3, quick=session.quick)

    if not session.quick:
        yield Step("cub", lambda: rows(lambda: models.cub()[0]))
    yield Step("129M", lambda: rows(lambda: models.striped(session.quick)))


def gpu(session: GpuSession) -> list[Row]:
    """The 7B's shape in bfloat16."""
    return compare(session.model, questions=32, rounds=3, quick=session.quick, synchronize=session.synchronize)


def compare(
    model: StripedHyena,
    *,
    questions: int,
    rounds: int,
    quick: bool,
    synchronize: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Score the answers of questions: ours from copies of one cache, HFLM each with its whole context, in one batch."""
    import logging

    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from hyaena.evals.harness import HyaenaLM
    from hyaena.hf import StripedHyenaForCausalLM
    from hyaena.tokenizers import ByteTokenizer

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    context, answer = (CONTEXT, ANSWER) if not quick else (96, 4)
    requests = _requests(model.config.vocab_size, questions if not quick else 2, context, answer)
    # Both are given ids, so their tokenizers have nothing to do.
    words = Tokenizer(models.WordLevel({"</s>": 0}, unk_token="</s>"))
    theirs = HFLM(
        pretrained=StripedHyenaForCausalLM.from_native(model).eval(),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>"),
        batch_size=CHOICES,
        max_length=context + answer,
        softmax_dtype="float32",
    )
    ours = HyaenaLM(model, ByteTokenizer(model.config.vocab_size), max_length=context + answer)
    apart = HyaenaLM(model, ours.native, max_length=context + answer, share_contexts=False)

    def score(lm: Any, asked: Requests = requests) -> list[tuple[float, bool]]:
        answers = lm._loglikelihood_tokens(asked, disable_tqdm=True)
        synchronize()
        return answers

    wanted = score(theirs)
    for lm in (ours, apart):
        _check(score(lm), wanted, exact=model.dtype == torch.float32)
    sides = {
        "ours": Side(lambda: score(ours)),
        "HFLM": Side(lambda: score(theirs)),
        "apart": Side(lambda: score(apart)),
    }
    seconds = take_turns(sides, rounds)
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:,.0f}M"
    what = (
        f"{len(requests) // CHOICES} × {context:,} tokens, {CHOICES} answers of {answer}, {model.config.name} ({size})"
    )

    def row(name: str, label: str, target: Target | None) -> Row:
        return Row(
            what=what,
            unit="s",
            ours=Summary.of(seconds["ours"].values),
            baseline_name=label,
            baseline=Summary.of(seconds[name].values),
            ratio=pairwise(seconds[name].values, seconds["ours"].values),
            ratio_name=f"{name} / ours",
            target=target,
            note="log-probabilities agree to 1e-4" if model.dtype == torch.float32 else "",
        )

    return [
        row("HFLM", f"HFLM over hyaena.hf, batches of {CHOICES}", Target(">=", 3)),
        row("apart", "ours, each answer with its own context", None),
    ]


def _requests(vocab: int, questions: int, context: int, answer: int) -> Requests:
    generator = torch.Generator().manual_seed(2)

    def ids(count: int) -> list[int]:
        return torch.randint(1, vocab, (count,), generator=generator).tolist()

    return [(None, shared, ids(answer)) for shared in [ids(context) for _ in range(questions)] for _ in range(CHOICES)]


def _check(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]], *, exact: bool) -> None:
    """Refuse to go on unless scores agree: to 1e-4 in float32, to 1 % in bfloat16, whose logits have 8 bits."""
    for (one, _), (other, _) in zip(ours, theirs, strict=True):
        if not abs(one - other) <= (1e-4 + 2e-6 * abs(other) if exact else 0.01 * abs(other)):
            raise IncorrectError(f"a log-probability is {one:.6f}, and HFLM says {other:.6f}")
