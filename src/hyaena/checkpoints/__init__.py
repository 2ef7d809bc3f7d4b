"""Checkpoints on disk: find them, read them shard by shard, replace them so that nothing is ever half written.

Read: our own folders, the original's folders, a weights file with a configuration; safetensors (single or sharded) and
``torch.save`` files, with the original's names or ours. Written: folders in our layout or the original's.
"""

from hyaena.checkpoints.files import COMPANIONS, WEIGHTS, Checkpoint, find, find_config, has_weights, is_run
from hyaena.checkpoints.fingerprint import fingerprint
from hyaena.checkpoints.load import (
    as_device,
    as_dtype,
    check_names_and_shapes,
    load_model,
    read_tensors,
    stream_tensors,
)
from hyaena.checkpoints.quantize import check_quantizable, quantize_checkpoint
from hyaena.checkpoints.save import check_layout, files_of_tokenizer, save_model
from hyaena.checkpoints.weights import inspect

__all__ = [
    "COMPANIONS",
    "WEIGHTS",
    "Checkpoint",
    "as_device",
    "as_dtype",
    "check_layout",
    "check_names_and_shapes",
    "check_quantizable",
    "files_of_tokenizer",
    "find",
    "find_config",
    "fingerprint",
    "has_weights",
    "inspect",
    "is_run",
    "load_model",
    "quantize_checkpoint",
    "read_tensors",
    "save_model",
    "stream_tensors",
]
