"""What is converted: a folder, a repository of the Hub or a Kaggle model -> a folder of safetensors on this disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mlx_mtp.checkpoint.hub import (
    HUB_NAME,
    NotThereError,
    UnreachableError,
    drafter_names,
    find_drafter,
    first_line,
    local_folder,
)
from mlx_mtp.convert.download import check_weights, download
from mlx_mtp.errors import CheckpointError

KAGGLE = "kaggle:"


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert. name: as the user gave it; revision: the commit, if it came from the Hub."""

    name: str
    folder: Path
    revision: str | None


def fetch(name: str, revision: str | None, show_progress: bool) -> Source:
    """The source of that name: a folder, else a repository of the Hub, downloaded; `kaggle:<handle>` a Kaggle model.

    show_progress: bars on stderr while downloading, if that is a terminal. Raises CheckpointError, see `download`.
    """
    is_kaggle = name.startswith(KAGGLE)
    if is_kaggle or not HUB_NAME.fullmatch(name) or os.path.exists(os.path.expanduser(name)):
        if revision is not None:
            raise CheckpointError(f"revision {revision!r} was given for {name}, but only the Hub's repositories have "
                                  "revisions: leave it out" + (" (a Kaggle version stands at the end of the handle)"
                                                               if is_kaggle else ""))
        folder = _from_kaggle(name.removeprefix(KAGGLE)) if is_kaggle else local_folder(name)
        check_weights((file.name for file in folder.iterdir()), str(folder))
        return Source(name, folder, None)
    folder = download(name, revision, show_progress)
    return Source(name, folder, folder.name)


def fetch_drafter(source: Source, show_progress: bool) -> Source | None:
    """The drafter that belongs to a source by its name, fetched: `<name>-assistant` beside its folder or on the Hub.

    None if there is no such, and for Kaggle models, whose handles have no such rule. Raises CheckpointError if it is
    there but cannot be had, and if the Hub cannot be asked.
    """
    if source.name.startswith(KAGGLE):
        return None
    if source.revision is None:
        folder = find_drafter(source.name)
        if folder is not None:
            check_weights((file.name for file in folder.iterdir()), str(folder))
        return None if folder is None else Source(str(folder), folder, None)
    unreachable: UnreachableError | None = None
    for name in drafter_names(source.name):
        try:
            folder = download(name, None, show_progress)
        except UnreachableError as error:
            unreachable = error
        except NotThereError:
            continue
        else:
            return Source(name, folder, folder.name)
    if unreachable is not None:
        raise CheckpointError(f"the Hub cannot be asked for the drafter of {source.name}, and its cache has none: "
                              "check the network (or HF_HUB_OFFLINE), or convert the target alone with --no-draft"
                              ) from unreachable
    return None


def _from_kaggle(handle: str) -> Path:
    """Downloads a Kaggle model into kagglehub's cache, which resumes and checks by itself."""
    try:
        import kagglehub
    except ImportError as error:
        raise CheckpointError(f"{KAGGLE}{handle} needs kagglehub, which is not installed: install the extra "
                              "`mlx-mtp[kaggle]`") from error
    if len(handle.split("/")) not in (4, 5):
        raise CheckpointError(f"{KAGGLE}{handle} is not a Kaggle model: expected "
                              "kaggle:owner/model/framework/variation, with /version or without")
    try:
        return Path(kagglehub.model_download(handle))
    except Exception as error:  # its own errors, those of its HTTP library and of the disk have no base in common
        raise CheckpointError(f"downloading {KAGGLE}{handle} failed: {first_line(error)}; check the handle and the "
                              "network, accept the model's licence on its page, and log in with "
                              "`kagglehub.login()`") from error
