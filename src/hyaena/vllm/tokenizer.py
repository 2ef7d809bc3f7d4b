"""Tokenizers for vLLM: ``--tokenizer-mode hyaena``, for models without a ``tokenizer.json`` (Evo, Evo 2, cub)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from vllm.tokenizers.hf import CachedHfTokenizer, HfTokenizer

from hyaena import hub
from hyaena.tokenizers import transformers_files
from hyaena.vllm.config import given_name


class HyaenaTokenizer(CachedHfTokenizer):
    """The tokenizer of anything that ``hyaena.load`` takes, as one of transformers: the same ids for the same texts."""

    @classmethod
    def from_pretrained(
        cls, path_or_repo_id: str | Path, *args: Any, revision: str | None = None, **kwargs: Any
    ) -> HfTokenizer:
        _, own = hub.load_tokenizer_of(given_name(str(path_or_repo_id)), revision=revision)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in transformers_files(own).items():
                (Path(folder) / name).write_bytes(content)
            return super().from_pretrained(folder, *args, **kwargs)
