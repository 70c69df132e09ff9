"""A repository of the Hugging Face Hub -> a folder in the Hub client's cache, large files resumed and checked.

The client itself throws half a file away when it gives up, and a shard can be 50 GB. So large files are fetched here,
with the client's own HTTP function, into a partial file that the next run continues; they enter the cache only when
their hash is the Hub's. The client then fetches the small files and links all of them into the commit's folder.
"""

from __future__ import annotations

import hashlib
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mlx_mtp.checkpoint.hub import WANTED_FILES, client_errors, quiet_client
from mlx_mtp.errors import CheckpointError

CONVERTED_FILES = [*WANTED_FILES, "README.md"]  # whose licence the result's card passes on
PICKLES = frozenset((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"))
SHA256 = re.compile(r"[0-9a-f]{64}")
CHUNK = 2**22  # bytes read at once for a hash
AT_ONCE = 4  # files
LISTING_SECONDS = 10


class StoppedError(Exception):
    """Another file failed, or the user stopped the command: this one ends too, its partial file stays."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. size: bytes; sha256: of its content, for large files; blob_id: git's hash, for others."""

    path: str
    size: int
    sha256: str | None
    blob_id: str | None

    @property
    def hash(self) -> str:
        """The name of its blob in the cache."""
        return self.sha256 or self.blob_id or ""


@dataclass(frozen=True)
class Cache:
    """Where the client keeps a repository: blobs by their hashes, and for each commit a folder of links to them.

    links: whether the file system can; if not, the commit's folder holds the files themselves.
    """

    folder: Path
    commit: str
    links: bool

    def snapshot(self, file: RemoteFile) -> Path:
        return self.folder / "snapshots" / self.commit / file.path

    def blob(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / file.hash

    def partial(self, file: RemoteFile) -> Path:
        """What has arrived of a large file. The name is ours: what other programs begin may have holes."""
        return self.folder / "blobs" / f"{file.hash}.mlx-mtp.incomplete"

    def lock(self, file: RemoteFile) -> Path:
        """The client's own lock of that blob."""
        return self.folder.parent / ".locks" / self.folder.name / f"{file.hash}.lock"

    def holds(self, file: RemoteFile) -> bool:
        return any(path.is_file() and path.stat().st_size == file.size
                   for path in (self.snapshot(file), self.blob(file)))

    def delete(self, file: RemoteFile) -> None:
        for path in (self.snapshot(file), self.blob(file)):
            path.unlink(missing_ok=True)

    def arrived(self, file: RemoteFile) -> int:
        """Bytes of it that an earlier run left."""
        begun = self.partial(file)
        return min(begun.stat().st_size, file.size) if begun.is_file() else 0


class Meter:
    """What the client's download asks of a progress bar."""

    def __init__(self, advance: Callable[[int], None], **_: object) -> None:
        self.update = advance

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None: ...


def download(name: str, revision: str | None, show_progress: bool) -> Path:
    """The folder of the Hub's repository `name` in the client's cache; the folder's own name is the commit.

    Files that are there are not fetched again, and without a network a whole copy in the cache is enough. Every file
    that is fetched has the hash that the Hub gives for it. Raises CheckpointError: nothing of that name or revision,
    no access, no network and no copy, too little disk space, a damaged or broken-off download (run again, it goes
    on where it stopped), only pickled weights.
    """
    from huggingface_hub import snapshot_download

    with client_errors(name, revision):
        with quiet_client(show_bars=False):
            commit, files = listing(name, revision)
            if commit is None:
                return Path(snapshot_download(name, revision=revision, allow_patterns=CONVERTED_FILES,
                                              local_files_only=True))
            check_weights([file.path for file in files], name)
            cache = _cache(name, commit)
            missing = [file for file in files if _is_wanted(file) and not cache.holds(file)]
            _check_space(name, cache, missing)
            for file in missing:
                cache.delete(file)  # a file of the wrong size, which the client would take for whole
            large = [file for file in missing if _is_resumable(file)]
            if large:
                _fetch_all(name, cache, large, show_progress)
        others = [file for file in missing if file not in large]
        with quiet_client(show_progress and any(file.sha256 for file in others)):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=CONVERTED_FILES))
    if folder.name != commit:
        raise CheckpointError(f"{name} on the Hub was changed while it was downloaded: run the command again")
    for file in others:
        _check(name, cache, file, cache.snapshot(file), lambda _: None)
    return folder


def listing(name: str, revision: str | None) -> tuple[str | None, list[RemoteFile]]:
    """The commit and the files of a repository; None and none if only the client's cache can tell.

    Raises the client's errors, and CheckpointError where sizes or hashes are withheld.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=LISTING_SECONDS)
    except errors.RevisionNotFoundError:
        raise
    except Exception as error:  # the Hub is away or refuses: as for loading, a whole copy in the cache is enough
        try:
            snapshot_download(name, revision=revision, allow_patterns=CONVERTED_FILES, local_files_only=True)
        except errors.LocalEntryNotFoundError:
            if isinstance(error, errors.HfHubHTTPError):
                raise error from None
            raise
        return None, []
    files = []
    for sibling in info.siblings or ():
        size, sha256 = (sibling.lfs.size, sibling.lfs.sha256) if sibling.lfs else (sibling.size, None)
        if size is None or not (sha256 or sibling.blob_id):
            raise CheckpointError(f"{constants.ENDPOINT} gives no size or no hash of {sibling.rfilename} of {name}, so "
                                  "that it could not be checked: set HF_ENDPOINT to a Hub that does, or to none")
        files.append(RemoteFile(sibling.rfilename, size, sha256, sibling.blob_id))
    return info.sha, files


def check_weights(names: Iterable[str], where: str) -> None:
    """Raises CheckpointError if there are no safetensors among the files of `where`; pickles beside them do not matter.
    """
    suffixes = {name: Path(name).suffix.lower() for name in sorted(names)}
    if ".safetensors" in suffixes.values():
        return
    for name, suffix in suffixes.items():
        if suffix in PICKLES:
            raise CheckpointError(f"{where} has its weights in {name}, a pickle, and pickles are never read: expected "
                                  "*.safetensors; choose a repository or revision that has them")
    raise CheckpointError(f"{where} has no *.safetensors files: expected a Gemma 4 checkpoint")


def _cache(name: str, commit: str) -> Cache:
    from huggingface_hub import constants
    from huggingface_hub.file_download import are_symlinks_supported, repo_folder_name

    root = Path(constants.HF_HUB_CACHE)
    return Cache(root / repo_folder_name(repo_id=name, repo_type="model"), commit, are_symlinks_supported(root))


def _is_wanted(file: RemoteFile) -> bool:
    return any(fnmatch(file.path, pattern) for pattern in CONVERTED_FILES)


def _is_resumable(file: RemoteFile) -> bool:
    """Whether it is stored as a large file that plain HTTP may ask for; others are left to the client."""
    from huggingface_hub import constants

    return (file.sha256 is not None and SHA256.fullmatch(file.sha256) is not None
            and ".." not in Path(file.path).parts and file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE)


def _check_space(name: str, cache: Cache, missing: Sequence[RemoteFile]) -> None:
    needed = sum(file.size - cache.arrived(file) for file in missing)
    there = next(folder for folder in (cache.folder, *cache.folder.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise CheckpointError(f"downloading {name} needs {needed / 1e9:.1f} GB more in {cache.folder.parent}, "
                              f"which has {free / 1e9:.1f} GB: free some space, or set HF_HUB_CACHE to a folder on "
                              "another disk")


def _fetch_all(name: str, cache: Cache, files: Sequence[RemoteFile], show_progress: bool) -> None:
    """Fetches and checks large files, some at a time; the first error, or Ctrl-C, ends it at once.

    Its threads are daemons: one that waits for a dead connection must not hold up the end of the command. Wherever
    they are stopped, a partial file is the beginning of its file.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TimeRemainingColumn())
    size = sum(file.size for file in files)
    stop, left = threading.Event(), queue.SimpleQueue[RemoteFile]()
    ends = queue.SimpleQueue[Exception | None]()
    with Progress(*columns, console=console, disable=not (show_progress and console.is_terminal)) as bar:
        fetching = bar.add_task(f"downloading {name}", total=size, completed=sum(map(cache.arrived, files)))
        checking = bar.add_task("checking hashes", total=size)

        def advance(task: TaskID, count: int) -> None:
            if stop.is_set():
                raise StoppedError
            bar.advance(task, count)

        def work() -> None:
            while not stop.is_set():
                try:
                    _fetch(name, cache, left.get_nowait(), partial(advance, fetching), partial(advance, checking))
                    ends.put(None)
                except queue.Empty:
                    return
                except Exception as error:  # raised again below
                    ends.put(error)

        for file in files:
            left.put(file)
        for _ in range(AT_ONCE):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in files:
                if (error := ends.get()) is not None:
                    raise error
        finally:
            stop.set()


def _fetch(
    name: str, cache: Cache, file: RemoteFile, fetched: Callable[[int], None], checked: Callable[[int], None]
) -> None:
    """Continues the partial file of one large file to its end, checks it and gives it its place in the cache."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    begun, lock = cache.partial(file), cache.lock(file)
    place = cache.blob(file) if cache.links else cache.snapshot(file)
    for path in (begun, lock, place):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if place.is_file():  # another process was faster
            return
        if begun.is_file() and begun.stat().st_size > file.size:
            begun.unlink()
        with begun.open("ab") as content:
            # The repository's own address, not the one it leads to: that one is signed and expires.
            http_get(hf_hub_url(name, file.path, revision=cache.commit), content, resume_size=content.tell(),
                     headers=build_hf_headers(headers={"Accept-Encoding": "identity"}), expected_size=file.size,
                     displayed_filename=file.path, tqdm_class=cast(Any, partial(Meter, fetched)))
        _check(name, cache, file, begun, checked)
        begun.replace(place)


def _check(name: str, cache: Cache, file: RemoteFile, path: Path, advance: Callable[[int], None]) -> None:
    """Compares a fetched file with the Hub's hash of it: sha256 of a large file, git's hash of another."""
    if file.sha256 is not None:
        expected, digest = file.sha256, hashlib.sha256()
    elif file.blob_id is not None:
        expected, digest = file.blob_id, hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    else:
        return
    with path.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    if digest.hexdigest() != expected:
        path.resolve().unlink()
        cache.delete(file)
        raise CheckpointError(f"{file.path} of {name} arrived damaged (hash {digest.hexdigest()[:12]}…, expected "
                              f"{expected[:12]}…): it was deleted, run the command again")
