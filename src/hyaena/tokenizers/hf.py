"""``tokenizer.json`` files, through the ``tokenizers`` library."""

from __future__ import annotations

import base64
import binascii
import copy
import json
import math
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from hyaena.arguments import whole
from hyaena.errors import CheckpointError, InputError, UnsupportedError, printable, shown
from hyaena.tokenizers.base import MAX_VOCAB_SIZE, Tokenizer, to_bytes
from hyaena.tokenizers.decoders import PieceDecoder
from hyaena.tokenizers.files import one_line, read_beside, read_object

if TYPE_CHECKING:
    import tokenizers

_T = TypeVar("_T")
_MAX_PIECES = 128 * 2**20
"""Most bytes of all tokens' texts together."""
_MAX_GROWTH = 1000
"""Most characters that a normalizer may make of one character of a text."""


class HFTokenizer(Tokenizer):
    """Reads a ``tokenizer.json`` file and, beside it, the settings that name its special tokens.

    BOS goes in front once: when ``tokenizer_config.json`` has ``add_bos_token``, else when the file's own template adds
    it, else when it is called ``<s>``, as the models with that token were trained. The names of BOS, EOS and PAD come
    from ``tokenizer_config.json`` or ``special_tokens_map.json``, else from the names in common use; more ids at which
    generation ends come from ``generation_config.json``. Truncation and padding in the file are switched off: no prompt
    is cut. Added tokens are plain text, whatever the vocabulary's own alphabet.

    Args:
        path: the ``tokenizer.json``.
        vocab_size: V of the model, if larger than the file's: the ids between stand for no text.

    Raises:
        CheckpointError: the file is missing, corrupt or larger than the model's vocabulary.
        UnsupportedError: the file decodes in a way that is not made of bytes (WordPiece and the like).
    """

    def __init__(self, path: str | PathLike[str], vocab_size: int | None = None) -> None:
        if not isinstance(path, str | PathLike):
            raise InputError(f"path must be the path of a tokenizer.json, not {shown(path)}")
        if vocab_size is not None:
            vocab_size = whole("vocab_size", vocab_size, f"from 1 to {MAX_VOCAB_SIZE:,}", 1, MAX_VOCAB_SIZE)
        path = self._path = Path(path)
        spec, text = read_object(path)
        library = self._library = _parse(text, path)
        if _growth(spec.get("normalizer")) > _MAX_GROWTH:
            raise CheckpointError(
                f"{path}: its normalizer makes a text more than {_MAX_GROWTH:,} times as long: download it again"
            )
        names: dict[int, str] = {i: name for name, i in library.get_vocab(with_added_tokens=True).items()}
        own_size = max(names) + 1 if names else 0
        self.vocab_size = own_size if vocab_size is None else vocab_size
        if own_size > self.vocab_size:
            raise CheckpointError(
                f"{path} has {own_size} tokens but the model has {self.vocab_size}: use the model's own file"
            )
        if own_size > MAX_VOCAB_SIZE:
            raise CheckpointError(f"{path} numbers its tokens up to {own_size - 1:,}: not a usable tokenizer.json")

        added: Mapping[int, Any] = library.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        to_piece = PieceDecoder(spec.get("decoder"), path)
        self._removes_leading_space = to_piece.removes_leading_space
        prepended = to_piece(_prepended(spec.get("normalizer")))
        self._removes_space_after_added = to_piece.removes_leading_space and prepended == b" "
        self._verbatim = frozenset(i for i, token in added.items() if not token.normalized)
        self._pieces = _pieces(self.vocab_size, names, added, to_piece, prepended, path)

        settings = read_beside(path.with_name("special_tokens_map.json"))
        settings |= read_beside(path.with_name("tokenizer_config.json"))
        self.bos_id = self._id_of(settings, "bos_token", ("<s>", "<|begin_of_text|>", "<bos>"))
        self.eos_id = self._id_of(settings, "eos_token", ("</s>", "<|endoftext|>", "<|end_of_text|>"))
        self.pad_id = self._id_of(settings, "pad_token", ("<pad>",))
        self.other_eos_ids = eos_ids_beside(path.parent, self.vocab_size)
        if self.eos_id is None and self.other_eos_ids:
            self.eos_id = self.other_eos_ids[0]
        self._adds_bos = self.bos_id is not None and self._wants_bos(settings, names.get(self.bos_id))
        self._plain_library = _parse(_without_special_names(spec, self._special), path) if self._special else library

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return MappingProxyType(self._special)

    @property
    def path(self) -> Path:
        """The file that was read."""
        return self._path

    @property
    def adds_bos(self) -> bool:
        """Whether ``bos_id`` goes in front of a text."""
        return self._adds_bos

    def name_of(self, token: int) -> str | None:
        """The name of a token in the file."""
        return self._library.id_to_token(token)

    def _encode(self, text: str | bytes, special: bool, add_special_tokens: bool) -> list[int]:
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"the text is not UTF-8 (byte {error.start}), as this tokenizer needs") from error
        to_bytes(text, allow_escapes=False)
        library = self._library if special else self._plain_library
        try:
            ids: list[int] = _guarded(lambda: library.encode(text, add_special_tokens=False).ids)
        except _LibraryError as error:
            raise InputError(f"{self._path} cannot encode the text ({error})") from error
        if add_special_tokens and self._adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def _described(self) -> str:
        return f"{str(self._path)!r}, {super()._described()}"

    def _id_of(self, settings: dict[str, Any], key: str, usual: Iterable[str]) -> int | None:
        """The id of BOS, EOS or PAD."""
        declared = settings.get(key)
        if isinstance(declared, dict):
            declared = declared.get("content")
        if declared is None:
            found = (self._library.token_to_id(name) for name in usual)
            return next((token for token in found if token is not None), None)
        if not isinstance(declared, str):
            raise CheckpointError(f"the files beside {self._path} give {key} as {shown(declared)}: it must be a name")
        try:
            token = self._library.token_to_id(declared)
        except UnicodeEncodeError:  # a lone surrogate, which no token contains
            token = None
        if token is None:
            raise CheckpointError(
                f"{self._path} has no token {printable(repr(declared))}, which the files beside it name as {key}"
            )
        return token

    def _wants_bos(self, settings: dict[str, Any], name: str | None) -> bool:
        declared = settings.get("add_bos_token")
        if isinstance(declared, bool):
            return declared
        if name == "<s>":
            return True
        try:
            return _guarded(lambda: self._library.encode("").ids[:1]) == [self.bos_id]
        except _LibraryError:
            return False


def eos_ids_beside(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """The ids at which generation ends by ``generation_config.json`` in a folder; none where there is no such file.

    Raises:
        CheckpointError: the file cannot be read, or ``eos_token_id`` is not an id or a list of ids of the vocabulary.
    """
    path = folder / "generation_config.json"
    declared = read_beside(path).get("eos_token_id")
    if declared is None:
        return ()
    ids = declared if isinstance(declared, list) else [declared]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise CheckpointError(
                f"{path}: eos_token_id {shown(token)} is not an id of the vocabulary 0..{vocab_size - 1}: correct it"
            )
    return tuple(dict.fromkeys(ids))


class _LibraryError(Exception):
    """The tokenizers library failed; its message on one line."""


def _guarded(work: Callable[[], _T]) -> _T:
    try:
        return work()
    except BaseException as error:
        # The library raises bare Exception for a malformed file, and panics, which are no Exceptions, for worse.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise _LibraryError(one_line(error)) from error
        raise


def _parse(text: str, path: Path) -> tokenizers.Tokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise UnsupportedError("reading tokenizer.json needs: pip install tokenizers") from error
    try:
        library = _guarded(lambda: tokenizers.Tokenizer.from_str(text))
    except _LibraryError as error:
        raise CheckpointError(f"{path} is not a usable tokenizer.json ({error}): download it again") from error
    library.no_truncation()
    library.no_padding()
    return library


def _without_special_names(spec: dict[str, Any], special: Collection[str]) -> str:
    """The file with other names for its special tokens, names that no text contains; every id stays.

    A switch of the library does less: with it, a special token is still found where the vocabulary itself leads there.
    """
    prefix = secrets.token_hex(16)
    new = {name: prefix + name for name in special}
    spec = copy.deepcopy(spec) | {"post_processor": None}
    for token in spec.get("added_tokens", []):
        token["content"] = new.get(token["content"], token["content"])
    model: dict[str, Any] = spec["model"]
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {new.get(name, name): i for name, i in vocab.items()}
    elif isinstance(vocab, list):  # Unigram: pairs of a name and its score
        model["vocab"] = [[new.get(name, name), score] for name, score in vocab]
    if isinstance(model.get("merges"), list):
        pairs = ((pair, pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"])
        model["merges"] = [pair for pair, parts in pairs if new.keys().isdisjoint([*parts, "".join(parts)])]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = new.get(model["unk_token"], model["unk_token"])
    return json.dumps(spec)


def _pieces(
    vocab_size: int,
    names: Mapping[int, str],
    added: Mapping[int, Any],
    to_piece: PieceDecoder,
    prepended: bytes,
    path: Path,
) -> list[bytes]:
    """The bytes that each id decodes to."""
    pieces, total = [b""] * vocab_size, 0
    for token, name in names.items():
        entry = added.get(token)
        if entry is None or to_piece.is_byte(name):
            piece = to_piece(name)
        elif entry.special:
            continue
        else:
            # A normalized added token is found in the normalized text, together with what the normalizer prepends.
            piece = (prepended if entry.normalized else b"") + entry.content.encode()
        pieces[token] = piece
        total += len(piece)
        if total > _MAX_PIECES:
            raise CheckpointError(f"{path}: the texts of its tokens take more than {_MAX_PIECES // 2**20} MiB")
    return pieces


def _prepended(normalizer: Any) -> str:
    """What a normalizer puts before each part of a text, and so after each added token that is cut out first."""
    steps = normalizer.get("normalizers") or [normalizer] if isinstance(normalizer, dict) else []
    return "".join(step["prepend"] for step in steps if isinstance(step, dict) and step.get("type") == "Prepend")


def _growth(normalizer: Any) -> float:
    """How many characters a normalizer's replacements can make of one character, at most."""
    if not isinstance(normalizer, dict):
        return 1.0
    factor = 1.0
    if isinstance(steps := normalizer.get("normalizers"), list):
        factor = math.prod(_growth(step) for step in steps)
    if isinstance(table := normalizer.get("precompiled_charsmap"), str):
        factor *= _longest_replacement(table)
    if isinstance(content := normalizer.get("content"), str):
        pattern = normalizer.get("pattern")
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        # An expression, or an empty string, may match between two characters, and leaves them in place.
        longest = len(content) / len(replaced) if isinstance(replaced, str) and replaced else len(content) + 1
        factor *= max(1.0, longest)
    return factor


def _longest_replacement(table: str) -> int:
    """The most characters that a ``Precompiled`` normalizer writes for one: its table is a trie, whose length in bytes
    stands in front as 32 bits, and the replacements, each ended by NUL (SentencePiece, ``normalizer.cc``)."""
    try:
        content = base64.b64decode(table)
    except (binascii.Error, ValueError):
        return 1  # the library has read it, or refused the file
    replacements = content[4 + int.from_bytes(content[:4], "little") :]
    return max(1, *(len(text.decode("utf-8", errors="replace")) for text in replacements.split(b"\0")))
