"""The 129M model against a Mistral of its size, and against the time that reading its weights takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import hyaena
from benchmarks.cpu import models
from benchmarks.mistral import Mistral
from benchmarks.registry import IncorrectError, Row, Session, Step, Summary, Target, pairwise, require_equal
from hyaena.bench.clock import Side, take_turns
from hyaena.bench.measure import filled_cache, stepper
from hyaena.bench.rates import reading_kernels
from hyaena.cache import Cache
from hyaena.decoding import Decoding, make_decoder, resolve_decoding
from hyaena.generation import PREFILL_CHUNK
from hyaena.model import StripedHyena
from hyaena.sampling import SamplingParams
from hyaena.tokenizers import ByteTokenizer

CHUNK = PREFILL_CHUNK["cpu"]
# Of the largest logit: two float32 evaluations of 12 layers in different orders of summation.
SAME = 1e-4
# The same of two evaluations that round every activation to 8 bits.
SAME_NARROW = 5e-2


def prompt(config: hyaena.ModelConfig, length: int) -> Tensor:
    """Random ids [1,length], the same ones each time."""
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


def prefill_ours(
    model: StripedHyena,
    ids: Tensor,
    chunk: int = CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, float]:
    """Read a prompt as every user does, to the first token: its id and log-probability."""
    tokenizer = ByteTokenizer(model.config.vocab_size)  # wants no more than the number of ids
    done = hyaena.generate(
        model,
        tokenizer,
        ids[0].tolist(),
        max_new_tokens=1,
        stop_at_eos=False,
        prefill_chunk=chunk,
        max_length=ids.shape[1] + 1,
        progress=progress,
    )
    return done.tokens[0], done.logprobs[0]


def read(model: StripedHyena, ids: Tensor, cache: Cache, chunk: int = CHUNK) -> Tensor:
    """Read ids [1,T] into the cache in chunks; logits [1,V] after the last."""
    for part in ids.split(chunk, dim=1):
        logits = model(part, cache=cache, logits_to_keep=1)
    return logits[:, -1]


def check_prefill(model: StripedHyena, ids: Tensor, chunk: int) -> None:
    """Chunked logits are those of one pass, and ``generate`` reports their log-probability."""
    with torch.inference_mode():
        whole = model(ids, logits_to_keep=1)[:, -1]
        chunked = read(model, ids, model.make_cache(max_length=ids.shape[1]), chunk)
    require_equal("logits of the prefill in chunks and in one pass", chunked, whole, SAME)
    token, logprob = prefill_ours(model, ids, chunk)
    expected = whole.log_softmax(-1)[0]
    # 1e-3: logits of order 10, SAME of each; the chosen token may differ where two are that close
    if abs(logprob - float(expected[token])) > 1e-3 or float(expected.max() - expected[token]) > 1e-3:
        raise IncorrectError(
            f"generate chose token {token} at {logprob:.4f}, one pass says {float(expected.max()):.4f}"
        )


@torch.inference_mode()
def check_decoding(model: StripedHyena, ids: Tensor, steps: int = 4, *, same: float = SAME) -> None:
    """The last tokens, read one by one, give the logits of one pass."""
    whole = model(ids, logits_to_keep=1)[:, -1]
    cache = model.make_cache(max_length=ids.shape[1])
    read(model, ids[:, :-steps], cache)
    for token in ids[:, -steps:].split(1, dim=1):
        logits = model(token, cache=cache, logits_to_keep=1)[:, -1]
    require_equal("logits after decoding and of one pass", logits, whole, same)


@torch.inference_mode()
def check_baseline(baseline: Mistral, ids: Tensor) -> None:
    """The baseline does its work too: its cached step gives the logits of one pass."""
    whole = baseline.prefill(ids)
    baseline.prefill(ids[:, :-1])
    require_equal("Mistral's logits with and without cache", baseline.step(ids[:, -1:]), whole, SAME)


def prefill(session: Session) -> list[Row]:
    """A whole prompt, from ids to the first token on our side, to the last logits on the baseline's."""
    length, rounds, chunk = (96, 2, 32) if session.quick else (8192, 5, CHUNK)
    model = models.striped(session.quick)
    baseline = Mistral(model.config)
    ids = prompt(model.config, length)
    check_prefill(model, ids, chunk)
    check_baseline(baseline, ids[:, : length // 16])

    @torch.inference_mode()
    def theirs() -> None:
        baseline.prefill(ids)

    seconds = take_turns(
        {
            "ours": Side(lambda: prefill_ours(model, ids, chunk)),
            "baseline": Side(theirs, prepare=lambda: setattr(baseline, "cache", None)),
        },
        rounds,
    )
    return [
        Row(
            what=f"prefill of {length:,} tokens, {models.size_of(model)}",
            unit="s",
            ours=Summary.of(seconds["ours"].values),
            baseline_name=f"Mistral ({baseline.num_parameters / 1e6:.1f}M)",
            baseline=Summary.of(seconds["baseline"].values),
            ratio=pairwise(seconds["baseline"].values, seconds["ours"].values),
            ratio_name="baseline / ours",
            target=Target(">=", 1.3),
            note=f"Ours: `hyaena.generate` for one token, chunks of {chunk:,}, so the choice of the token is in it.",
        )
    ]


def prefill_chunks(session: Session) -> list[Row]:
    """The same prompt in other chunk sizes, against the default one."""
    length, rounds, default, sizes = (
        (96, 2, 32, (16, 64)) if session.quick else (8192, 2, CHUNK, tuple({512, 1024, 2048, 4096} - {CHUNK}))
    )
    model = models.striped(session.quick)
    ids = prompt(model.config, length)
    prefill_ours(model, ids[:, : length // 8])
    sides = {size: Side(lambda size=size: prefill_ours(model, ids, size)) for size in (default, *sorted(sizes))}
    seconds = take_turns({str(size): side for size, side in sides.items()}, rounds)
    return [
        Row(
            what=f"prefill of {length:,} tokens in chunks of {size:,}, {models.size_of(model)}",
            unit="s",
            ours=Summary.of(seconds[str(size)].values),
            baseline_name=f"chunks of {default:,}",
            baseline=Summary.of(seconds[str(default)].values),
            ratio=pairwise(seconds[str(default)].values, seconds[str(size)].values),
            ratio_name="default / this",
        )
        for size in sorted(sizes)
    ]


class Greedy:
    """Greedy decoding by single steps, from a point that it can go back to."""

    def __init__(self, step: Callable[[Tensor], Tensor], first: Tensor) -> None:
        self.step = step
        self.first = first.argmax(-1, keepdim=True)

    @torch.inference_mode()
    def run(self, count: int) -> None:
        token = self.first
        for _ in range(count):
            token = self.step(token).argmax(-1, keepdim=True)


def _ours_at(model: StripedHyena, ids: Tensor, room: int) -> tuple[Greedy, Callable[[], None]]:
    """Our side after a prompt, and what takes it back there."""
    with torch.inference_mode():
        cache = model.make_cache(max_length=ids.shape[1] + room)
        first = read(model, ids, cache)
        start = cache.snapshot()

    def rewind() -> None:
        with torch.inference_mode():
            cache.restore(start)

    return Greedy(lambda token: model(token, cache=cache, logits_to_keep=1)[:, -1], first), rewind


def decode_long(session: Session) -> list[Row]:
    """Single steps at a long context, against the baseline with its cache."""
    context, steps, rounds = (96, 4, 3) if session.quick else (8192, 16, 9)
    model = models.striped(session.quick)
    baseline = Mistral(model.config)
    ids = prompt(model.config, context)
    check_decoding(model, ids)
    check_baseline(baseline, ids[:, : context // 16])
    ours, rewind = _ours_at(model, ids, steps)
    with torch.inference_mode():
        theirs = Greedy(baseline.step, baseline.prefill(ids))
    ours.run(1)
    theirs.run(1)
    seconds = take_turns(
        {
            "ours": Side(lambda: ours.run(steps), prepare=rewind),
            "baseline": Side(lambda: theirs.run(steps), prepare=lambda: baseline.rewind(context)),
        },
        rounds,
    )
    return [
        Row(
            what=f"decoding at context {context:,}, {models.size_of(model)}",
            unit="tokens/s",
            ours=Summary.of(steps / s for s in seconds["ours"].values),
            baseline_name=f"Mistral ({baseline.num_parameters / 1e6:.1f}M), DynamicCache",
            baseline=Summary.of(steps / s for s in seconds["baseline"].values),
            ratio=pairwise(seconds["baseline"].values, seconds["ours"].values),
            ratio_name="ours / baseline",
            target=Target(">=", 2),
            note=f"{steps} greedy steps a round, each round from the same context.",
        )
    ]


def decode_short(session: Session) -> Iterator[Step]:
    """Single steps at a short context, in two dtypes."""
    context, steps, rounds = (64, 4, 3) if session.quick else (512, 16, 15)
    for dtype in (torch.float32, torch.bfloat16):

        def run(dtype: torch.dtype = dtype) -> list[Row]:
            model = models.striped(session.quick).to(dtype)
            return decode_against_weights(model, context, steps, rounds, Target(">=", 0.85))

        yield Step(str(dtype).removeprefix("torch."), run)


def decode_against_weights(
    model: StripedHyena, context: int, steps: int, rounds: int, target: Target | None = None
) -> list[Row]:
    """Single steps as ``generate`` takes them: against reading every matrix once, and against calls of the model."""
    way = resolve_decoding(model, "auto", "auto")
    check_way(model, prompt(model.config, context), way)
    # what float32 kernels read: the bytes of every matrix of a step, whatever they stand for
    matrices = [m.weight.detach().view(torch.float32) for m in model.modules() if isinstance(m, nn.Linear)]
    bytes_read = sum(w.nbytes for w in matrices)
    kernels = reading_kernels()

    @torch.inference_mode()
    def stream(read: Callable[[Tensor], object]) -> None:
        for _ in range(steps):
            for w in matrices:
                read(w)

    room = 1 + (rounds + 1) * steps
    ours = {name: stepper(model, filled_cache(model, 1, context, room=room), name) for name in {way, "eager"}}
    sides = {name: Side(lambda step=step: step(steps)) for name, step in ours.items()}
    sides |= {f"by {name}": Side(lambda read=read: stream(read)) for name, read in kernels.items()}
    for side in sides.values():
        side.run()
    seconds = take_turns(sides, rounds)
    bound = min((f"by {name}" for name in kernels), key=lambda name: seconds[name].median)
    rate = bytes_read * steps / seconds[bound].median / 1e9

    def row(against: str, other: str, name: str, ratio: str, target: Target | None = None, note: str = "") -> Row:
        dtype = str(model.dtype).removeprefix("torch.")
        return Row(
            what=f"decoding at context {context:,} in {dtype} ({way}) against {against}, {models.size_of(model)}",
            unit="tokens/s",
            ours=Summary.of(steps / s for s in seconds[way].values),
            baseline_name=name,
            baseline=Summary.of(steps / s for s in seconds[other].values),
            ratio=pairwise(seconds[other].values, seconds[way].values),
            ratio_name=ratio,
            target=target,
            note=note,
        )

    note = f"The bound reads {bytes_read / 1e6:.0f} MB a step, {rate:.1f} GB/s, {bound}, the fastest of {len(kernels)}."
    rows = [row("reading its weights", bound, f"{len(matrices)} matrices {bound}", "ours / bound", target, note)]
    if way != "eager":
        rows.append(row("calls of the model", "eager", "decoding='eager'", "ours / calls"))
    return rows


@torch.inference_mode()
def check_way(model: StripedHyena, ids: Tensor, way: Decoding, *, keys: torch.dtype | None = None) -> None:
    """Tokens read one by one give the logits of one pass, and a step of this way gives those of a call.

    Keys and values of the step have the dtype ``keys``, or the model's.
    """
    check_decoding(model, ids, same=SAME if model.dtype == torch.float32 else SAME_NARROW)
    if way == "eager":
        return
    cache = model.make_cache(max_length=ids.shape[1] + 1, dtype=keys)
    read(model, ids, cache)
    decoder = make_decoder(model, 1, way, top=8)
    decoder.add(cache.snapshot(), ids[:, 0], [SamplingParams()], [SamplingParams().generator()])
    decoder.launch()
    (pairs,) = decoder.fetch().top
    logprobs = model(ids[:, :1], cache=cache, logits_to_keep=1)[0, -1].float().log_softmax(-1)
    want = logprobs[[token for token, _ in pairs]]
    got = torch.tensor([logprob for _, logprob in pairs])
    same = SAME if model.dtype == torch.float32 else SAME_NARROW
    require_equal(f"log-probabilities of {way} decoding and of a call", got, want, same)
