"""Text to token ids and back: raw bytes, Evo's characters, and ``tokenizer.json`` files.

Every tokenizer here is, for decoding, a table of byte strings: token ``i`` stands for the bytes ``pieces[i]``
(nothing for special tokens). So decoding has one law, whatever the tokenizer:

    decode(ids) == decode_bytes(ids).decode("utf-8", errors="replace")

and streaming is the same sentence read one token at a time. SentencePiece-like tokenizers add one rule: the
space that their encoder puts before a text is taken off again, at the start of a text and nowhere else. A
stream therefore has to know what came before it: ``tokenizer.stream(after=prompt_ids)``.
"""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from hyaena.errors import CheckpointError, InputError, UnsupportedError


class Tokenizer(ABC):
    """What every tokenizer offers.

    Attributes:
        vocab_size: V, the ids are 0..V-1.
        bos_id: the id that begins a document, or None.
        eos_id: the id that ends a document, or None; generation stops at it.
        pad_id: the id that fills padded positions, or None.
    """

    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None

    _pieces: list[bytes]
    _strips_leading_space: bool = False

    @abstractmethod
    def encode(self, text: str | bytes, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text.

        Bytes are taken as they are where the tokenizer works on bytes, and must be UTF-8 where it does not.
        ``add_special_tokens`` puts ``bos_id`` in front (once) where the tokenizer's models expect it.

        Raises:
            InputError: the text cannot be encoded.
        """

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes that the ids stand for; special tokens stand for none.

        Raises:
            InputError: an id lies outside 0..V-1.
        """
        data = b"".join(map(self._piece, ids))
        return data[1:] if self._strips_leading_space and data.startswith(b" ") else data

    def decode(self, ids: Iterable[int]) -> str:
        """The text that the ids stand for; bytes that are not UTF-8 become U+FFFD (see ``decode_bytes``)."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self, *, after: Sequence[int] = ()) -> TextStream:
        """A decoder for ids that arrive one by one.

        ``after`` are the ids that precede the stream, usually the prompt: their text is not repeated, but a
        character that they leave unfinished is finished, and a leading space is kept when they hold text.
        """
        return TextStream(self, after)

    def _piece(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise InputError(f"token id {token} is outside the vocabulary 0..{self.vocab_size - 1}")
        return self._pieces[token]


class TextStream:
    """Decodes ids one by one; never emits part of a character.

    The texts that ``push`` and ``flush`` return, joined, are ``tokenizer.decode`` of all ids. Each push costs
    time proportional to the token's own bytes; at most three bytes are held back.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # An unfinished character is at most three bytes long, and what precedes it cannot change its meaning.
        context = b""
        for token in reversed(after):
            context = tokenizer._piece(token) + context
            if len(context) >= 3:
                break
        self._strip = tokenizer._strips_leading_space and not context
        self._utf8.decode(context[-3:])

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        data = self._tokenizer._piece(token)
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character stayed unfinished. The stream is then at its start state."""
        return self._utf8.decode(b"", final=True)


class ByteTokenizer(Tokenizer):
    """Bytes as they are: ids 0..255 are the 256 byte values, 256 begins a document, 257 ends it, 258 pads.

    Lossless: ``decode_bytes(encode(data, add_special_tokens=False)) == data`` for every ``data``. A vocabulary
    larger than 259 has unused ids at its end, which stand for no bytes.
    """

    bos_id = 256
    eos_id = 257
    pad_id = 258

    def __init__(self, vocab_size: int = 259) -> None:
        if vocab_size < 259:
            raise InputError(f"a byte vocabulary needs 259 ids (256 values, BOS, EOS, PAD), not {vocab_size}")
        self.vocab_size = vocab_size
        self._pieces = [bytes([value]) for value in range(256)] + [b""] * (vocab_size - 256)

    def encode(self, text: str | bytes, *, add_special_tokens: bool = True) -> list[int]:
        ids = list(_to_bytes(text))
        return [256, *ids] if add_special_tokens else ids


class CharacterTokenizer(Tokenizer):
    """Evo's characters: a byte's value is its id, 0 ends a document, 1 pads, and nothing begins one.

    Ids 0, 1 and those from 256 on stand for no text.
    """

    eos_id = 0
    pad_id = 1

    def __init__(self, vocab_size: int = 512) -> None:
        if vocab_size < 256:
            raise InputError(f"a character vocabulary needs at least 256 ids, not {vocab_size}")
        self.vocab_size = vocab_size
        self._pieces = [b"", b""] + [bytes([value]) for value in range(2, 256)] + [b""] * (vocab_size - 256)

    def encode(self, text: str | bytes, *, add_special_tokens: bool = True) -> list[int]:
        return list(_to_bytes(text))


class HFTokenizer(Tokenizer):
    """A ``tokenizer.json`` file, through the ``tokenizers`` library.

    BOS goes in front once: when ``tokenizer_config.json`` beside the file says so (``add_bos_token``), else when
    the file's own template adds it, else when it is called ``<s>``, as the models with that token were trained.
    The names of BOS, EOS and PAD come from ``tokenizer_config.json`` or ``special_tokens_map.json``, else from
    the names in common use. Truncation and padding that the file asks for are switched off: no prompt is cut.

    Args:
        path: the ``tokenizer.json``.
        vocab_size: V of the model, if larger than the file's: the ids between stand for no text.

    Raises:
        CheckpointError: the file is missing, corrupt or larger than the model's vocabulary.
        UnsupportedError: the file decodes in a way that is not made of bytes (WordPiece and the like).
    """

    def __init__(self, path: str | Path, vocab_size: int | None = None) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UnsupportedError("reading tokenizer.json needs: pip install tokenizers") from error
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            spec = json.loads(text)
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise CheckpointError(f"{path} is not a usable tokenizer.json ({_one_line(error)})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        names: dict[int, str] = {i: name for name, i in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        own_size = max(names) + 1 if names else 0
        self.vocab_size = own_size if vocab_size is None else vocab_size
        if own_size > self.vocab_size:
            raise CheckpointError(
                f"{path} has {own_size} tokens but the model has {self.vocab_size}: use the model's own file"
            )
        to_bytes, self._strips_leading_space = _decoder_of(spec.get("decoder"), path)
        special = {token["id"] for token in spec.get("added_tokens", []) if token.get("special")}
        self._pieces = [b""] * self.vocab_size
        for token, name in names.items():
            if token not in special:
                self._pieces[token] = to_bytes(name)
        settings = _beside(path, "special_tokens_map.json") | _beside(path, "tokenizer_config.json")
        self.bos_id = self._special_id(settings, "bos_token", ("<s>", "<|begin_of_text|>", "<bos>"), path)
        self.eos_id = self._special_id(settings, "eos_token", ("</s>", "<|endoftext|>", "<|end_of_text|>"), path)
        self.pad_id = self._special_id(settings, "pad_token", ("<pad>",), path)
        self._adds_bos = self.bos_id is not None and self._wants_bos(settings, names.get(self.bos_id))

    def encode(self, text: str | bytes, *, add_special_tokens: bool = True) -> list[int]:
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"the text is not UTF-8 (byte {error.start}), as this tokenizer needs") from error
        _to_bytes(text, allow_escapes=False)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if add_special_tokens and self._adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def _special_id(self, settings: dict[str, Any], key: str, usual: tuple[str, ...], path: Path) -> int | None:
        declared = settings.get(key)
        if isinstance(declared, dict):
            declared = declared.get("content")
        if declared is not None:
            token = self._tokenizer.token_to_id(declared)
            if token is None:
                raise CheckpointError(f"{path} has no token {declared!r}, which the files beside it name as {key}")
            return token
        found = (self._tokenizer.token_to_id(name) for name in usual)
        return next((token for token in found if token is not None), None)

    def _wants_bos(self, settings: dict[str, Any], name: str | None) -> bool:
        declared = settings.get("add_bos_token")
        if isinstance(declared, bool):
            return declared
        return name == "<s>" or self._tokenizer.encode("").ids[:1] == [self.bos_id]


class _Described(Protocol):
    """The two fields of a ModelConfig that choose a tokenizer."""

    @property
    def tokenizer(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...


def load_tokenizer(path: str | Path, config: _Described) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        path: the model's folder, a file in it, or a ``tokenizer.json``; read only when ``config.tokenizer`` is
            ``"hf"``.
        config: the model's configuration (``tokenizer`` and ``vocab_size`` are read).

    Raises:
        CheckpointError: there is no usable ``tokenizer.json``, or the vocabulary does not fit.
    """
    kinds = {"bytes": ByteTokenizer, "characters": CharacterTokenizer}
    if config.tokenizer in kinds:
        try:
            return kinds[config.tokenizer](config.vocab_size)
        except InputError as error:
            raise CheckpointError(f"the config says tokenizer {config.tokenizer!r}, but {error}") from error
    if config.tokenizer != "hf":
        raise CheckpointError(f"unknown tokenizer {config.tokenizer!r}: use 'hf', 'bytes' or 'characters'")
    path = Path(path)
    if path.is_file() and path.name.endswith("tokenizer.json"):
        return HFTokenizer(path, config.vocab_size)
    folder = path if path.is_dir() else path.parent
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"no tokenizer.json in {folder}: put the model's tokenizer.json there")
    return HFTokenizer(file, config.vocab_size)


def _to_bytes(text: str | bytes, *, allow_escapes: bool = True) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        # Python hands undecodable bytes of arguments and file names over as lone surrogates; they go back.
        return text.encode("utf-8", errors="surrogateescape" if allow_escapes else "strict")
    except UnicodeEncodeError as error:
        raise InputError(f"the text has an unpaired surrogate at character {error.start}: not valid Unicode") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _beside(path: Path, name: str) -> dict[str, Any]:
    """A JSON object next to the tokenizer, or nothing when there is no such file."""
    file = path.with_name(name)
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({_one_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return content


class _PieceDecoder:
    """What a ``tokenizer.json`` decoder does to one token, as far as it is made of bytes."""

    def __init__(self) -> None:
        self.replacements: list[tuple[str, str]] = []
        self.byte_level = False
        self.byte_fallback = False
        self.strips_leading_space = False

    def __call__(self, name: str) -> bytes:
        if self.byte_fallback and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            try:
                return bytes([int(name[3:5], 16)])
            except ValueError:
                pass  # an ordinary token that only looks like one
        for old, new in self.replacements:
            name = name.replace(old, new)
        if self.byte_level and all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return name.encode("utf-8", errors="replace")


def _decoder_of(spec: dict[str, Any] | None, path: Path) -> tuple[_PieceDecoder, bool]:
    """Compile the ``decoder`` of a ``tokenizer.json``; also says whether a text's leading space is taken off."""
    decoder = _PieceDecoder()
    steps = spec.get("decoders", []) if spec and spec.get("type") == "Sequence" else [spec or {"type": "none"}]
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                decoder.byte_level = True
            case {"type": "ByteFallback"}:
                decoder.byte_fallback = True
            case {"type": "Fuse"}:
                pass  # bytes are always joined
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                decoder.replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)}:
                decoder.replacements.append((old, " "))
                scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
                decoder.strips_leading_space = scheme != "never"
            case {"type": "Strip", "content": " ", "start": (0 | 1) as start, "stop": 0}:
                decoder.strips_leading_space = start == 1
            case _:
                raise UnsupportedError(
                    f"{path} uses the decoder {step.get('type', step)!r}; supported: ByteLevel, Metaspace, and "
                    "sequences of Replace, ByteFallback, Fuse and Strip"
                )
    return decoder, decoder.strips_leading_space


def _byte_of_character() -> dict[str, int]:
    """The printable character by which byte-level BPE files write each byte.

    Printable Latin-1 bytes stand for themselves; the other 68 take the code points from 256 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}


_BYTE_OF = _byte_of_character()
