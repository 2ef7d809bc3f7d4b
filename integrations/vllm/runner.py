"""The model runner that vLLM uses on GPUs, its kernels and ours under Triton's interpreter, for ``test_tokens``.

The argument is the folder of a model that has every kind of layer.

vLLM takes this runner where Triton has a backend, so one is named that is never asked to compile.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from unittest.mock import patch

from integrations.vllm import conftest  # noqa: F401, it sets the environment before vLLM is imported

os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1", HYAENA_BACKEND="triton")

import triton.backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends["cpu"] = types.SimpleNamespace(driver=_Driver, compiler=None)

from integrations.vllm.cases import engine, make, own_tokens, random_prompts, tokens  # noqa: E402

from hyaena.ops.triton.hyena import step_launch  # noqa: E402

if __name__ == "__main__":
    model = make("kinds")
    prompts = random_prompts(model, [5, 40])
    with patch.dict(os.environ, HYAENA_BACKEND="plain"):
        expected = own_tokens(model, prompts, 5)
    with (
        engine(Path(sys.argv[1]), enable_prefix_caching=False, max_num_batched_tokens=32, max_num_seqs=2) as llm,
        patch.object(step_launch, "step_modes", wraps=step_launch.step_modes) as modes,
        patch.object(step_launch, "step_taps", wraps=step_launch.step_taps) as taps,
    ):
        runner = type(llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner)
        found = {
            "runner": [kind.__module__ for kind in runner.__mro__],
            "equal": tokens(llm, prompts, 5)[0] == expected,
            "steps in place": [modes.call_count, taps.call_count],
        }
    print(json.dumps(found))
