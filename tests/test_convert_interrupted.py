"""Whatever kills a conversion at whatever moment, the next run ends in the whole result, and nothing else ever loads.

The file system's events are counted by an audit hook, and a run is ended before each of them in turn, as by `kill -9`:
no handler of ours runs. Some real `kill -9`s of a process at random moments come on top.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
from convert_support import complaint, convert, everything_in, source_pair

from mlx_mtp.convert import shards, stream, workplace
from mlx_mtp.convert.workplace import Workplace

Folder = Mapping[str, bytes | None]
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
SHARD_BYTES = 100_000


class KilledError(BaseException):
    """Stands for the end of the process: nothing in the converter catches it."""


class Killer:
    """Ends the run before the event number `at` under `folder`; counts them all."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.at, self.count = -1, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        is_write = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        is_inside_rmtree = event in ("os.remove", "os.rmdir") and arguments[-1] != -1  # by names relative to a folder
        is_ours = str(arguments[0]).startswith(str(self.folder)) or is_inside_rmtree
        if (event in EVENTS or is_write) and is_ours:
            self.count += 1
            if self.count - 1 == self.at:
                self.folder = None
                raise KilledError


KILLER = Killer()
sys.addaudithook(KILLER)  # cannot be taken off again; without a folder it does nothing


@pytest.fixture(autouse=True)
def several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture(autouse=True)
def harmless_killer() -> Iterator[None]:
    yield
    KILLER.folder = None


def killed(at: int, source: Path, work: Path, *flags: str) -> bool:
    """Runs a conversion that dies at event `at`; False if it came to its end before."""
    KILLER.folder, KILLER.at, KILLER.count = work, at, 0
    try:
        convert(source, work / "out", *flags)
    except KilledError:
        return True
    finally:
        KILLER.folder = None
    return False


def wholes(source: Path, folder: Path, *flags: str) -> dict[str, Folder]:
    """What the command leaves in `out` and in `out-assistant`."""
    assert convert(source, folder / "out", *flags) == 0
    return {name: everything_in(folder / name) for name in ("out", "out-assistant")}


def cut_off(folder: Folder) -> Folder:
    """A folder without its card, which names the command."""
    return {name: content for name, content in folder.items() if name != "README.md"}


def check_drafts(place: Path, new: Mapping[str, Folder]) -> None:
    """What is being written has no config.json, without which nothing loads, until all the rest is there."""
    for part, name in (("target", "out"), ("assistant", "out-assistant")):
        if (place / part / "config.json").exists():
            for file, content in cut_off(new[name]).items():
                assert (place / part / file).read_bytes() == content


@pytest.mark.parametrize("force", [False, True])
def test_a_run_killed_before_any_step_is_finished_by_the_next_one(force: bool, tmp_path: Path) -> None:
    source = source_pair("unified", tmp_path / "in")
    flags = ["-q", *(["--force"] if force else [])]
    work = tmp_path / "work"
    work.mkdir()
    old = wholes(source, work) if force else {}
    begin = everything_in(work)
    new = wholes(source, work, *flags)
    at = 0
    while True:
        shutil.rmtree(work)
        for name, content in begin.items():
            (work / name).mkdir(parents=True) if content is None else (work / name).write_bytes(content)
        work.mkdir(exist_ok=True)
        if not killed(at, source, work, *flags):
            break
        check_drafts(work / ".out.partial", new)
        there = {name: everything_in(work / name) for name in new if (work / name).exists()}
        assert all(content in (old.get(name), new[name]) for name, content in there.items()), f"event {at}"
        assert there in ({name: old[name] for name in there if old}, {name: new[name] for name in there}), f"event {at}"
        is_finished = there == new and not (work / ".out.partial" / "commit.json").exists()
        assert convert(source, work / "out", *flags) == (2 if is_finished and not force else 0), f"event {at}"
        assert {path.name for path in work.iterdir()} <= {"out", "out-assistant", ".out.partial"}
        assert is_finished or not (work / ".out.partial").exists(), f"event {at}"
        assert {name: everything_in(work / name) for name in new} == new, f"event {at}"
        at += 1
    assert at > 25  # the run has that many moments


@pytest.mark.parametrize("writes", [1, 30])
def test_a_run_killed_within_a_shard_writes_that_one_again(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a file must not have its name: it may have its size already, as what is written last need not stand last."""
    source = source_pair("unified", tmp_path / "in")
    new = wholes(source, tmp_path / "whole", "-q")
    write, left = os.pwrite, [writes]

    def die(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise KilledError
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stream.os, "pwrite", die)
        with pytest.raises(KilledError):
            convert(source, tmp_path / "out", "-q")
    assert not list((tmp_path / ".out.partial" / "target").glob("*.safetensors"))
    assert convert(source, tmp_path / "out", "-q") == 0
    for name, content in new.items():
        assert cut_off(everything_in(tmp_path / name)) == cut_off(content)


def test_whole_shards_are_kept_and_all_else_is_written_again(tmp_path: Path) -> None:
    source = source_pair("dense", tmp_path / "in")
    new = wholes(source, tmp_path / "whole", "-q")
    work = tmp_path / "work"
    at = 0
    while len(list((work / ".out.partial" / "target").glob("*.safetensors"))) < 2:
        shutil.rmtree(work, ignore_errors=True)
        assert killed(at, source, work, "-q")
        at += 1
    target = work / ".out.partial" / "target"
    kept = {path.name: path.stat().st_ino for path in target.glob("*.safetensors")}
    (target / "model.safetensors.part").write_bytes(b"half a shard")
    assert convert(source, work / "out", "-q") == 0
    assert {name: (work / "out" / name).stat().st_ino for name in kept} == kept
    assert {name: cut_off(everything_in(work / name)) for name in new} == {
        name: cut_off(content) for name, content in new.items()}


@pytest.mark.parametrize("change", ["settings", "source"])
def test_shards_of_another_conversion_are_never_mixed_in(change: str, tmp_path: Path) -> None:
    source = source_pair("unified", tmp_path / "in")
    work = tmp_path / "work"
    at = 0
    while not list((work / ".out.partial" / "target").glob("*.safetensors")):
        shutil.rmtree(work, ignore_errors=True)
        assert killed(at, source, work, "-q", "--q-group-size=32")
        at += 1
    flags = ["-q", "--q-group-size=32"] if change == "source" else ["-q", "--q-group-size=32", "--q-mode=mxfp4"]
    if change == "source":
        shutil.copytree(source_pair("unified", tmp_path / "other"), source, dirs_exist_ok=True)
        os.utime(source / "model.safetensors", (1, 1))
    inode = next((work / ".out.partial" / "target").glob("*.safetensors")).stat().st_ino
    with next((work / ".out.partial" / "target").glob("*.safetensors")).open():  # so that its inode stays taken
        assert convert(source, work / "out", *flags) == 0
        assert inode not in {path.stat().st_ino for path in (work / "out").iterdir()}
    new = wholes(source, tmp_path / "whole", *flags)
    assert cut_off(everything_in(work / "out")) == cut_off(new["out"])


def test_ctrl_c_keeps_what_is_whole_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_pair("unified", tmp_path)
    finish = stream._ShardFile.finish

    def interrupt(self: Any) -> None:
        finish(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stream._ShardFile, "finish", interrupt)
        assert convert(source, tmp_path / "out", "-q") == 130
    assert "what is whole is kept, and the same command resumes from there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (shard,) = (tmp_path / ".out.partial" / "target").glob("*.safetensors")
    inode = shard.stat().st_ino
    assert convert(source, tmp_path / "out", "-q") == 0
    assert (tmp_path / "out" / shard.name).stat().st_ino == inode


def test_a_run_that_only_puts_things_into_place_shows_their_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_pair("unified", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Workplace, "_move", lambda *_: (_ for _ in ()).throw(KilledError()))
        with pytest.raises(KilledError):
            convert(source, tmp_path / "out", "-q", verify=True)
    capsys.readouterr()
    assert convert(source, tmp_path / "out", "-q", verify=True) == 0
    said = capsys.readouterr()
    assert "they are in their places now" in said.err
    assert "verified on" in said.out


@pytest.mark.parametrize(("code", "words"), [
    (errno.ENOSPC, "has no space left"), (errno.EDQUOT, "has no space left"), (errno.EIO, "writing into .* failed"),
])
def test_a_full_or_broken_disk_is_one_line_and_leaves_nothing_behind(
    code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_pair("unified", tmp_path / "in")
    before = everything_in(tmp_path)
    write, left = os.pwrite, [20]

    def fail_later(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return write(*arguments)

    monkeypatch.setattr(stream.os, "pwrite", fail_later)
    line = complaint(capsys, source, tmp_path / "out", "-q")
    assert re.search(words, line)
    assert everything_in(tmp_path) == before


def test_a_second_conversion_into_the_same_output_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_pair("unified", tmp_path / "in")
    with Workplace.of({"target": tmp_path / "out"}).locked():
        assert "another conversion into" in complaint(capsys, source, tmp_path / "out")
    assert convert(source, tmp_path / "out") == 0
    assert not (tmp_path / ".out.partial").exists()


def test_what_is_being_written_is_no_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished = shutil.copytree(source_pair("unified", tmp_path), tmp_path / ".out.partial" / "target")
    (tmp_path / ".out.partial" / "lock").touch()
    before = everything_in(tmp_path)
    assert "overlap" in complaint(capsys, unfinished, tmp_path / "out")
    assert everything_in(tmp_path) == before


def test_a_file_system_without_locks_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(workplace.fcntl, "flock", refuse)
    assert "no file can be locked in" in complaint(capsys, source_pair("unified", tmp_path), tmp_path / "out")


def test_a_commit_never_replaces_what_appeared_meanwhile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_pair("unified", tmp_path / "in")
    commit = Workplace.commit

    def late(self: Workplace, *arguments: Any) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("mine")
        commit(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Workplace, "commit", late)
        assert "appeared while its conversion was running" in complaint(capsys, source, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    assert convert(source, tmp_path / "out") == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_a_move_that_fails_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_pair("unified", tmp_path / "in")
    old = wholes(source, tmp_path)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "out":
            raise OSError(errno.EIO, "no luck")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        assert "run the command again, nothing is lost" in complaint(capsys, source, tmp_path / "out", "-q", "--force")
        place = tmp_path / ".out.partial"
        assert everything_in(place / "old-target") == old["out"]
    assert convert(source, tmp_path / "out", "-q", "--force") == 0
    assert not place.exists()
    assert everything_in(tmp_path / "out") != old["out"]


DRIVER = f"""
import sys
from mlx_mtp.convert import shards, stream
from mlx_mtp.convert.__main__ import main
shards.SHARD_BYTES, stream.CHUNK_BYTES = {SHARD_BYTES}, 2000
sys.exit(main(sys.argv[1:]))
"""


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    source = source_pair("dense", tmp_path / "in")
    new = wholes(source, tmp_path / "whole", "-q")
    work, generator, kills = tmp_path / "work", random.Random(), 0
    command = [sys.executable, "-c", DRIVER, "--hf-path", str(source), "--mlx-path", str(work / "out"), "-q",
               "--no-verify"]

    def fail(message: str) -> NoReturn:
        pytest.fail(f"{message} after {kills} kills")

    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and not (work / ".out.partial").exists():
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        _, complaints = process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode not in (-signal.SIGKILL, 0) and b"is there already" not in complaints:
            fail(complaints.decode())
    last = subprocess.run(command, capture_output=True, text=True, check=False)
    if last.returncode != 0 and "is there already" not in last.stderr:
        fail(last.stderr)
    for name, content in new.items():
        assert cut_off(everything_in(work / name)) == cut_off(content)
    assert kills > 0
