"""Files of names and values: what is read, and what is refused before anything is built from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hyaena.errors import ConfigError
from hyaena.mappings import MAX_BYTES, MAX_DEPTH, MAX_VALUES, parse_json, parse_yaml, read_mapping

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


def refusal(content: bytes | str, path: Path) -> str:
    """The message with which a file of this content is refused: one printable line."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        read_mapping(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 500
    return str(error.value)


@pytest.mark.parametrize("name", ["config.json", "config.yml"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_and_yaml_with_and_without_a_byte_order_mark(name: str, mark: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(mark + '{"eps": 0.5, "layers": [1, 2], "name": "ünï"}', encoding="utf-8")
    assert read_mapping(path) == {"eps": 0.5, "layers": [1, 2], "name": "ünï"}
    if name.endswith(".yml"):
        path.write_text(mark + "eps: 0.5\nlayers: [1, 2]\nname: ünï\n", encoding="utf-8")
        assert read_mapping(path) == {"eps": 0.5, "layers": [1, 2], "name": "ünï"}


def test_anchors_and_merge_keys_of_yaml_work(tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text("base: &base {a: 1, b: 2}\nmine:\n  <<: *base\n  b: 3\n")
    assert read_mapping(tmp_path / "x.yml")["mine"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("vocab_size: [1", "is not valid YAML"),
        ("{'vocab_size': 1}", "is not valid JSON"),
        ("", "does not map names to values"),
        ("- 1\n- 2\n", "does not map names to values"),
        ("3: 4\n", "does not map names to values"),
        ("true: 4\n", "does not map names to values"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8 text (byte 0)"),
        ("eps: 1\n".encode("utf-16"), "cannot be read as UTF-8 text"),
        ("eps: 1\0\n", "is not valid YAML"),
        ("eps: 1\neps: 2\n", "eps is written twice"),
        ("a: {eps: 1, eps: 2}\n", "eps is written twice"),
        ('{"eps": 1, "eps": 2}', "eps is written twice"),
        ('{"a": {"\\u001b[31m": 1, "\\u001b[31m": 2}}', r"\x1b[31m is written twice"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("a: !!python/name:os.system\n", "is not valid YAML"),
        ("? [1, 2]\n: 3\n", "a key is a list or a mapping"),
        ("a: 2001-99-99\n", "a value cannot be read"),
        ("a: !!int x\n", "a value cannot be read"),
        ("a: !!timestamp x\n", "a value cannot be read"),
        ("a: !!bool maybe\n", "a value cannot be read"),
        ("a: " + "9" * 5000, "a value cannot be read"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("&a {x: *a}\n", "a value contains itself"),
        ("a: &a [*a]\n", "a value contains itself"),
        (LAUGHS, f"more than {MAX_VALUES:,} keys and values"),
        ("".join(f"k{i}: 1\n" for i in range(MAX_VALUES)), f"more than {MAX_VALUES:,} keys and values"),
        ("[" * 50_000, f"nested deeper than {MAX_DEPTH} levels"),
        ("a: " + "{a: " * 20_000, f"nested deeper than {MAX_DEPTH} levels"),
        ("".join(" " * i + "a:\n" for i in range(500)), f"nested deeper than {MAX_DEPTH} levels"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "a number has 5,000 digits"),
        ("a: " + " " * MAX_BYTES, "is larger than 1 MB"),
    ],
)
def test_content_that_cannot_be_used(content: bytes | str, words: str, tmp_path: Path) -> None:
    assert words in refusal(content, tmp_path / "config.yml")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """Opening a FIFO would wait for a writer; a device may do anything."""
    os.mkfifo(tmp_path / "fifo.yml")
    (tmp_path / "zero.yml").symlink_to("/dev/zero")
    (tmp_path / "loop.yml").symlink_to("loop.yml")
    (tmp_path / "nowhere.yml").symlink_to("missing")
    (tmp_path / "large.yml").touch()
    os.truncate(tmp_path / "large.yml", 1 << 40)
    for name, words in (
        ("fifo.yml", "is not a regular file"),
        ("zero.yml", "is not a regular file"),
        ("loop.yml", "cannot be read: "),
        ("nowhere.yml", "no such file"),
        ("large.yml", "is larger than 1 MB"),
        ("nul\0.yml", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        (".", "is a folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_mapping(tmp_path / name)


def test_values_keep_their_types() -> None:
    assert parse_json("[1, 1.5, true, null, 1e999]") == [1, 1.5, True, None, float("inf")]
    assert parse_yaml("[1, 1.5, true, null, 1e-5]") == [1, 1.5, True, None, "1e-5"]
