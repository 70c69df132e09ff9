"""What a command that measures or judges does around its work: progress cleared, and files written whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from mlx_mtp import command
from mlx_mtp.errors import RequestError


def guarded(run: Callable[[], int], clear: Callable[[], None]) -> int:
    """`mlx_mtp.command.guarded` with progress taken off the terminal's last line before anything else is told."""
    def cleared() -> int:
        try:
            return run()
        finally:
            clear()

    return command.guarded(cleared)


def check_output_folder(folder: Path, is_made: bool = True) -> None:
    """Raises RequestError where no file can be written to a folder, made if need be: before minutes are spent."""
    try:
        if is_made:
            folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RequestError(f"--output {folder} is no folder that can be written to ({error.strerror}): name another"
                           ) from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file all at once, in place of an older one. Raises RequestError where it cannot: that one stays then."""
    path = path.resolve()  # a link stays a link
    if path.exists() and not path.is_file():  # a device or a pipe, which nothing can take the place of
        _try(path, lambda: path.write_text(text, encoding="utf-8"))
        return
    beginning = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _try(path, lambda: beginning.write_text(text, encoding="utf-8"))
        _try(path, lambda: beginning.replace(path))
    finally:
        beginning.unlink(missing_ok=True)


def _try(path: Path, work: Callable[[], object]) -> None:
    try:
        work()
    except OSError as error:
        raise RequestError(f"--output {path} cannot be written ({error.strerror}): name another file") from error
