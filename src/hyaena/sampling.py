"""From logits to tokens, row by row.

The order of operations, for each row by itself:

1. *Repetition penalty* r: the logit of every token seen so far (prompt and completion) is divided by r where it is
   positive and multiplied by r where it is negative (Keskar et al. 2019, arXiv:1909.05858, as commonly signed).
2. *Bias*: a number is added to the logits of some tokens, and others are forbidden: their logits become -infinity. The
   penalty comes first, since it depends on the sign of the model's own logits; so a bias of b makes a token exp(b)
   times as probable against the others, whether it was seen or not.
3. *Temperature* t: at 0 the largest logit wins (the lowest id among equals) and the rest of this list is skipped;
   otherwise logits are divided by t.
4. *Top-k*: only the k most probable tokens stay (the lower id first among equals); 0 keeps all.
5. *Top-p*: of those, renormalised, the smallest set of most probable tokens whose probabilities reach p stays
   (Holtzman et al. 2020, arXiv:1904.09751); 1 keeps all.
6. *Min-p*: of those, tokens with less than m times the probability of the most probable one go
   (Nguyen et al. 2024, arXiv:2407.01082); 0 keeps all.
7. One token is drawn from what is left, with one number of the row's own generator.

Generators live on the CPU whatever the device of the logits, and a row takes exactly one number from its own per
token. So a row's tokens do not depend on the rows beside it, and a seed gives the same numbers on every device.

Rows of one call are independent samples, also with one seed for all of them: a row's generator starts from a hash of
its seed, its own prompt, and how many equal prompts came before it (see ``SamplingParams.generator``).
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyaena.arguments import as_whole, kind_of, real, require_ids, whole
from hyaena.errors import InputError, NonFiniteError, shown

MAX_SEED = 2**63 - 1
MAX_BIAS = 100.0
"""The largest bias of a token. Its negative, and everything below, forbids the token."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one row chooses its tokens; the defaults are greedy.

    Attributes:
        temperature: 0 chooses the most probable token; larger is more varied, 1 is the model's own distribution.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens that together reach this probability, in (0, 1].
        min_p: drop tokens with less than this fraction of the best token's probability, in [0, 1].
        repetition_penalty: above 1 makes tokens that were seen less probable; 1 leaves them alone.
        seed: the same seed draws the same numbers; None draws others each time.
        logit_bias: id -> a number that is added to the token's logit, at most 100; -100 and less forbid the token.
            Any mapping; kept as pairs.
        allowed_tokens: ids; all other tokens are forbidden. None allows all.

    Raises:
        InputError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    allowed_tokens: Iterable[int] | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "logit_bias": _bias_pairs(self.logit_bias),
            "allowed_tokens": _allowed_ids(self.allowed_tokens),
            "temperature": real("temperature", self.temperature, "0 or more", lambda value: value >= 0),
            "top_k": whole("top_k", self.top_k, "a whole number, 0 or more (0 keeps all tokens)", 0, MAX_SEED),
            "top_p": real("top_p", self.top_p, "above 0 and at most 1", lambda value: 0 < value <= 1),
            "min_p": real("min_p", self.min_p, "between 0 and 1", lambda value: 0 <= value <= 1),
            # Within these bounds no float64 score overflows, whatever finite float32 logit it came from.
            "repetition_penalty": real(
                "repetition_penalty",
                self.repetition_penalty,
                "above 0 (from 1e-100 to 1e100)",
                lambda value: 1e-100 <= value <= 1e100,
            ),
        }
        if self.seed is not None:
            checked["seed"] = whole("seed", self.seed, "a whole number from 0 to 2**63 - 1", 0, MAX_SEED)
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # numbers of numpy and tensors become Python's

    @property
    def biased(self) -> bool:
        """Whether the logits of some tokens are changed or forbidden."""
        return bool(self.logit_bias) or self.allowed_tokens is not None

    def bias(self, vocab_size: int) -> Tensor:
        """What is added to the logits of all tokens: float32 [V] on the CPU, -infinity for those that are forbidden.

        Raises:
            InputError: an id outside the vocabulary, or no token that is allowed.
        """
        pairs: Sequence[tuple[int, float]] = self.logit_bias  # type: ignore[assignment]  pairs since they were checked
        allowed: Sequence[int] | None = self.allowed_tokens  # type: ignore[assignment]
        for name, ids in (("logit_bias", [token for token, _ in pairs]), ("allowed_tokens", allowed or ())):
            require_ids(ids, vocab_size, f"{name}: ")
        row = torch.full((vocab_size,), 0.0 if allowed is None else -math.inf, dtype=torch.float32, device="cpu")
        if allowed is not None:
            row[list(allowed)] = 0.0
        if pairs:
            tokens, values = zip(*pairs, strict=True)
            row.index_add_(0, torch.tensor(tokens, device="cpu"), torch.tensor(values, dtype=row.dtype, device="cpu"))
        if bool((row == -math.inf).all()):
            raise InputError("logit_bias and allowed_tokens together forbid every token: allow at least one")
        return row

    def generator(self, prompt: Sequence[int] = (), repeat: int = 0) -> torch.Generator:
        """Make a CPU generator for one row: from the seed, or from the system's entropy where there is none.

        The generator starts from SHA-256 of the seed, the prompt and ``repeat``. So one seed gives independent numbers
        to rows with other prompts, and a row keeps its numbers whatever rows are beside it and wherever it stands.

        Args:
            prompt: the token ids of the row's prompt.
            repeat: how many rows of the same call with this prompt come before this one; 0 for the first.
        """
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            digest = hashlib.sha256(f"{self.seed} {repeat} ".encode() + array("q", prompt).tobytes()).digest()
            # torch's CPU generator reads the low 32 bits of a seed.
            generator.manual_seed(int.from_bytes(digest[:4], "little"))
        return generator


def _bias_pairs(bias: Any) -> tuple[tuple[int, float], ...]:
    items = tuple(bias.items()) if isinstance(bias, Mapping) else bias
    if not isinstance(items, tuple) or not all(isinstance(item, tuple) and len(item) == 2 for item in items):
        raise InputError(f"logit_bias must map ids to numbers, such as {{5: -100}}, not {kind_of(bias)}")
    pairs = []
    for token, value in items:
        number = as_whole(token)
        if number is None or number < 0:
            raise InputError(f"logit_bias: a token id is a whole number, 0 or more, not {shown(token)}")
        wanted = "a number up to 100 (-100 and less forbid a token)"
        forbidden = isinstance(value, float) and value == -math.inf
        value = -math.inf if forbidden else real("a bias of logit_bias", value, wanted, lambda x: x <= MAX_BIAS)
        pairs.append((number, -math.inf if value <= -MAX_BIAS else value))
    return tuple(pairs)


def _allowed_ids(ids: Any) -> tuple[int, ...] | None:
    if ids is None:
        return None
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise InputError(f"allowed_tokens must be a list of ids, not {kind_of(ids)}")
    numbers: dict[int, None] = {}  # each once, in order
    for token in ids:
        number = as_whole(token)
        if number is None or number < 0:
            raise InputError(f"allowed_tokens: a token id is a whole number, 0 or more, not {shown(token)}")
        numbers[number] = None
    if not numbers:
        raise InputError("allowed_tokens is empty, so that no token could be chosen: name some, or None for all")
    return tuple(numbers)


def bias_table(params: Sequence[SamplingParams], vocab_size: int, device: torch.device | str) -> Tensor | None:
    """What is added to the logits of each row, float32 [B,V]; None where no row has a bias.

    Raises:
        InputError: as ``SamplingParams.bias``.
    """
    if not any(row.biased for row in params):
        return None
    made: dict[SamplingParams, Tensor] = {}  # rows of one call often have the same
    for row in params:
        if row.biased and row not in made:
            made[row] = row.bias(vocab_size)
    nothing = torch.zeros(vocab_size, dtype=torch.float32, device="cpu")
    return torch.stack([made.get(row, nothing) for row in params]).to(device)


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator],
    *,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Choose one token per row, in the order of operations at the top of this module.

    Args:
        logits: [B,V], any floating dtype and device; not changed.
        params: B of them.
        generators: B CPU generators; those of rows with a temperature above 0 advance by one number.
        seen: [B,V] bool, True where a token occurred in the row; needed where a repetition penalty is not 1.
        bias: what ``bias_table`` gives for these rows, which is made anew unless given.

    Returns:
        ids [B] int64, on the device of the logits.

    Raises:
        NonFiniteError: a row's logits hold NaN or +infinity, or nothing but -infinity among the tokens that are
            allowed. No generator has advanced.
    """
    if not len(params) == len(generators) == logits.shape[0]:
        raise InputError(
            f"{logits.shape[0]} rows of logits, {len(params)} params and {len(generators)} generators: give one per row"
        )
    needs = SamplingFeatures.of(params)
    if needs.bias and bias is None:
        bias = bias_table(params, logits.shape[-1], logits.device)
    bad = ~finite_rows(logits, bias)
    if bool(bad.any()):
        rows = ", ".join(map(str, bad.nonzero().flatten().tolist()))
        raise NonFiniteError(f"the logits of row {rows} are not finite; no token was chosen")
    if needs.penalty and seen is None:
        raise InputError("a repetition penalty needs seen: which tokens were seen in each row")
    if needs == SamplingFeatures():
        return logits.argmax(dim=-1)
    uniform = [draw(row, generator, 1) for row, generator in zip(params, generators, strict=True)]
    knobs = torch.cat([params_tensor(params), torch.stack(uniform)], dim=1).to(logits.device)  # one small copy
    return choose(logits, knobs[:, :-1], knobs[:, -1:], seen, bias, needs)


@dataclass(frozen=True)
class SamplingFeatures:
    """Sampling features that any row of a batch needs; all False means greedy.

    Attributes:
        draw: a temperature above 0.
        cut: top-k or top-p, for which tokens are sorted.
        penalty: a repetition penalty.
        bias: a logit bias, or tokens that are forbidden.
    """

    draw: bool = False
    cut: bool = False
    penalty: bool = False
    bias: bool = False

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> SamplingFeatures:
        """The features that these rows need together."""
        return cls(
            draw=any(row.temperature > 0 for row in params),
            cut=any(row.temperature > 0 and (row.top_k > 0 or row.top_p < 1) for row in params),
            penalty=any(row.repetition_penalty != 1 for row in params),
            bias=any(row.biased for row in params),
        )


def params_tensor(params: Sequence[SamplingParams]) -> Tensor:
    """The parameters as ``choose`` reads them: float64 [B,5] on the CPU.

    float64, because a float32 running sum over a large vocabulary loses the rare tokens.
    """
    rows = [(row.temperature, row.top_k or math.inf, row.top_p, row.min_p, row.repetition_penalty) for row in params]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def draw(params: SamplingParams, generator: torch.Generator, count: int) -> Tensor:
    """Draw the next ``count`` numbers of a row, float64 on the CPU; a greedy row draws none and gets zeros."""
    if params.temperature == 0:
        return torch.zeros(count, dtype=torch.float64, device="cpu")
    return torch.rand(count, dtype=torch.float64, generator=generator, device="cpu")


def choose(
    logits: Tensor,
    knobs: Tensor,
    uniform: Tensor,
    seen: Tensor | None,
    bias: Tensor | None,
    needs: SamplingFeatures,
) -> Tensor:
    """Apply steps 1 to 7 on the device of the logits, without synchronising with it.

    Args:
        logits: [B,V]; rows that are not finite give a meaningless id, which may be V.
        knobs: float64 [B,5], see ``params_tensor``.
        uniform: float64 [B,1] in [0, 1).
        seen: [B,V] bool, where ``needs.penalty``.
        bias: float32 [B,V], where ``needs.bias``.
        needs: at least the features that the rows need.

    Returns:
        ids [B] int64.
    """
    temperature, top_k, top_p, min_p, penalty = knobs.unsqueeze(-1).unbind(1)  # [B,1] each
    scores = logits.double()
    if needs.penalty and seen is not None:
        scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    if needs.bias and bias is not None:
        scores = scores + bias
    greedy = scores.argmax(dim=-1)
    if not needs.draw:
        return greedy
    # With the largest at 0, no temperature can overflow.
    scores = scores - scores.amax(dim=-1, keepdim=True)
    scores = scores / torch.where(temperature > 0, temperature, 1.0)
    outside = scores < min_p.log()
    if needs.cut:
        outside = outside | _top_k_top_p_mask(scores, top_k, top_p)
    scores = torch.where(outside, -math.inf, scores)

    # Inverse transform: the first token whose cumulative weight passes u. A token without weight never is.
    total = scores.exp().cumsum(dim=-1)
    target = torch.minimum(uniform * total[:, -1:], torch.nextafter(total[:, -1:], torch.zeros_like(total[:, -1:])))
    drawn = torch.searchsorted(total, target, right=True).squeeze(-1)
    return torch.where(temperature.squeeze(-1) > 0, drawn, greedy)


def finite_rows(logits: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return bool [B]: whether a token can be chosen from this row of logits [B,V], with this bias [B,V]."""
    if bias is not None:
        logits = logits + bias
    return torch.isfinite(logits.amax(dim=-1))  # NaN and +infinity win; -infinity only where there is nothing else


def log_probabilities(logits: Tensor, ids: Tensor, top: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log-probabilities under the model itself: no penalty, no bias, temperature 1, nothing cut off.

    Args:
        logits: [B,V].
        ids: [B] the chosen tokens.
        top: how many of the most probable tokens to list besides.

    Returns:
        (chosen [B], top values [B,top], top ids [B,top]); natural logarithms in float32 (float64 for float64
        logits), the most probable first.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits - logits.amax(dim=-1, keepdim=True)  # first, so that large logits cost no digits
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    values, indices = logits.topk(top, dim=-1) if top else (logits[:, :0], ids.new_empty(len(ids), 0))
    chosen = logits.gather(-1, ids.unsqueeze(-1)) - normaliser
    return chosen.squeeze(-1), values - normaliser, indices


def _top_k_top_p_mask(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Return bool [B,V]: tokens that top-k or top-p cut off."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    too_many = torch.arange(scores.shape[-1], device=scores.device) >= top_k
    weights = torch.where(too_many, 0.0, ordered.exp())
    before = weights.cumsum(dim=-1) - weights
    enough = (before >= top_p * weights.sum(dim=-1, keepdim=True)) & (top_p < 1)
    return torch.zeros_like(too_many).scatter(-1, order, too_many | enough)
