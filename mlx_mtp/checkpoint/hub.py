"""A name or a path -> a local folder, downloading from the Hugging Face Hub where it must."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_mtp.errors import CheckpointError

WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
PRECISION_SUFFIX = re.compile(r"[-_](\d+bit|bf16|fp16|mxfp4|mxfp8|nvfp4)$", re.IGNORECASE)


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `name` itself if it is one, else the Hub's repository of that name, downloaded.

    Files already in the Hub's cache are not fetched again, and without a network the cache is enough.
    Raises CheckpointError if there is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; expected a folder with config.json and *.safetensors")
    if not HUB_NAME.fullmatch(str(name)):
        raise CheckpointError(f"no folder {path}, and it is not a Hub name either (those look like owner/name)")
    return _download(str(name), revision)


def _download(name: str, revision: str | None) -> Path:
    # Imported here, since local checkpoints need neither its time nor its dependencies.
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED_FILES))
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{name} on the Hub is gated: accept its licence on its page there, then run "
                              "`hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"no folder {name} here and no such repository on the Hub (or it is private: "
                              "run `hf auth login`)") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name} on the Hub has no revision {revision!r}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(f"no folder {name} here, it is not in the Hub's cache, and the Hub cannot be reached; "
                              "check the network (or HF_HUB_OFFLINE) and try again") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"downloading {name} from the Hub failed: {reason}; run the command again, "
                              "finished files are kept") from error


def find_drafter(name: str | Path) -> Path | None:
    """The drafter that belongs to a target: `<name>-assistant`, beside the target's folder or on the Hub.

    A precision in the target's name ("-4bit", "-bf16") may be missing in the drafter's. None if there is no such.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        folder = path.resolve()
        for stem in _stems(folder.name):
            candidate = folder.parent / f"{stem}-assistant"
            if candidate.is_dir():
                return candidate
        return None
    for stem in _stems(str(name)):
        try:
            return local_folder(f"{stem}-assistant")
        except CheckpointError:
            continue
    return None


def _stems(name: str) -> list[str]:
    return list(dict.fromkeys([name, PRECISION_SUFFIX.sub("", name)]))
