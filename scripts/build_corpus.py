#!/usr/bin/env python3
"""Build the training text of ``cub``: the Python source of the running interpreter's standard library.

    python scripts/build_corpus.py [--output corpus]

Writes ``train.jsonl`` and ``heldout.jsonl`` (one object ``{"path", "text"}`` per line, ordered by path) and
``manifest.json``. The result depends only on the Python distribution: whether a file is held out follows from
the SHA-256 of its path relative to the library, exact duplicates are kept once (under the path that sorts
first, which also decides the split, so that no held-out file has a copy in the training text), and generated files
are left out: those that the build of the interpreter writes for one machine, and the manual inside ``pydoc_data``.
Needs nothing beyond the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import sysconfig
from pathlib import Path

HELDOUT_SHARE = 0.04
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}
# Written by the build of the interpreter: they hold the paths of the machine it was built on.
MACHINE_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-")
# The reference manual as one generated dictionary of prose: no source, and larger than any two other files together.
GENERATED = {"pydoc_data/topics.py"}


def library_files(library: Path) -> list[Path]:
    """All Python files of the standard library, ordered by their relative path."""
    found = []
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).parts
        machine_made = any(part.startswith(MACHINE_PREFIXES) for part in parts)
        left_out = machine_made or SKIPPED_FOLDERS.intersection(parts) or "/".join(parts) in GENERATED
        if path.is_file() and not left_out:
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(library).as_posix())


def is_heldout(name: str) -> bool:
    """Whether the file of this relative path belongs to the held-out split."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < HELDOUT_SHARE * 2**64


def split(library: Path) -> tuple[dict[str, list[dict[str, str]]], dict[str, int]]:
    """Both splits as lists of documents, and how many files were skipped and why."""
    documents: dict[str, list[dict[str, str]]] = {"train": [], "heldout": []}
    skipped = {"not_utf8": 0, "blank": 0, "duplicate": 0}
    seen: set[bytes] = set()
    for path in library_files(library):
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            skipped["not_utf8"] += 1
            continue
        if not text.strip():
            skipped["blank"] += 1
            continue
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            skipped["duplicate"] += 1
            continue
        seen.add(digest)
        name = path.relative_to(library).as_posix()
        documents["heldout" if is_heldout(name) else "train"].append({"path": name, "text": text})
    return documents, skipped


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` as a whole: a build that is interrupted leaves the previous file."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def build(library: Path, output: Path) -> dict[str, object]:
    """Write both splits and the manifest into ``output``; returns the manifest."""
    documents, skipped = split(library)
    output.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, object] = {
        "source": "standard library of CPython",
        "python": platform.python_version(),
        "heldout_share_of_files": HELDOUT_SHARE,
        "skipped": skipped,
    }
    for name, rows in documents.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
        write_atomically(output / f"{name}.jsonl", lines)
        manifest[name] = {
            "file": f"{name}.jsonl",
            "documents": len(rows),
            "text_bytes": sum(len(row["text"].encode("utf-8")) for row in rows),
            "sha256": hashlib.sha256(lines).hexdigest(),
        }
    write_atomically(output / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode("utf-8"))
    return manifest


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build the training text of cub from the Python standard library.")
    parser.add_argument("--output", type=Path, default=Path("corpus"), help="folder to write (default: corpus)")
    parser.add_argument(
        "--library",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="folder of the library (default: that of the running Python)",
    )
    arguments = parser.parse_args()
    if not arguments.library.is_dir():
        print(f"build_corpus: error: {arguments.library} is not a folder; pass --library", file=sys.stderr)
        return 2
    json.dump(build(arguments.library, arguments.output), sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
