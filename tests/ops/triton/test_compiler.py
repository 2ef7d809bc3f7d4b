"""Kernels compile for GPUs that are not here, and fit their shared memory."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compiler.py")
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program may take, by compute capability."""


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.skipif(platform.system() != "Linux", reason="triton is made for Linux only")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("part", "kernels"),
    [
        ("taps", {"direct_forward_kernel", "direct_backward_kernel", "explicit_forward_kernel",
                  "explicit_backward_kernel", "toeplitz_forward_kernel", "toeplitz_gradients_kernel",
                  "toeplitz_taps_kernel", "toeplitz_diagonals_kernel"}),
        ("many_modes", {"modal_tables_kernel", "modal_forward_kernel", "modal_inputs_kernel", "modal_powers_kernel",
                        "modal_states_kernel", "modal_products_kernel", "direct_backward_kernel",
                        "segments_tables_kernel", "segments_forward_kernel", "segments_gate_kernel",
                        "segments_inputs_kernel", "segments_gradients_kernel"}),
        ("packed", {"_packed_hyena_kernel"}),
        ("streamed", {"_streamed_kernel"}),
        ("decoding", {"_rows_kernel", "_row_tiles_kernel", "_linear_kernel", "_gate_kernel", "_widen_kernel"}),
    ],
)  # fmt: skip
def test_kernels_compile_for(capability: int, part: str, kernels: set[str], tmp_path: Path) -> None:
    if capability < 90 and part in ("packed", "streamed", "decoding"):
        pytest.skip("these overlap, which takes a Hopper GPU")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(SCRIPT), str(capability), part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in compiled} == kernels
    assert all(line["shared"] <= SHARED[capability] for line in compiled)
