"""Checkpoints on disk: find them, read them shard by shard, write them so that nothing is ever half written.

Read: our own folders, the original's folders, a weights file with a configuration; safetensors (single or sharded) and
``torch.save`` files, with the original's names or ours. Written: folders in our layout or the original's.
"""

from hyaena.checkpoints.files import Checkpoint, find, find_config, has_weights
from hyaena.checkpoints.load import STORED, as_device, load_model, read_tensors, survey
from hyaena.checkpoints.save import save_model

__all__ = [
    "STORED",
    "Checkpoint",
    "as_device",
    "find",
    "find_config",
    "has_weights",
    "load_model",
    "read_tensors",
    "save_model",
    "survey",
]
