"""Heads over ``StripedHyenaModel``: the next token, the class of a text, the class of each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from hyaena.errors import InputError, UnsupportedError, shown
from hyaena.hf.cache import FIELD, StripedHyenaCache, as_cache
from hyaena.hf.configuration import StripedHyenaConfig
from hyaena.hf.inputs import last_tokens
from hyaena.hf.modeling import StripedHyenaModel, StripedHyenaPreTrainedModel


class StripedHyenaForCausalLM(StripedHyenaPreTrainedModel, GenerationMixin):
    """A StripedHyena language model; ``generate`` continues texts."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: StripedHyenaConfig) -> None:
        super().__init__(config)
        self.model = StripedHyenaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StripedHyenaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: StripedHyenaCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the token that follows each position, and with ``labels`` the loss.

        Args:
            labels: int [B,T], the ids themselves, -100 where no loss is wanted: they are shifted here.
            logits_to_keep: compute the logits of the last so many positions, or of these positions; 0 for all.
            kwargs: for the loss, such as ``num_items_in_batch``.

        The other arguments are those of ``StripedHyenaModel.forward``.
        """
        last = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep > 0 else None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            cache=past_key_values if cache is None else cache,
            last_positions=last,
            return_dict=True,
        )
        x = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            x = x[:, logits_to_keep]
        elif last is not None:
            x = x[:, -last:]
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{FIELD: outputs.get(FIELD)},
        )

    # --- generation ----------------------------------------------------------------------------------------------

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Make the cache of a generation, unless the caller brought one or wants none; what ``generate`` calls."""
        given = as_cache(model_kwargs.get(FIELD))
        kind = generation_config.cache_implementation
        if given is not None and kind is not None:
            raise InputError("a cache and cache_implementation exclude each other: leave one of them out")
        if given is not None or generation_config.use_cache is False:
            return
        if kind not in (None, "dynamic", "static"):
            raise UnsupportedError(
                f"cache_implementation {shown(kind)} is not supported: choose 'dynamic' (the default) or 'static'"
            )
        names = ("generation_mode", "batch_size", "max_cache_length")
        limit = dict(zip(names, args, strict=False), **kwargs)["max_cache_length"]
        limit = max(limit, generation_config.max_cache_len or 0)
        model_kwargs[FIELD] = StripedHyenaCache(limit if kind == "static" else None)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """The mask as it is: what ``generate`` calls to make masks of four dimensions for a static cache."""
        return attention_mask


class StripedHyenaForSequenceClassification(StripedHyenaPreTrainedModel):
    """A class, several, or a number for each text: a linear layer over the last token that is not padding."""

    def __init__(self, config: StripedHyenaConfig) -> None:
        super().__init__(config)
        self.model = StripedHyenaModel(config)
        self.score = nn.Linear(config.hidden_size, int(config.num_labels or 0), bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StripedHyenaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits [B,num_labels], and with ``labels`` the loss that ``config.problem_type`` names.

        Padding may stand on either side. Without a mask it is what has the id ``config.pad_token_id``.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            return_dict=True,
            **kwargs,
        )
        x = outputs.last_hidden_state
        last = last_tokens(attention_mask, input_ids, self.config.pad_token_id, (x.shape[0], x.shape[1]))
        logits = self.score(x[torch.arange(len(x), device=x.device), last.to(x.device)])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{FIELD: outputs.get(FIELD)},
        )


class StripedHyenaForTokenClassification(StripedHyenaPreTrainedModel):
    """A class for each token: a linear layer over every position."""

    def __init__(self, config: StripedHyenaConfig) -> None:
        super().__init__(config)
        self.model = StripedHyenaModel(config)
        self.score = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits [B,T,num_labels], and with ``labels`` [B,T] the loss, without the positions where they are -100."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            return_dict=True,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
