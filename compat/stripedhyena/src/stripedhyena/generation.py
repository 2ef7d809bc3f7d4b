"""Text generation, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyaena.errors import InputError
from stripedhyena.sample import sample
from stripedhyena.utils import print_rank_0


class Generator:
    """Continue prompts with a model.

    Args:
        model: a ``StripedHyena``, or what is called like one.
        tokenizer: of the model.
        top_k, top_p, temperature: see ``stripedhyena.sample.sample``.
    """

    def __init__(
        self, model: Any, tokenizer: Any, top_k: int = 50, top_p: float = 0.7, temperature: float = 1.0
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.top_k, self.top_p, self.temperature = top_k, top_p, temperature

    def generate(
        self,
        device: torch.device | str,
        input_string: str | None = None,
        input_ids: Tensor | None = None,
        num_tokens: int = 32,
        cached_generation: bool = False,
        print_generation: bool = True,
        verbose: bool = False,
        skip_special_tokens: bool = False,
        stop_at_eos: bool = True,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Continue one text, or a batch of equally long prompts.

        Args:
            device: of the model.
            input_string: the prompt as text, or else
            input_ids: prompts [B,T].
            num_tokens: the most tokens to generate.
            cached_generation: keep states, so that a step reads one token; the same tokens, sooner.
            print_generation: with ``verbose``, print the tokens of a single row as they come.
            skip_special_tokens: leave special tokens out of what is printed.
            stop_at_eos: end a row at its end-of-text token, which then fills the row; stop when all rows have ended.
            max_seqlen: read the last so many tokens of the prompt only.

        Returns:
            ids int64 [B,n] and logits float32 [B,n,V], n <= num_tokens.

        Raises:
            InputError: no prompt, or an empty one.
            NonFiniteError: the logits are not finite.
        """
        x = self._prompt(device, input_string, input_ids)[:, -max_seqlen if max_seqlen else None :]
        if x.shape[1] == 0 or int(num_tokens) < 1:
            raise InputError("generate takes a prompt of at least one token, and num_tokens of at least 1")
        printing = verbose and print_generation and len(x) == 1
        options = {"skip_special_tokens": True} if skip_special_tokens else {}
        params = self.model.initialize_inference_params() if cached_generation else None
        eos = self._eos()
        ended = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        chosen, scores = [], []
        for _ in range(int(num_tokens)):
            with torch.no_grad():
                logits, _ = self.model(x, inference_params_dict=params)
            scores.append(logits[:, -1].float())
            new = sample(scores[-1], top_k=self.top_k, top_p=self.top_p, temperature=self.temperature)
            if stop_at_eos:
                new = torch.where(ended, eos, new)
                ended = ended | (new == eos)
            chosen.append(new)
            if printing:
                print_rank_0(self.tokenizer.detokenize([int(new)], **options), end=" ")
            if stop_at_eos and bool(ended.all()):
                break
            x = new[:, None] if cached_generation else torch.cat([x, new[:, None]], dim=1)
        ids = torch.stack(chosen, dim=1)
        if verbose:
            print_rank_0(f"\nInput: {input_string}, Output: {self.tokenizer.detokenize_batch(ids, **options)}")
        return ids, torch.stack(scores, dim=1)

    def _prompt(self, device: torch.device | str, text: str | None, ids: Tensor | None) -> Tensor:
        if ids is not None:
            return ids.to(device)
        if text is None:
            raise InputError("generate takes input_string or input_ids")
        tokens = torch.as_tensor(self.tokenizer.tokenize(text), dtype=torch.int64)
        return tokens[None].to(device)

    def _eos(self) -> int:
        """The id that ends a text: ``eos`` or ``eos_id`` where it is a number, else the last id of the text ``eos``."""
        for value in (self.tokenizer.eos, getattr(self.tokenizer, "eos_id", None)):
            if isinstance(value, int):
                return value
        return int(self.tokenizer.tokenize(self.tokenizer.eos)[-1])
