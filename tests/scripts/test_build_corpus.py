from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from scripts.build_corpus import build, is_heldout, library_files

FILES = {f"package{i % 7}/module{i}.py": f"x = {i}\n".encode() for i in range(300)}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "lib"
    extra = {
        "site-packages/a.py": b"no = 1\n",
        "package1/__pycache__/a.py": b"no = 2\n",
        "_sysconfigdata_linux.py": b"no = 3\n",
        "config-3.11-linux/a.py": b"no = 4\n",
        "pydoc_data/topics.py": b"no = 5\n",
        "notes.txt": b"no = 6\n",
        "latin.py": b"# \xe9\n",
        "package1/__init__.py": b"",
        "windows.py": b"a = 1\r\n",
    }
    for name, content in (FILES | extra).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_source_file_is_in_one_split_by_the_hash_of_its_path(library: Path, tmp_path: Path) -> None:
    manifest = build(library, tmp_path / "corpus")
    splits = {name: read(tmp_path / "corpus" / f"{name}.jsonl") for name in ("train", "heldout")}
    assert {row["path"] for rows in splits.values() for row in rows} == {*FILES, "windows.py"}
    for name, rows in splits.items():
        assert len(rows) > 3
        assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
        assert all(is_heldout(row["path"]) == (name == "heldout") for row in rows)
        content = (tmp_path / "corpus" / f"{name}.jsonl").read_bytes()
        assert manifest[name] == {
            "file": f"{name}.jsonl",
            "documents": len(rows),
            "text_bytes": sum(len(row["text"].encode()) for row in rows),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert manifest["skipped"] == {"not_utf8": 1, "blank": 1, "duplicate": 0}
    assert json.loads((tmp_path / "corpus" / "manifest.json").read_text()) == manifest
    (windows,) = [row for row in splits["train"] + splits["heldout"] if row["path"] == "windows.py"]
    assert windows["text"] == "a = 1\r\n"


def test_the_same_library_gives_the_same_bytes(library: Path, tmp_path: Path) -> None:
    assert build(library, tmp_path / "a") == build(library, tmp_path / "b")
    for name in ("train.jsonl", "heldout.jsonl", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_no_held_out_file_has_a_twin_in_the_training_text(library: Path, tmp_path: Path) -> None:
    heldout = [name for name in FILES if is_heldout(name)]
    (library / "zz_copy.py").write_bytes(FILES[heldout[0]])  # sorts after its original
    (library / "aa_copy.py").write_bytes(FILES[heldout[1]])  # sorts before it
    manifest = build(library, tmp_path / "corpus")
    rows = {name: read(tmp_path / "corpus" / f"{name}.jsonl") for name in ("train", "heldout")}
    texts = {name: [row["text"] for row in split] for name, split in rows.items()}
    assert not set(texts["train"]) & set(texts["heldout"])
    assert len(set(texts["train"])) == len(texts["train"])
    assert isinstance(manifest["skipped"], dict) and manifest["skipped"]["duplicate"] == 2


def test_links_out_of_the_library_do_not_matter(library: Path) -> None:
    (library / "dangling.py").symlink_to(library / "absent.py")
    assert all(path.name != "dangling.py" for path in library_files(library))
