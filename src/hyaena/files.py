"""Files that are whole at every moment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from hyaena.errors import OutputError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary sibling, flush it to the disk and rename it over ``path``.

    Raises:
        OutputError: the file cannot be written (a full disk, say); what stood at ``path`` is untouched.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    # torch.save reports a failing write of its zip archive as RuntimeError.
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {path}: {' '.join(str(error).split())}; free some space, the previous file is unharmed"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
