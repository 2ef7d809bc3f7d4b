from __future__ import annotations

import lzma
import random

import pytest
from scripts.model_card import Row, after_training_text, compressors, table


def test_compressors_are_measured_in_bits_per_byte() -> None:
    noise = random.Random(0).randbytes(4000)
    for row in compressors(noise):
        assert 8 <= row.bits_per_byte < 8.3  # noise does not shrink
    sizes = {row.name: row.bits_per_byte for row in compressors(b"hyaena " * 1000)}
    assert sizes["xz -9e"] == pytest.approx(
        8 * len(lzma.compress(b"hyaena " * 1000, preset=9 | lzma.PRESET_EXTREME)) / 7000
    )


def test_text_that_was_seen_costs_little() -> None:
    noise = random.Random(0).randbytes(4000)
    assert after_training_text(noise, noise).bits_per_byte < 0.2
    assert after_training_text(noise, random.Random(1).randbytes(4000)).bits_per_byte > 7.9


def test_the_table_is_markdown_with_the_best_last() -> None:
    lines = table([Row("good", "1 M", 0.7), Row("bad", "", 1.5)]).splitlines()
    assert lines[2:] == ["| bad |  | 1.5000 |", "| good | 1 M | 0.7000 |"]
