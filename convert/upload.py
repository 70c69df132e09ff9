"""A finished folder -> a repository of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from mlx_mtp.checkpoint.hub import HUB_NAME, first_line, quiet_client
from mlx_mtp.errors import CheckpointError


def check_upload(repository: str) -> None:
    """Raises CheckpointError for what can be known before a conversion: a wrong name, nobody logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        is_name = HUB_NAME.fullmatch(repository) is not None
    except HFValidationError:
        is_name = False
    if not is_name:
        raise CheckpointError(f"{repository!r} is not the name of a repository on the Hub: expected owner/name")
    if get_token() is None:
        raise CheckpointError(f"uploading to {repository} needs a login: run `hf auth login` with a token that may "
                              "write")


def upload(folder: Path, repository: str) -> str:
    """Uploads every file of `folder`, creating the repository if it is not there; returns its address.

    The client commits as it goes: after an interruption the same call sends only what is missing. Raises
    CheckpointError.
    """
    from huggingface_hub import HfApi, errors

    check_upload(repository)
    api = HfApi()
    try:
        with quiet_client():
            address = api.create_repo(repository, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload the converted checkpoint")
    except Exception as error:  # the client's own errors, its HTTP library's and the disk's have no base in common
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403, 404):
            raise CheckpointError(f"the Hub refuses to write to {repository} ({error.response.status_code}): run "
                                  "`hf auth login` with a token that may write there") from error
        raise CheckpointError(f"uploading {folder} to {repository} failed: {first_line(error)}; the folder is whole, "
                              f"send it later with `hf upload {repository} {folder}`") from error
    return str(address)
