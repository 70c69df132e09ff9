"""A folder is uploaded by the real Hub client to a server that speaks the Hub's protocol (plain LFS, without xet)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import GOLDEN, FakeHub, ask, serving

IMPORTS = "from mlx_mtp.convert.upload import check_upload, upload\n"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with serving(tmp_path / "served") as fake:
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    output = Path(shutil.copytree(GOLDEN / "target", tmp_path / "gem-4bit"))
    (output / "README.md").write_text("---\nlibrary_name: mlx\n---\n# A card\n")
    return output


def test_every_file_of_the_folder_arrives_and_the_address_is_returned(
    tmp_path: Path, hub: FakeHub, folder: Path
) -> None:
    call = f"upload(Path({str(folder)!r}), 'me/gem-4bit')"
    address, = ask(tmp_path, hub, call, prepare=IMPORTS, HF_TOKEN="hf_secret")
    assert address == f"{hub.address}/me/gem-4bit"
    assert hub.uploads == {"me/gem-4bit": {file.name: file.read_bytes() for file in folder.iterdir()}}
    assert hub.tokens["hub"] == {"Bearer hf_secret"}


def test_without_a_login_nothing_is_sent(tmp_path: Path, hub: FakeHub, folder: Path) -> None:
    calls = (f"upload(Path({str(folder)!r}), 'me/gem-4bit')", "check_upload('me/gem-4bit')", "check_upload('gem-4bit')",
             "check_upload('me/gem..4bit')", f"check_upload('me/{'x' * 100}')")
    sent, checked, name, *others = ask(tmp_path, hub, *calls, prepare=IMPORTS)
    assert sent == checked == ("CheckpointError: uploading to me/gem-4bit needs a login: run `hf auth login` with a "
                               "token that may write")
    assert name == "CheckpointError: 'gem-4bit' is not the name of a repository on the Hub: expected owner/name"
    assert all("is not the name of a repository on the Hub" in str(other) for other in others)
    assert not hub.requests


def test_a_refused_or_broken_upload_is_one_line(tmp_path: Path, hub: FakeHub, folder: Path) -> None:
    hub.refusals = {"me/mine": (403, ""), "me/down": (500, "")}
    refused, down = ask(tmp_path, hub, *(f"upload(Path({str(folder)!r}), '{name}')" for name in ("me/mine", "me/down")),
                        prepare=IMPORTS, HF_TOKEN="hf_secret")
    assert refused == ("CheckpointError: the Hub refuses to write to me/mine (403): run `hf auth login` with a token "
                       "that may write there")
    hub.server.server_close()
    away, = ask(tmp_path, hub, f"upload(Path({str(folder)!r}), 'me/gem-4bit')", prepare=IMPORTS, HF_TOKEN="hf_secret")
    for answer, name in ((down, "me/down"), (away, "me/gem-4bit")):
        assert answer is not None
        assert answer.startswith(f"CheckpointError: uploading {folder} to {name} failed: ")
        assert answer.endswith(f"; the folder is whole, send it later with `hf upload {name} {folder}`")
        assert "\n" not in answer
    assert not hub.uploads.get("me/mine")
