"""A model and a tokenizer of transformers from anything that ``hyaena.load`` takes."""

from __future__ import annotations

import tempfile
from os import PathLike
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

import hyaena
from hyaena.hf.heads import StripedHyenaForCausalLM
from hyaena.tokenizers import Tokenizer, transformers_files


def load(
    source: str | PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[StripedHyenaForCausalLM, PreTrainedTokenizerFast]:
    """A language model and its tokenizer; the arguments are those of ``hyaena.load``.

    So it takes the bundled model, folders in any layout and hub ids, and knows what the published models' files leave
    out.

    Raises:
        HyaenaError: in one line, what is wrong and how to put it right.
    """
    native, own = hyaena.load(source, device=device, dtype=dtype, revision=revision)
    model = StripedHyenaForCausalLM.from_native(native)
    settings = model.generation_config
    assert settings is not None
    settings.bos_token_id, settings.pad_token_id = own.bos_id, own.pad_id
    settings.eos_token_id = list(own.eos_ids) or None
    model.config.name_or_path = model.name_or_path = str(source)
    return model, fast_tokenizer(own)


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of this package as one of transformers: the same ids for the same texts.

    Names of special tokens inside a text are text, unless it is called with ``split_special_tokens=False``.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in transformers_files(tokenizer).items():
            (Path(folder) / name).write_bytes(content)
        made = PreTrainedTokenizerFast.from_pretrained(folder)
    made.name_or_path = ""
    return made
