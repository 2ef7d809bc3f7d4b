"""Small ``tokenizer.json`` files of the kinds that models have, trained on a few lines."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "The four species of hyenas are the striped hyena, the brown hyena, the spotted hyena and the aardwolf.",
    "the the the hyena hyena laughs; héllo wörld, 你好 你好 🐆🐆, Ünïcödé",
    "    indented = code(x)\n\treturn None\n",
]
TEXTS = ["The striped hyena", " leading", "  two  spaces ", "new\nline\ttab", "héllo 你好 🐆 Ω", "<0x41>", "a", ""]
BYTE_NAMES = [f"<0x{value:02X}>" for value in range(256)]


def sentencepiece_like(decoder: str) -> Library:
    """A BPE file as Llama's and Mistral's look: spaces become U+2581, one is put before the text, bytes as fallback."""
    library = Library(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if decoder == "metaspace":
        library.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *BYTE_NAMES], show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    spec = json.loads(library.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    library = Library.from_str(json.dumps(spec))
    if decoder == "metaspace":
        library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    else:
        replace = decoders.Replace("▁", " ")
        library.decoder = decoders.Sequence(
            [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return library


def byte_level() -> Library:
    """A BPE file as GPT-2's looks."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens(["an added wörd"])
    return library


def write(library: Library, folder: Path, **settings: object) -> Path:
    path = folder / "tokenizer.json"
    library.save(str(path))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
