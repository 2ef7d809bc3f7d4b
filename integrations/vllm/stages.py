"""A worker with which vLLM's pipeline parallelism runs on a CPU: its own fails there, whatever the model."""

from __future__ import annotations

from typing import Any

from vllm.distributed import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker


class StageWorker(CPUWorker):
    """What a later stage receives lies in buffers, which the runner of GPUs makes before it measures memory."""

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        if not get_pp_group().is_first_rank:
            runner = self.model_runner
            runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
            )
