"""The file that a batch job's results go to, in input order, so that a job which was stopped can go on.

Each line is written whole and carries a fingerprint of the request that it answers. What a kill can leave is a
beginning of a line at the end: it is cut off and run again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_mtp.errors import RequestError


class OutputFile:
    """Appends lines to `path`. done: how many of the requests, of which these are the fingerprints, it answers.

    Raises RequestError, and changes nothing, if the file holds anything else, or cannot be read or written.
    """

    def __init__(self, path: Path, fingerprints: Sequence[str]) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._failure(error) from error
        try:
            self._lock()
            self.done = 0
            if stat.S_ISREG(os.fstat(self._file).st_mode):  # a pipe or a device has nothing to go on from
                self.done, size = self._read(fingerprints)
                os.ftruncate(self._file, size)
        except OSError as error:
            os.close(self._file)
            raise self._failure(error) from error
        except RequestError:
            os.close(self._file)
            raise

    def close(self) -> None:
        os.close(self._file)

    def write(self, shown: dict[str, Any]) -> None:
        """Appends one object as a line. Raises RequestError if the disk is full or gone."""
        line = f"{json.dumps(shown)}\n".encode()
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise self._failure(error) from error
        self.done += 1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RequestError(f"another run is writing to {self._path}: wait for it, or name another --output"
                               ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # of a file system without locks
                raise

    def _read(self, fingerprints: Sequence[str]) -> tuple[int, int]:
        """How many whole lines there are, and their bytes."""
        count = size = 0
        with self._path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n") and _may_begin(line, count):
                    break
                if count == len(fingerprints):
                    raise RequestError(f"{self._path} has more lines than there are prompts, which are {count}: give "
                                       "those that it was made from, or name another --output")
                if not _answers(line, count, fingerprints[count]):
                    raise RequestError(
                        f"{self._path}:{count + 1} is not the answer to prompt {count + 1} with this model and these "
                        "settings: give those that it was made with, name another --output, or delete that line and "
                        "all after it")
                count, size = count + 1, size + len(line)
        return count, size

    def _failure(self, error: OSError) -> RequestError:
        return RequestError(f"{self._path} cannot be written ({error.strerror}): fix that or name another --output; "
                            "lines that were written stay, and the same command goes on after them")


def _may_begin(line: bytes, index: int) -> bool:
    """Whether this can be the beginning of our line of that index, and not the end of somebody's notes."""
    begin = b'{"index": %d, ' % index
    if not line.startswith(begin):
        return begin.startswith(line)
    try:
        return "fingerprint" in json.loads(line)  # whole but for its end
    except (ValueError, RecursionError):
        return True


def _answers(line: bytes, index: int, fingerprint: str) -> bool:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return (isinstance(given, dict) and given.get("index") == index and given.get("fingerprint") == fingerprint
            and given.get("finish_reason") in ("stop", "length") and line.endswith(b"\n"))
