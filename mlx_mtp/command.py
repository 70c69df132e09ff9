"""What all commands share: how they complain, how they end, and flags that more than one of them has."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from mlx_mtp.config import AUTO
from mlx_mtp.errors import MtpError, RequestError

USER_ERROR = 2
INTERRUPTED = 128 + 2  # as shells count: 128 + the signal's number, here SIGINT
BROKEN_PIPE = 128 + 13  # SIGPIPE


class Parser(argparse.ArgumentParser):
    """Complains like everything else here: in one line that begins with "error:"."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"error: {message}; see --help\n")


def guarded(run: Callable[[], int], when_interrupted: str = "interrupted") -> int:
    """Runs a command; returns its exit code, or 2 for what the user can fix, 130 after Ctrl-C, 141 without a reader.

    An MtpError is told on stderr, in one line, and so is an error of the system's, such as a full disk behind stdout.
    """
    _open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an encoding that lacks a letter must not end the answer
    try:
        code = run()
        sys.stdout.flush()
        return code
    except MtpError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # the reader (`| head`) has enough
        _discard_stdout()
        return BROKEN_PIPE
    except OSError as error:
        where = error.filename or "reading or writing failed"
        print(f"error: {where}: {error.strerror or error}; fix that and run the command again", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _discard_stdout()
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"\n{when_interrupted}", file=sys.stderr)
        return INTERRUPTED


def _open_missing_streams() -> None:
    """Nowhere, for a standard stream that was closed (cron, `<&-`): else the next file opened would take its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, errors="backslashreplace"))


def _discard_stdout() -> None:
    """Nothing more can be written there, not even what is flushed at exit."""
    with suppress(io.UnsupportedOperation):  # no file, where a caller has put something else in its place
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_output(path: Path, prompts_file: str | None) -> None:
    """What can be known to be wrong with --output before a model is loaded, or downloaded. Raises RequestError."""
    # os.path's, since pathlib's raise where a name is too long or a folder is closed to us
    if not os.path.isdir(path.absolute().parent):
        raise RequestError(f"there is no folder {path.parent} for --output: make it or name another")
    if os.path.isdir(path):
        raise RequestError(f"--output {path} is a folder: expected the name of a file")
    is_there = prompts_file is not None and os.path.exists(path) and os.path.exists(prompts_file)
    if is_there and path.samefile(prompts_file or ""):
        raise RequestError(f"--output is the prompts file itself, {prompts_file}: name another file")


def num_draft_tokens(text: str) -> int | str:
    """What --num-draft-tokens was given: a whole number, or "auto"."""
    try:
        return AUTO if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number or {AUTO}") from None
