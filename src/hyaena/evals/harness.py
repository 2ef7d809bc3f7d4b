"""A model class of lm-evaluation-harness over the native engine. Importing it needs lm_eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval import utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from hyaena.errors import InputError
from hyaena.evals.grouping import Request, group_requests
from hyaena.generation import generate
from hyaena.model import StripedHyena
from hyaena.scoring import iter_scores, score_continuations
from hyaena.tokenizers import Tokenizer

GENERATED_TOGETHER = 32
"""Prompts that are continued together unless a batch size is given."""

Answer = tuple[float, bool]


class HyaenaLM(TemplateLM):
    """Scores and generates for lm-evaluation-harness.

    Requests whose tokens begin alike (answers of one question, questions after the same few-shot examples) are read
    from copies of one cache. Texts that pass the maximum length lose their beginning, as with the harness's HFLM.

    Args:
        model: any StripedHyena, on any device.
        tokenizer: its tokenizer.
        max_length: the most tokens of one window; ``config.max_length`` unless given.
        batch_size: the most prompts that are continued together. Passes that score are filled by tokens, as memory
            allows.
        share_contexts: read what requests share once. Without it each is read by itself, with the same scores.

    Raises:
        InputError: the tokenizer has no token that could begin a text.
    """

    def __init__(
        self,
        model: StripedHyena,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        batch_size: int | None = None,
        share_contexts: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.native = tokenizer
        self.max_length = max_length or model.config.max_length
        self.batch_size = batch_size or GENERATED_TOGETHER
        self.share_contexts = share_contexts
        if tokenizer.bos_id is None and tokenizer.eos_id is None:
            raise InputError("the tokenizer has neither BOS nor EOS, and texts without a context need one of them")

    @property
    def eot_token_id(self) -> int:
        return self.prefix_token_id if self.native.eos_id is None else self.native.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        token = self.native.eos_id if self.native.bos_id is None else self.native.bos_id
        assert token is not None
        return token

    @property
    def tokenizer_name(self) -> str:
        return type(self.native).__name__

    @property
    def device(self) -> Any:
        return self.model.device

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text. Names of special tokens become these tokens, and a text that begins with BOS keeps one."""
        begins = any(
            string.startswith(name) for name, i in self.native.special_tokens.items() if i == self.native.bos_id
        )
        begin = not begins if add_special_tokens is None else add_special_tokens
        return self.native.encode(string, special=bool(self.native.special_tokens), add_special_tokens=begin)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of the maximum length that do not overlap."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            new = [Request(*utils.make_disjoint_window(pair)) for pair in pairs]
            windows += new
            owners += [number] * len(new)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._score(windows, disable_tqdm, share=False), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Answer]:
        answers = self._score([self._window(*request[1:]) for request in requests], disable_tqdm, self.share_contexts)
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def _window(self, context: list[int], continuation: list[int]) -> Request:
        """A request without the beginning of its context that passes the maximum length; the last token is not read."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise InputError(
                f"an answer of {len(continuation)} tokens passes the maximum length {self.max_length}: raise max_length"
            )
        return Request(context[-room:], continuation)

    def _score(self, requests: Sequence[Request], quiet: bool, share: bool) -> list[Answer]:
        answers: list[Answer] = [(0.0, True)] * len(requests)
        groups = group_requests(requests) if share else []
        shared = [group for group in groups if len(group.tails) > 1]
        together = {tail.request for group in shared for tail in group.tails}
        alone = [number for number in range(len(requests)) if number not in together]
        limit = self.max_length + 1
        with tqdm(total=len(requests), desc="scoring", unit=" requests", disable=quiet) as bar:

            def progress(done: int) -> None:
                bar.update(len(together) * done // len(shared) - bar.n)

            scored = score_continuations(
                self.model,
                [(group.shared, [tail.ids for tail in group.tails]) for group in shared],
                skips=[[tail.skip for tail in group.tails] for group in shared],
                max_length=limit,
                progress=progress,
            )
            for group, found in zip(shared, scored, strict=True):
                for tail, one in zip(group.tails, found, strict=True):
                    answers[tail.request] = one.logprob, one.greedy
            texts = [[*requests[number].context, *requests[number].continuation] for number in alone]
            for place, one in iter_scores(self.model, self.native, texts, entropy=False, max_length=limit):
                count = len(requests[alone[place]].continuation)
                logprobs, ranks = one.logprobs[-count:], one.ranks[-count:]  # type: ignore[index]
                answers[alone[place]] = float(logprobs.sum(dtype=float)), bool((ranks == 1).all())
                bar.update()
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until a stop string. Requests with equal settings are continued together."""
        texts = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        with tqdm(total=len(requests), desc="generating", unit=" requests", disable=disable_tqdm) as bar:
            for numbers in by_settings.values():
                options = _options(requests[numbers[0]].args[1])
                room = self.max_length - options["max_new_tokens"]
                if room < 1:
                    raise InputError(
                        f"{options['max_new_tokens']} new tokens leave no room for a prompt in the maximum length "
                        f"{self.max_length}: raise max_length"
                    )
                for start in range(0, len(numbers), self.batch_size):
                    part = numbers[start : start + self.batch_size]
                    prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in part]
                    rows = generate(self.model, self.native, prompts, max_length=self.max_length, **options)
                    for number, row in zip(part, rows, strict=True):
                        texts[number] = row.text
                        self.cache_hook.add_partial("generate_until", requests[number].args, row.text)
                    bar.update(len(part))
        return texts


def _options(given: dict[str, Any]) -> Any:
    """The options of ``generate`` for settings of a task.

    Raises:
        InputError: settings that it does not have.
    """
    settings = dict(normalize_gen_kwargs(given))
    options = {"max_new_tokens": settings.pop("max_gen_toks"), "stop": [s for s in settings.pop("until") if s]}
    if not settings.pop("do_sample"):
        settings.pop("temperature", None)
    if settings.get("num_beams") == 1:  # some tasks say that they want none
        del settings["num_beams"]
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"):
        if name in settings:
            options[name] = settings.pop(name)
    if settings:
        raise InputError(f"the task sets {', '.join(sorted(settings))} for generation, which hyaena does not have")
    return options
