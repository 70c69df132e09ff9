"""What all commands share: how they complain, how they end, and flags that more than one of them has."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from mlx_mtp.config import AUTO
from mlx_mtp.errors import MtpError

USER_ERROR = 2
INTERRUPTED = 128 + 2  # as shells count: 128 + the signal's number, here SIGINT
BROKEN_PIPE = 128 + 13  # SIGPIPE


class Parser(argparse.ArgumentParser):
    """Complains like everything else here: in one line that begins with "error:"."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"error: {message}; see --help\n")


def guarded(run: Callable[[], int], when_interrupted: str = "interrupted") -> int:
    """Runs a command; returns its exit code, or 2 for what the user can mend, 130 after Ctrl-C, 141 without a reader.

    An MtpError is told on stderr, in one line.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an encoding that lacks a letter must not end the answer
    try:
        code = run()
        sys.stdout.flush()
        return code
    except MtpError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # the reader (`| head`) has enough; nothing may be flushed into the pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"\n{when_interrupted}", file=sys.stderr)
        return INTERRUPTED


def num_draft_tokens(text: str) -> int | str:
    """What --num-draft-tokens was given: a whole number, or "auto"."""
    try:
        return AUTO if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number or {AUTO}") from None
