"""The results page and the JSON of ``benchmarks.gpu``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.gpu_sizes import Claim
from benchmarks.registry import Row

METHOD = """\
Written by `python -m benchmarks.gpu`; do not edit. Random weights, bfloat16; our model has the shape of
StripedHyena-Hessian-7B, the peer is transformers' `MistralForCausalLM` in the same widths with attention in every
layer (Mistral-7B's shape), scaled-dot-product attention, no sliding window. Figures are medians. Floors come from a
copy and a matrix product measured in the same run (`hyaena.sizes`): 4·D numbers a token for the operator;
weights, keys, values and states for a decoding step; products and causal scores for a prefill. Before anything is
timed, the kernels are checked against the plain operator in float64, captured steps against the model's forward, and
prefill in chunks against one pass.

The two models do not fit into one GPU's memory at batch 64, so the sides of a row ran one after the other, on the same
GPU in the same run, the peer in a process of its own: a ratio is that of the medians, with [lowest … highest] from the
extremes of both sides. The peer reads a prompt as its users do, in one pass with a DynamicCache, and computes logits
of the last position; it decodes with a StaticCache and `torch.compile(mode="reduce-overhead", fullgraph=True)`. Keys,
values and states of decoding are random numbers. Our steps hand every token to the host; the peer's stay on the device
within a round."""


def lines(claims: Mapping[str, Claim], rows: Mapping[str, Row]) -> list[Sequence[str]]:
    """The table, with a line for what was not measured."""
    return [report.cells(rows[name]) if name in rows else _missing(claim) for name, claim in claims.items()]


def _missing(claim: Claim) -> Sequence[str]:
    bar = "–" if claim.bar is None else report.bar_text(claim.bar) + ("" if claim.ratio else f" {claim.unit}")
    return claim.what, "not measured", claim.peer_name or "–", "–", bar, "–"


def page(known: Mapping[str, Any], claims: Mapping[str, Claim], rows: Mapping[str, Row]) -> str:
    """The whole page, as Markdown."""
    occasion = known["occasion"]
    name = "a GPU" if known["machine"]["gpu"] != "none" else "no GPU: tiny sizes, to see that it runs"
    missing = [f"- {_title(claims[name])}: not measured: {why}" for name, why in known["missing"].items()]
    compared = sum(len(found) for found in known["raw"].get("checks", {}).values())
    seconds = ", ".join(f"{phase} {taken:.0f}" for phase, taken in known["seconds"].items())
    wrong = [f"{name}: wrong or unfinished" for name, found in known["raw"].get("checks", {}).items() if not found]
    sections = [
        f"# What hyaena reaches on {name}",
        METHOD,
        report.markdown_table(report.HEADER, lines(claims, rows)),
        "\n".join(missing),
        f"Checks: {'; '.join([f'{compared} comparisons within their tolerances', *wrong])}."
        if compared or wrong
        else "Checks: not run.",
        "## Machine",
        report.markdown_table(("", ""), known["machine"].items()),
        "## The run",
        f"{occasion['date']}, commit {occasion['commit']}: `{occasion['command']}`. Seconds: {seconds}.",
        report.spreads(rows.values()) if rows else "",
        "\n\n".join(f"{_title(claims[name])}: {row.note}" for name, row in rows.items() if row.note),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _title(claim: Claim) -> str:
    return claim.what + (f", against {claim.peer_name}" if claim.peer_name else "")


def write(folder: Path, known: Mapping[str, Any], claims: Mapping[str, Claim], rows: Mapping[str, Row]) -> Path:
    """Bring ``gpu.json`` and ``gpu.md`` in a folder up to date, each at once or not at all; return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: {**asdict(row), "met": row.met} for name, row in rows.items()}
    report.replace(folder / "gpu.json", json.dumps({**known, "rows": values}, indent=1, ensure_ascii=False) + "\n")
    report.replace(folder / "gpu.md", page(known, claims, rows))
    return folder / "gpu.md"
