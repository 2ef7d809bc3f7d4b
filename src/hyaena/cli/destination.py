"""Where a command writes a model."""

from __future__ import annotations

import os
from pathlib import Path

from hyaena.arguments import as_path
from hyaena.errors import InputError, OutputError


def find_destination(name: str, *, force: bool) -> Path:
    """The folder to write a model into, with all that can be known of it before weights are read.

    Args:
        name: as the user wrote it.
        force: whether it may hold files already.

    Raises:
        InputError: it is a file, or holds files.
        CheckpointError: it holds a model that would stay beside the new one.
        OutputError: it cannot be written.
    """
    folder = as_path("the folder to write", name)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise InputError(f"{folder} is a file: name a folder to write")

    from hyaena.checkpoints.save import check_folder
    from hyaena.files import cure, locked, others, reason

    if not force and others(folder):
        raise InputError(f"{folder} is not empty: name another folder, or add --force to replace the model in it")
    try:
        with locked(folder):
            check_folder(folder, overwrite=force)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({reason(error)}): {cure(error)}") from error
    return folder
