"""Where a conversion is written until it is whole, and how it gets to its place without ever looking half done.

Everything happens in a hidden folder beside the output, on the same file system:

    .<name>.partial/
        lock            held by the process that writes here
        plan.json       fingerprint of the plan: shards are only reused by the very same conversion
        target/         files of the model; config.json comes last, so that nothing unfinished loads
        assistant/      files of its drafter
        commit.json     all is whole: from here on there is only one way, forward
        old-target/ …   what was replaced, until it is deleted

After commit.json is written, old folders are moved aside, new ones into place, and the rest is deleted. Whoever finds a
commit.json (a run that was killed wrote it) first does what is left of that; each step can be done twice.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.convert.stream import PART_SUFFIX
from mlx_mtp.errors import MtpError

LOCK, PLAN, COMMIT = "lock", "plan.json", "commit.json"
LOCK_ATTEMPTS = 3  # another process may delete the folder while we open it
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class OutputError(MtpError):
    """The output cannot be written where it was asked for."""


@dataclass(frozen=True)
class Workplace:
    """The hidden folder of one output. outputs: final folders by the name of their folder in here."""

    outputs: Mapping[str, Path]
    folder: Path

    @classmethod
    def of(cls, outputs: Mapping[str, Path]) -> Workplace:
        """The workplace of a conversion whose first output names it."""
        first = next(iter(outputs.values()))
        return cls(outputs, first.with_name(f".{first.name}.partial"))

    def draft(self, part: str) -> Path:
        """The unfinished folder of a part."""
        return self.folder / part

    @property
    def is_committed(self) -> bool:
        """Whether a run was cut off after everything was whole: `recover` does the rest."""
        return (self.folder / COMMIT).is_file()

    def holds(self, part: str, name: str, nbytes: int) -> bool:
        """Whether a whole file of that size lies in the draft of a part; unfinished ones have another name."""
        path = self.draft(part) / name
        return path.is_file() and path.stat().st_size == nbytes

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and holds its lock. Raises OutputError if another process does, or if it cannot be made."""
        descriptor = self._lock()
        try:
            yield
        finally:
            os.close(descriptor)

    def _lock(self) -> int:
        for _ in range(LOCK_ATTEMPTS):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._check_is_ours()
                descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                cause = error
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                raise OutputError(f"another conversion into {next(iter(self.outputs.values()))} is running: wait for "
                                  "it, or choose another --mlx-path") from error
            except OSError as error:  # some network file systems
                os.close(descriptor)
                raise OutputError(f"no file can be locked in {self.folder} ({error.strerror}): choose a --mlx-path on "
                                  "another disk") from error
            with suppress(FileNotFoundError):
                if os.stat(self.folder / LOCK).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            os.close(descriptor)  # of a folder that its owner has just deleted
            cause = FileNotFoundError(errno.ENOENT, "it is deleted all the time")
        raise OutputError(f"{self.folder.parent} cannot be written ({cause.strerror}): choose another "
                          "--mlx-path") from cause

    def _check_is_ours(self) -> None:
        """Raises OutputError for a folder of that name that somebody else filled; ours always has its lock."""
        if not (self.folder / LOCK).exists() and any(self.folder.iterdir()):
            raise OutputError(f"{self.folder}, where the conversion would be prepared, holds something else: move it "
                              "away, or choose another --mlx-path")

    def resume(self, fingerprint: str) -> None:
        """Keeps whole shards of the very same conversion, and deletes everything else that lies here."""
        plan = self.folder / PLAN
        with suppress(FileNotFoundError, ValueError):
            if json.loads(plan.read_text()) == {"fingerprint": fingerprint}:
                for part in self.outputs:
                    self.draft(part).mkdir(exist_ok=True)
                    for path in self.draft(part).iterdir():
                        if path.suffix == PART_SUFFIX or path.suffix != ".safetensors":
                            path.unlink()
                return
        self._clear()
        for part in self.outputs:
            self.draft(part).mkdir()
        write_durably(plan, json.dumps({"fingerprint": fingerprint}))

    def commit(self, fingerprint: str, force: bool) -> None:
        """Puts the finished folders into place. Raises OutputError if something was put there meanwhile."""
        moves = [[part, output.name] for part, output in reversed(list(self.outputs.items()))]
        content = {"fingerprint": fingerprint, "force": force, "moves": moves}
        with self._keeping():
            for part in self.outputs:
                sync(self.draft(part))
            write_durably(self.folder / COMMIT, json.dumps(content))
        self._finish(content)

    def recover(self) -> str | None:
        """Does what is left of a commit that was cut off; its fingerprint, or None if there was no such."""
        try:
            content = json.loads((self.folder / COMMIT).read_text())
        except FileNotFoundError:
            return None
        self._finish(content)
        return str(content["fingerprint"])

    def _finish(self, commit: Mapping[str, Any]) -> None:
        moves = [(part, self.folder.parent / name) for part, name in commit["moves"]]
        with self._keeping():
            self._move(moves, bool(commit["force"]))
            self.discard()

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Turns what the file system complains about into a line for the user; nothing is deleted."""
        try:
            yield
        except OSError as error:
            raise OutputError(f"moving the result into {self.folder.parent} failed ({said(error)}): fix that "
                              "and run the command again, nothing is lost") from error

    def _move(self, moves: Sequence[tuple[str, Path]], force: bool) -> None:
        for part, output in moves:  # an output that is there is the old one as long as the new one is here
            if self.draft(part).exists() and output.exists():
                if not force:
                    raise OutputError(f"{output} appeared while its conversion was running: move it away and run the "
                                      "command again, the result is kept")
                os.rename(output, self.folder / f"old-{part}")
        for part, output in moves:
            if self.draft(part).exists():
                os.rename(self.draft(part), output)
        sync(self.folder.parent)

    def discard(self, made: Sequence[Path] = ()) -> None:
        """Deletes the folder, the commit last, so that a half-deleted folder still says what it is.

        made: folders around it to be deleted too, the innermost first, if nothing else is in them.
        """
        self._clear()
        for name in (PLAN, COMMIT, LOCK):
            (self.folder / name).unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # the next conversion has begun in it
                raise
        with suppress(OSError):
            for folder in made:
                folder.rmdir()

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name in (LOCK, PLAN, COMMIT):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def output_folder(name: str) -> Path:
    """The folder `name` as an absolute path, links kept. Raises OutputError for one that cannot be an output."""
    path = os.path.expanduser(name)
    if path.startswith("~"):
        raise OutputError(f"the output {name} is in the home of a user whom this computer does not know; expected a "
                          "folder (./~… for one whose own name begins so)")
    output = Path(os.path.abspath(path))
    if not output.name:
        raise OutputError(f"the output {output} is the root of a file system; expected a folder in it")
    return output


def check_output(output: Path, force: bool) -> None:
    """Raises OutputError unless `output` is free, or `force` allows to replace the checkpoint that is there."""
    if not os.path.lexists(output):
        return
    if not force:
        raise OutputError(f"{output} is there already: choose another --mlx-path, or replace it with --force")
    if output.is_symlink() or not output.is_dir():
        raise OutputError(f"{output} is not a folder; --force replaces checkpoints only: choose another --mlx-path")
    if os.path.ismount(output):  # known here rather than when everything is to be moved to its place
        raise OutputError(f"{output} is where a disk is mounted, and cannot be replaced: choose a folder in it as "
                          "--mlx-path")
    is_checkpoint = (output / "config.json").is_file() and any(output.glob("*.safetensors"))
    if any(output.iterdir()) and not is_checkpoint:
        raise OutputError(f"{output} holds something else than a checkpoint, and --force replaces checkpoints only: "
                          "choose another --mlx-path")


def check_apart(output: Path, source: Path) -> None:
    """Raises OutputError if one of both folders is, or is in, the other."""
    if _is_within(output, source) or _is_within(source, output):
        raise OutputError(f"the output {output} and the source {source} overlap; expected a folder of its own: choose "
                          "another --mlx-path")


def _is_within(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or in it. By what the file system says: on a Mac two spellings can be one folder."""
    resolved = path.resolve()
    above = [parent for parent in (resolved, *resolved.parents) if parent.exists()]
    return folder.exists() and any(parent.samefile(folder) for parent in above)


def check_space(folder: Path, needed: int) -> None:
    """Raises OutputError if the file system of `folder` has fewer free bytes than needed."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OutputError(f"{folder.parent} has {free / 1e6:,.1f} MB free, and {needed / 1e6:,.1f} MB will be written: "
                          "free some, or choose a --mlx-path on another disk")


def said(error: OSError) -> str:
    """What the file system complains about, and about which file if it says so."""
    complaint = error.strerror or str(error)
    return complaint if error.filename is None else f"{complaint}: {error.filename}"


def write_durably(path: Path, text: str) -> None:
    """Writes a file that is either not there or whole."""
    unfinished = path.with_name(path.name + PART_SUFFIX)
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(unfinished, path)


def copy_durably(source: Path, target: Path) -> None:
    """Copies a file's content, which is on the disk when this returns."""
    shutil.copyfile(source, target)
    sync(target)


def sync(path: Path) -> None:
    """Makes sure that the names in a folder, or the content of a file, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
