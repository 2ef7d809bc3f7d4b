"""Text generation, token by token."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyaena.errors import InputError
from vortex.model.cache import InferenceParams
from vortex.model.sample import sample
from vortex.model.utils import print_rank_0

logger = logging.getLogger(__name__)

CHUNK = 8192
"""Tokens of a prompt that one pass reads at most, all rows together, unless the caller names a number."""

ROWS = 16
"""Prompts of unequal lengths that are continued together."""


class Generator:
    """Continue prompts with a model.

    Args:
        model: a ``StripedHyena``, or what is called like one.
        tokenizer: of the model.
        top_k, top_p, temperature: see ``vortex.model.sample.sample``.
    """

    def __init__(
        self, model: Any, tokenizer: Any, top_k: int = 50, top_p: float = 0.7, temperature: float = 1.0
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.top_k, self.top_p, self.temperature = top_k, top_p, temperature

    def generate(
        self,
        device: torch.device | str | None = None,
        input_string: str | None = None,
        input_ids: Tensor | None = None,
        num_tokens: int = 32,
        cached_generation: bool = True,
        force_prompt_threshold: int | None = None,
        max_seqlen: int | None = None,
        print_generation: bool = True,
        verbose: bool = False,
        skip_special_tokens: bool = False,
        stop_at_eos: bool = True,
        inference_params_dict: dict[str, Any] | None = None,
        token_callback: Callable[[int], Any] = lambda i: None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Any] | None]:
        """Continue one text, or a batch of prompts.

        Args:
            device: of the model; without a CUDA device, one that is named means the model's, and a line says so.
            input_string: the prompt as text, or else
            input_ids: prompts [B,T].
            num_tokens: the most tokens to generate.
            cached_generation: keep states, so that a step reads one token; the same tokens, sooner.
            force_prompt_threshold: read the prompt in pieces of so many tokens, which bounds the memory of a long one
                and changes nothing else. By default pieces have 8,192 tokens, all rows together.
            max_seqlen: read the last so many tokens of the prompt only.
            print_generation: with ``verbose``, print the tokens of a single row as they come.
            skip_special_tokens: the original's, without effect: 0 and 1 stand for no text.
            stop_at_eos: end a row at its end-of-text token, which then fills the row; stop when all rows have ended.
            inference_params_dict: states to go on from, of an earlier call. ``input_ids`` is then the one token that
                they have not read, or everything from the first token on, of which the new ones are read.
            token_callback: called with the number of each generated token.
            padding_mask: [B,T], nonzero where ``input_ids`` has a token; padding stands on the left.

        Returns:
            ids int64 [B,n], logits float32 [B,n,V], n <= num_tokens, and the states, which have read everything but the
            last token (None without ``cached_generation``).

        Raises:
            InputError: no prompt, an empty one, or one that does not follow the states.
            NonFiniteError: the logits are not finite.
        """
        x = self._prompt(usable_device(device, self.model), input_string, input_ids)
        x = x[:, -max_seqlen if max_seqlen else None :]
        if x.shape[1] == 0 or int(num_tokens) < 1:
            raise InputError("generate takes a prompt of at least one token, and num_tokens of at least 1")
        if force_prompt_threshold is not None and force_prompt_threshold < 1:
            raise InputError(f"force_prompt_threshold is {force_prompt_threshold}: give at least 1, or None")
        params = inference_params_dict
        if params is not None:
            x = unread(params, x)
        elif cached_generation:
            params = self.model.initialize_inference_params(max_seqlen=x.shape[1] + int(num_tokens))
        mask = None if padding_mask is None else padding_mask.to(x.device)[:, -x.shape[1] :]
        eos, printing = self._eos(), verbose and print_generation and len(x) == 1
        ended = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        chosen, scores = [], []
        for i in range(int(num_tokens)):
            logits = self._read(x, params, mask, force_prompt_threshold)
            token_callback(i)
            scores.append(logits.float())
            new = sample(scores[-1], top_k=self.top_k, top_p=self.top_p, temperature=self.temperature)
            if stop_at_eos:
                new = torch.where(ended, eos, new)
                ended = ended | (new == eos)
            chosen.append(new)
            if printing:
                print_rank_0(self.tokenizer.detokenize([int(new)]), end=" ")
            if stop_at_eos and bool(ended.all()):
                break
            x = new[:, None] if params is not None else torch.cat([x, new[:, None]], dim=1)
            if mask is not None:
                mask = None if params is not None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        ids = torch.stack(chosen, dim=1)
        if verbose:
            print_rank_0(f"\nInput: {input_string}, Output: {self.tokenizer.detokenize_batch(ids)}")
        return ids, torch.stack(scores, dim=1), params

    @torch.inference_mode()
    def _read(self, x: Tensor, params: dict[str, Any] | None, mask: Tensor | None, piece: int | None) -> Tensor:
        """Logits [B,V] after x [B,T], which is read in pieces where there are states to keep."""
        size = x.shape[1] if params is None else piece or max(1, CHUNK // len(x))
        parts = x.split(size, dim=1)
        masks = [None] * len(parts) if mask is None else mask.split(size, dim=1)
        logits = x
        for part, own in zip(parts, masks, strict=True):
            options = {} if own is None else {"padding_mask": own}
            logits, _ = self.model(part, inference_params_dict=params, **options)
        return logits[:, -1]

    def _prompt(self, device: torch.device, text: str | None, ids: Tensor | None) -> Tensor:
        if ids is not None:
            return ids.to(device)
        if text is None:
            raise InputError("generate takes input_string or input_ids")
        return torch.as_tensor(self.tokenizer.tokenize(text), dtype=torch.int64)[None].to(device)

    def _eos(self) -> int:
        """The id that ends a text: ``eos`` or ``eos_id`` where it is a number, else the last id of the text ``eos``."""
        for value in (self.tokenizer.eos, getattr(self.tokenizer, "eos_id", None)):
            if isinstance(value, int):
                return value
        return int(self.tokenizer.tokenize(self.tokenizer.eos)[-1])


def unread(params: Mapping[str, Any], x: Tensor) -> Tensor:
    """The tokens of x [B,T] that states have not read.

    Raises:
        InputError: x has several tokens, and does not begin with those that were read.
    """
    mha = params["mha"]
    held = torch.cat(mha.tokens, dim=1) if isinstance(mha, InferenceParams) and mha.tokens else x[:, :0]
    count = held.shape[1]
    if x.shape[1] == 1 or not count:
        return x
    if x.shape[1] > count and len(held) == len(x) and bool((x[:, :count] == held.to(x)).all()):
        return x[:, count:]
    raise InputError(
        f"inference_params_dict has read {count} tokens, and input_ids has {x.shape[1]} that do not begin with them: "
        "give the one token that follows, input_ids[:, -1:], or the whole text"
    )


_WARNED: set[str] = set()


def usable_device(device: torch.device | str | None, model: Any = None) -> torch.device:
    """The device that was named. Where there is no CUDA device, one means the model's or the CPU; a line says so."""
    own = getattr(model, "device", None)
    fallback = own if isinstance(own, torch.device) else torch.device("cpu")
    if device is None:
        return fallback
    named = torch.device(device)
    if named.type != "cuda" or torch.cuda.is_available():
        return named
    if str(named) not in _WARNED:
        _WARNED.add(str(named))
        logger.warning("%s was named, and there is no CUDA device: computing on %s", named, fallback)
    return fallback


@dataclass(kw_only=True)
class GenerationOutput:
    """What ``generate`` returns.

    Attributes:
        sequences: the generated texts, without their prompts.
        logits: float32 [B,n,V] of every batch: of all prompts where they have one length, else [1,n,V] of each.
        logprobs_mean: the mean log-probability of the generated tokens of each text.
    """

    sequences: list[str]
    logits: list[Tensor]
    logprobs_mean: list[float]


def logits_to_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [B,n] of tokens [B,n] under logits [B,n,V]."""
    return logits.log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def prepare_batch(
    seqs: Sequence[str], tokenizer: Any, prepend_bos: bool = False, device: torch.device | str | None = None
) -> tuple[Tensor, list[int]]:
    """Texts as ids [B,T] with padding on the right, and their lengths.

    Args:
        prepend_bos: begin every text with the end-of-document token, behind which the models were trained to begin.
        device: see ``Generator.generate``.
    """
    texts = _tokens(seqs, tokenizer, prepend_bos)
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return padded.to(usable_device(device)), [len(text) for text in texts]


def _tokens(seqs: Sequence[str], tokenizer: Any, prepend_bos: bool) -> list[Tensor]:
    first = [tokenizer.eod_id] if prepend_bos else []
    texts = [torch.tensor([*first, *tokenizer.tokenize(seq)], dtype=torch.int64) for seq in seqs]
    if not texts:
        raise InputError("there are no texts: give at least one")
    if not all(len(text) for text in texts):
        raise InputError("a text is empty: give every prompt at least one character, or prepend_bos=True")
    return texts


def generate(
    *,
    prompt_seqs: Sequence[str],
    model: Any,
    tokenizer: Any,
    n_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int = 1,
    top_p: float = 1.0,
    batched: bool = True,
    prepend_bos: bool = False,
    force_prompt_threshold: int | None = 3000,
    cached_generation: bool = True,
    verbose: int = 1,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> GenerationOutput:
    """Continue texts of any lengths. Every row is what its prompt gives alone.

    Args:
        prompt_seqs: the prompts.
        n_tokens: tokens to generate. The end-of-text token does not end a text here.
        temperature, top_k, top_p: see ``vortex.model.sample.sample``.
        batched: continue prompts together: all of one length, or 16 of unequal lengths at a time; else one by one.
        prepend_bos: begin every prompt with the end-of-document token.
        force_prompt_threshold, cached_generation, device: see ``Generator.generate``.
        verbose: 1 prints prompts, texts and scores at the end, 2 also what ``Generator.generate`` prints.
        **kwargs: passed on to ``Generator.generate``.

    Raises:
        InputError: no prompts, or an empty one.
    """
    model.eval()
    generator = Generator(model, tokenizer, top_k=top_k, top_p=top_p, temperature=temperature)
    place = usable_device(device, model)
    texts = _tokens(prompt_seqs, tokenizer, prepend_bos)
    output = GenerationOutput(sequences=[], logits=[], logprobs_mean=[])
    for batch in _batches(texts, batched):
        padded = torch.nn.utils.rnn.pad_sequence([text.flip(0) for text in batch], batch_first=True).flip(1)
        steps, lengths = torch.arange(padded.shape[1]), torch.tensor([[len(text)] for text in batch])
        mask = steps >= padded.shape[1] - lengths
        uniform = bool(mask.all())
        ids, logits, _ = generator.generate(
            place,
            input_ids=padded.to(place),
            num_tokens=n_tokens,
            print_generation=verbose > 1,
            verbose=verbose > 1,
            stop_at_eos=False,
            force_prompt_threshold=force_prompt_threshold,
            cached_generation=cached_generation,
            **({} if uniform else {"padding_mask": mask}),
            **kwargs,
        )
        output.sequences += tokenizer.detokenize_batch(ids)
        output.logits += [logits] if uniform else list(logits.split(1))
        output.logprobs_mean += logits_to_logprobs(logits, ids).mean(dim=1).tolist()
    if verbose:
        for prompt, text, score in zip(prompt_seqs, output.sequences, output.logprobs_mean, strict=True):
            print(f'Prompt: "{prompt}",\tOutput: "{text}",\tScore: {score}')
    return output


def _batches(texts: Sequence[Tensor], batched: bool) -> Iterator[Sequence[Tensor]]:
    uniform = len({len(text) for text in texts}) == 1
    size = len(texts) if batched and uniform else ROWS if batched else 1
    for start in range(0, len(texts), size):
        yield texts[start : start + size]
