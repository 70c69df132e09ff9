"""A name or a path -> a local folder, downloading from the Hugging Face Hub where it must."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_mtp.errors import CheckpointError

WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_SNAPSHOT = re.compile(r"/models--([\w.-]+--[\w.-]+)/snapshots/\w+$")  # a folder of the Hub's cache
PRECISION_SUFFIX = re.compile(r"([-_]UD)?([-_]MLX)?[-_](\d+bit|bf16|fp16|mxfp4|mxfp8|nvfp4)$", re.IGNORECASE)
PUBLISHED = re.compile(r"gemma-4-(?P<size>E2B|E4B|12B|26B-A4B|31B)-it(?P<qat>-qat)?(?![a-z0-9])", re.IGNORECASE)
QAT = "-qat-q4_0-unquantized"  # how Google names what was trained for 4 bits


class NotThereError(CheckpointError):
    """Neither a folder nor anything on the Hub that can be reached has this name."""


class UnreachableError(NotThereError):
    """The Hub cannot be asked, and its cache does not have it."""


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `name` itself if it is one, else the Hub's repository of that name, downloaded.

    Files already in the Hub's cache are not fetched again, and without a network the cache is enough.
    Raises CheckpointError if there is neither.
    """
    if not str(name).strip():  # as a path it would be the working directory
        raise CheckpointError("the name of a checkpoint is empty: expected a folder or a Hub name (owner/name)")
    path = Path(os.path.expanduser(name))  # pathlib's raises for ~nobody, and its is_dir for a name that is too long
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise CheckpointError(f"{path} is a file; expected a folder with config.json and *.safetensors")
    if not HUB_NAME.fullmatch(str(name)):
        raise CheckpointError(f"no folder {path}, and it is not a Hub name either (those look like owner/name): "
                              "check the path")
    return _download(str(name), revision)


def _download(name: str, revision: str | None) -> Path:
    # Imported here, since local checkpoints need neither its time nor its dependencies.
    from huggingface_hub import snapshot_download

    with client_errors(name, revision), quiet_client():
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED_FILES))


@contextmanager
def quiet_client(show_bars: bool = True) -> Iterator[None]:
    """Keeps the client's log lines from between our own, and its progress bars from where stderr is no terminal."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    verbosity = get_verbosity()
    set_verbosity(logging.ERROR)
    hide = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    hide = hide and not (show_bars and sys.stderr.isatty())
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        set_verbosity(verbosity)
        if hide:
            enable_progress_bars()


@contextmanager
def client_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turns what the Hub's client raises while `name` is downloaded into a CheckpointError of one line."""
    from huggingface_hub import constants, errors

    try:
        yield
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{name} on the Hub is gated: accept its licence on its page there, then run "
                              "`hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise NotThereError(f"no folder {name} here and no such repository on the Hub (or it is private: "
                            "run `hf auth login`)") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name} on the Hub has no revision {revision!r}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UnreachableError(f"no folder {name} here, it is not in the Hub's cache, and the Hub cannot be reached; "
                               "check the network (or HF_HUB_OFFLINE) and try again") from error
    except Exception as error:  # the client's own errors, its HTTP library's and the disk's have no base in common
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
            raise CheckpointError(f"the Hub refuses access to {name} ({error.response.status_code}): run "
                                  "`hf auth login` with an account that may read it") from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"downloading {name} filled the disk of {constants.HF_HUB_CACHE}: free some space, "
                                  "or set HF_HUB_CACHE to a folder on another disk, and run the command again"
                                  ) from error
        raise CheckpointError(f"downloading {name} from the Hub failed: {first_line(error)}; run the command again, "
                              "finished files are kept") from error


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, as far as it fits one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def find_drafter(name: str | Path) -> Path | None:
    """The drafter that belongs to a target: `<name>-assistant`, beside the target's folder or on the Hub.

    A precision in the target's name ("-4bit", "-MLX-bf16") may be missing in the drafter's, or be at its end instead.
    None if there is no such. Raises CheckpointError if there is one that cannot be had (gated, broken off).
    """
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        folder = Path(os.path.abspath(path))  # not resolved: a link counts under its own name
        candidates = (folder.with_name(drafter) for drafter in drafter_names(folder.name))
        return next((candidate for candidate in candidates if os.path.isdir(candidate)), None)
    for drafter in drafter_names(str(name)):
        try:
            return local_folder(drafter)
        except NotThereError:
            continue
    return None


def published_drafter(name: str | Path) -> Path | None:
    """A likely drafter for a target that `find_drafter` finds none for; whether it fits is for the caller to check.

    For a snapshot in the Hub's cache it is that of its repository, for anybody's conversion of Gemma 4 Google's own.
    None if there is no such, or if it cannot be had: nobody has asked for it by name.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        cached = HUB_SNAPSHOT.search(Path(os.path.abspath(path)).as_posix())
        if cached is None:
            return None
        repository = cached[1].replace("--", "/", 1)
        names = drafter_names(repository)
    else:
        repository, names = str(name), []
    model = PRECISION_SUFFIX.sub("", repository).rpartition("/")[2]
    if model.lower().startswith("gemma-4-"):
        names.append(f"google/gemma-4-{model[len('gemma-4-'):]}-assistant")
    if (known := PUBLISHED.search(model)) is not None:  # whatever a converter added: -OptiQ, -DWQ, ...
        size, is_qat = known["size"].upper(), known["qat"] is not None
        names += [f"google/gemma-4-{size}-it{kind}-assistant" for kind in ([QAT] if is_qat else []) + [""]]
    for drafter in dict.fromkeys(names):
        with suppress(CheckpointError):
            return local_folder(drafter)
    return None


def drafter_names(name: str) -> list[str]:
    """What the drafter of the target `name` may be called, the likeliest first.

    "X-4bit" -> X-4bit-assistant, X-assistant, X-assistant-4bit, X-assistant-bf16.
    """
    stem = PRECISION_SUFFIX.sub("", name)
    return list(dict.fromkeys([
        f"{name}-assistant", f"{stem}-assistant", f"{stem}-assistant{name[len(stem):]}", f"{stem}-assistant-bf16",
    ]))
