from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from hyaena.errors import InputError, OutputError
from hyaena.tokenizers import ByteTokenizer, CharacterTokenizer, HFTokenizer, Tokenizer
from hyaena.train import corpus as module
from hyaena.train import documents
from hyaena.train.corpus import tokenize
from hyaena.train.data import evaluation_batches
from hyaena.train.documents import Piece, read_documents


def prompted(prompt: str, completion: str, line: int = 1) -> list[Piece]:
    return [Piece(prompt, "x.jsonl", line, learned=False), Piece(completion, "x.jsonl", line, begins=False)]


@pytest.fixture
def words(tmp_path: Path) -> HFTokenizer:
    """Words and spaces, with ``</s>`` as a special token; a space in front of every text, as SentencePiece has it."""
    vocabulary = {"</s>": 0, "<unk>": 1, "▁": 2, "▁a": 3, "▁b": 4, "a": 5, "b": 6, "<": 7, "/": 8, "s": 9, ">": 10}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return HFTokenizer(tmp_path / "tokenizer.json")


def test_documents_stand_between_start_and_end_tokens() -> None:
    corpus = tokenize([Piece("ab"), Piece("é")], ByteTokenizer())
    assert corpus.tokens.tolist() == [256, 97, 98, 257, 256, 0xC3, 0xA9, 257]
    assert corpus.starts.tolist() == [0, 4] and corpus.ends.tolist() == [4, 8]
    assert corpus.learned.tolist() == [1, 5] and not corpus.has_prompts
    assert (corpus.num_bytes, corpus.num_predictions) == (4, 6)


def test_a_tokenizer_without_bos_starts_documents_with_its_end_token() -> None:
    corpus = tokenize([Piece("AC"), Piece("G")], CharacterTokenizer())
    assert corpus.tokens.tolist() == [0, 65, 67, 0, 0, 71, 0]
    assert corpus.starts.tolist() == [0, 4]


def test_prompts_are_not_predicted() -> None:
    pieces = [*prompted("ab", "cd"), Piece("x"), *prompted("", "y")]
    corpus = tokenize(pieces, ByteTokenizer())
    assert corpus.tokens.tolist() == [256, *b"abcd", 257, 256, *b"x", 257, 256, *b"y", 257]
    assert corpus.starts.tolist() == [0, 6, 9] and corpus.learned.tolist() == [3, 7, 10]
    assert corpus.has_prompts and (corpus.num_bytes, corpus.num_predictions) == (4, 3 + 2 + 2)


def test_a_completion_continues_its_prompt(words: HFTokenizer) -> None:
    """As generation would: the ids of the prompt are those of the prompt alone, and the rest follows."""
    corpus = tokenize(prompted("a", "b a"), words)
    assert corpus.tokens.tolist() == [0, 3, 6, 3, 0]  # not ▁b, which a completion encoded by itself begins with
    assert corpus.learned.tolist() == [2]
    # The space would join with what follows it, so the completion is encoded by itself.
    assert tokenize(prompted("b ", "a"), words).tokens.tolist() == [0, 4, 2, 3, 0]


def test_pieces_of_a_document_are_encoded_as_a_whole(words: HFTokenizer, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(documents, "BLOCK", 2)
    (tmp_path / "x.txt").write_text("ab ba b")
    pieces = list(read_documents([tmp_path / "x.txt"]))
    assert len(pieces) == 4
    assert tokenize(pieces, words).tokens.tolist() == [0, *words.encode("ab ba b", add_special_tokens=False), 0]


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(CharacterTokenizer(), np.uint8), (ByteTokenizer(), np.uint16), (None, np.uint8)],
)
def test_ids_are_kept_in_the_narrowest_type(vocabulary: Tokenizer | None, dtype: type, words: HFTokenizer) -> None:
    corpus = tokenize([Piece("ab")], vocabulary or words)
    assert corpus.tokens.dtype == dtype
    assert isinstance(corpus.tokens, np.memmap) and not corpus.tokens.flags.writeable


def test_the_checksum_tells_texts_and_their_bounds_apart() -> None:
    same = [tokenize([Piece("ab"), Piece("c")], ByteTokenizer()).checksum for _ in range(2)]
    others = [
        tokenize(pieces, ByteTokenizer()).checksum
        for pieces in ([Piece("ab"), Piece("d")], [Piece("a"), Piece("bc")], [Piece("abc")], prompted("ab", "c"))
    ]
    assert same[0] == same[1] and len({same[0], *others}) == 5


def test_no_text_is_an_error() -> None:
    for pieces in ([], [Piece("")], [Piece(""), Piece("")]):
        with pytest.raises(InputError, match="no text"):
            tokenize(pieces, ByteTokenizer())


def test_documents_without_tokens_are_none(tmp_path: Path) -> None:
    """Without start and end tokens a text may become one token, or none: every count is of what is predicted."""
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    bare = HFTokenizer(tmp_path / "tokenizer.json", 3)
    corpus = tokenize([Piece(" "), Piece("a b a"), Piece("  "), Piece("a"), Piece(" ")], bare)
    assert (corpus.starts.tolist(), corpus.tokens.tolist()) == ([0, 3], [0, 1, 0, 0])
    assert (corpus.num_predictions, corpus.num_bytes) == (2, 6)
    assert sum(b.num_targets for b in evaluation_batches(corpus, window=2, overlap=0, batch_size=2)) == 2
    with pytest.raises(InputError, match="makes no token of the text"):
        tokenize([Piece(" "), Piece("  ")], bare)
    with pytest.raises(InputError, match="nothing in the text is predicted: every document is a single token"):
        tokenize([Piece("a"), Piece(" "), Piece("b")], bare)


def test_empty_documents_are_left_out() -> None:
    corpus = tokenize([Piece(""), Piece("a"), Piece(""), Piece("", begins=False), Piece("b")], ByteTokenizer())
    assert corpus.tokens.tolist() == [256, 97, 257, 256, 98, 257]


class Picky(CharacterTokenizer):
    """Refuses a character, as tokenizers may."""

    def encode(self, text: str | bytes, **options: Any) -> list[int]:
        if "!" in str(text):
            raise InputError("the text has a '!'")
        return super().encode(text, **options)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("x.txt", "a\nb\nc!\nd", 3),
        ("x.jsonl", '{"text": "a"}\n{"text": "b\\nc!"}\n', 2),
        ("x.json", '[{"text": "a"},\n\n{"text": "b!"}]', 3),
        ("x.jsonl", '{"prompt": "a!", "completion": "b"}\n', 1),
    ],
)
def test_what_a_tokenizer_refuses_is_named_with_file_and_line(
    tmp_path: Path, name: str, content: str, line: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(content)
    for block in (documents.BLOCK, 3):
        monkeypatch.setattr(documents, "BLOCK", block)
        with pytest.raises(InputError, match=f"{name}, line {line}: the text has a '!'"):
            tokenize(read_documents([tmp_path / name]), Picky())


def test_the_name_of_a_special_token_in_a_document_is_text(words: HFTokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a</s>b"}\n{"prompt": "b</s>", "completion": "</s>a"}\n')
    corpus = tokenize(read_documents([tmp_path / "x.jsonl"]), words)
    assert [token for token in corpus.tokens.tolist() if token == words.eos_id] == [0, 0, 0, 0]  # two documents' ends
    assert corpus.starts.tolist() == [0, corpus.tokens.tolist().index(0, 1) + 1]
    name = [words.encode(character, add_special_tokens=False)[-1] for character in "</s>"]
    assert corpus.tokens.tolist()[1:-1][: corpus.starts[1] - 2] == [3, *name, 6]  # ▁a < / s > b


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("x.txt", b"ACGT\nAC\0GT\n", 2),
        ("x.txt", b"ACGT\nACGT\n\x01", 3),
        ("x.jsonl", b'{"text": "ACGT"}\n\n{"text": "AC\\u0000"}\n', 3),
        ("x.json", b'[{"text": "A"},\n{"prompt": "A", "completion": "\\u0001"}]', 2),
    ],
)
def test_bytes_that_evo_reads_as_control_tokens_are_refused_with_file_and_line(
    tmp_path: Path, name: str, content: bytes, line: int
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}, line {line}: ") as caught:
        tokenize(read_documents([tmp_path / name]), CharacterTokenizer())
    assert str(caught.value).isprintable()
    assert tokenize(read_documents([tmp_path / name]), ByteTokenizer()).num_bytes > 0  # bytes 0 and 1 are text there


def test_unpaired_surrogates_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b\\udc80"}\n')
    with pytest.raises(InputError, match=r"x\.jsonl, line 2: an unpaired surrogate at character 1"):
        tokenize(read_documents([tmp_path / "x.jsonl"]), ByteTokenizer())


def test_prompts_that_no_window_holds_are_refused() -> None:
    pieces = [*prompted("abc", "de", line=1), Piece("x" * 99), *prompted("abc", "def", line=4)]
    assert tokenize(pieces, ByteTokenizer(), window=7).has_prompts  # 8 tokens: 7 inputs, 7 targets
    with pytest.raises(InputError, match=r"x\.jsonl, line 4: prompt and completion take 8 tokens, more than .* 6"):
        tokenize(pieces, ByteTokenizer(), window=6)


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Full:
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr(module.tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(OutputError, match=f"{tmp_path}: No space left on device; free some space"):
        tokenize([Piece("a")], ByteTokenizer(), folder=tmp_path)


def test_nothing_is_left_on_the_disk(tmp_path: Path) -> None:
    corpus = tokenize([Piece("ab")], ByteTokenizer(), folder=tmp_path)
    assert list(tmp_path.iterdir()) == [] and corpus.tokens.tolist() == [256, 97, 98, 257]


def test_rows_of_numbers_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "1"}) + "\n" + json.dumps({"text": 1}) + "\n")
    with pytest.raises(InputError, match="line 2"):
        tokenize(read_documents([tmp_path / "x.jsonl"]), ByteTokenizer())
