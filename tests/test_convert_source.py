"""Sources become folders: the real Hub client against a server that cuts, damages and refuses; folders; Kaggle."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_hub import COMMIT, GOLDEN, ROOT, FakeHub, ask, assert_is_copy, environment, serving, sha256

from mlx_mtp.convert.download import listing
from mlx_mtp.convert.source import Source, fetch, fetch_drafter
from mlx_mtp.errors import CheckpointError

IMPORTS = (
    "from huggingface_hub import constants\n"
    "from mlx_mtp.convert.source import Source, fetch, fetch_drafter\n"
    "constants.DOWNLOAD_CHUNK_SIZE = 1000  # it writes a file in such steps, by default 10 MB\n"
)
FETCH = "fetch('me/gem', None, True).folder"
BLOBS = "home/hub/models--me--gem/blobs"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with serving(tmp_path / "served") as fake:
        yield fake


def fetched(tmp_path: Path, hub: FakeHub, *expressions: str, prepare: str = "", **settings: str) -> list[str | None]:
    return ask(tmp_path, hub, *expressions or [FETCH], prepare=IMPORTS + prepare, **settings)


def shard_size(hub: FakeHub) -> int:
    return (hub.repositories["me/gem"] / "model.safetensors").stat().st_size


def assert_whole(tmp_path: Path, hub: FakeHub, folder: str | None) -> None:
    """The folder is a copy without pickles, and nothing partial is left in the cache."""
    assert_is_copy(folder, hub.repositories["me/gem"], "pytorch_model.bin")
    assert not any(request.startswith("GET") and "pytorch_model" in request for request in hub.requests)
    blobs = {file.name for file in (tmp_path / BLOBS).iterdir()}
    assert sha256(hub.repositories["me/gem"] / "model.safetensors") in blobs
    assert not {name for name in blobs if "." in name}


@pytest.mark.parametrize("transfer", ["xet", "http"])
def test_a_source_and_its_drafter_come_from_the_hub_with_their_commit(
    transfer: str, tmp_path: Path, hub: FakeHub
) -> None:
    """Where the Hub offers its own transfer and the client could use it, and where it could not."""
    hub.has_xet = True
    settings = {"HF_HUB_DISABLE_XET": "0" if transfer == "xet" else "1", "HF_TOKEN": "hf_secret"}
    source = "fetch('me/gem', 'main', True)"
    folder, revision, name, drafter, by_commit = fetched(
        tmp_path, hub, FETCH, f"{source}.revision", f"{source}.name", f"fetch_drafter({source}, True).folder",
        f"fetch('me/gem', '{COMMIT}', True).folder", **settings)
    assert_whole(tmp_path, hub, folder)
    assert (revision, name, by_commit) == (COMMIT, "me/gem", folder)
    assert_is_copy(drafter, hub.repositories["me/gem-assistant"])
    assert hub.ranges == [("model.safetensors", None)] * 2  # each once: a second fetch finds it in the cache
    assert hub.tokens == {"hub": {"Bearer hf_secret"}, "storage": {None}}  # the token does not leave the Hub


def test_a_connection_cut_in_the_middle_of_a_shard_is_resumed_where_it_broke(tmp_path: Path, hub: FakeHub) -> None:
    hub.cuts["model.safetensors"] = [100_000, 50_000]
    assert_whole(tmp_path, hub, fetched(tmp_path, hub)[0])
    assert [asked for _, asked in hub.ranges] == [None, "bytes=100000-", "bytes=150000-"]


def test_the_next_run_asks_only_for_the_rest_of_a_shard(tmp_path: Path, hub: FakeHub) -> None:
    """The client alone deletes what arrived of a shard when it gives up."""
    hub.cuts["model.safetensors"] = [100_000, *[0] * 5]
    answer, = fetched(tmp_path, hub)
    assert answer is not None
    assert answer.startswith("CheckpointError: downloading me/gem from the Hub failed: ")
    assert answer.endswith("run the command again, finished files are kept")
    assert [asked for _, asked in hub.ranges] == [None, *["bytes=100000-"] * 5]
    assert not list((tmp_path / BLOBS).parent.glob("snapshots/*/model.safetensors"))

    hub.ranges.clear()
    hub.cuts.clear()
    assert_whole(tmp_path, hub, fetched(tmp_path, hub)[0])
    assert hub.ranges == [("model.safetensors", "bytes=100000-")]


def test_ctrl_c_ends_a_download_that_hangs_and_keeps_what_has_arrived(tmp_path: Path, hub: FakeHub) -> None:
    hub.stalls, hub.cuts["model.safetensors"] = True, [100_000]
    with subprocess.Popen([sys.executable, "-c", f"{IMPORTS}fetch('me/gem', None, True)"], cwd=ROOT,
                          env=environment(tmp_path, hub), stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 20
        while time.monotonic() < until and not any(
                file.stat().st_size > 90_000 for file in tmp_path.glob(f"{BLOBS}/*.incomplete")):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=5)
    assert said.endswith("KeyboardInterrupt\n")
    hub.ranges.clear()
    assert_whole(tmp_path, hub, fetched(tmp_path, hub)[0])
    (_, asked), = hub.ranges
    assert asked is not None
    assert 90_000 < int(asked.removeprefix("bytes=").removesuffix("-")) <= 100_000


def test_what_another_run_left_beyond_the_end_is_not_continued(tmp_path: Path, hub: FakeHub) -> None:
    partial = tmp_path / BLOBS / f"{sha256(hub.repositories['me/gem'] / 'model.safetensors')}.mlx-mtp.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(shard_size(hub) + 1))
    assert_whole(tmp_path, hub, fetched(tmp_path, hub)[0])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_of_the_right_length_is_deleted_and_fetched_again(
    name: str, tmp_path: Path, hub: FakeHub
) -> None:
    hub.damaged = {name}
    answer, = fetched(tmp_path, hub)
    assert answer is not None
    assert answer.startswith(f"CheckpointError: {name} of me/gem arrived damaged (hash ")
    assert answer.endswith("it was deleted, run the command again")
    assert not list(tmp_path.glob(f"home/hub/**/snapshots/*/{name}"))
    hub.damaged.clear()
    assert_whole(tmp_path, hub, fetched(tmp_path, hub)[0])


def test_a_file_that_shrank_in_the_cache_is_fetched_again(tmp_path: Path, hub: FakeHub) -> None:
    folder, = fetched(tmp_path, hub)
    with (Path(folder or "") / "model.safetensors").open("r+b") as content:
        content.truncate(1000)
    assert_whole(tmp_path, hub, fetched(tmp_path, hub)[0])


def test_without_links_the_cache_still_holds_a_shard_once(tmp_path: Path, hub: FakeHub) -> None:
    settings = {"HF_HUB_DISABLE_SYMLINKS": "1"}
    folder, again = fetched(tmp_path, hub, FETCH, FETCH, **settings)
    assert_is_copy(folder, hub.repositories["me/gem"], "pytorch_model.bin")
    assert again == folder
    assert [file.name for file in tmp_path.glob("home/**/*") if file.is_file()
            and file.stat().st_size == shard_size(hub)] == ["model.safetensors"]


def test_too_little_disk_space_is_said_before_anything_is_fetched(tmp_path: Path, hub: FakeHub) -> None:
    small = ("import shutil\nfrom types import SimpleNamespace\n"
             "shutil.disk_usage = lambda path: SimpleNamespace(free={free})\n")
    files = (file for file in hub.repositories["me/gem"].iterdir() if file.suffix != ".bin")
    needed = sum(file.stat().st_size for file in files)
    answer, = fetched(tmp_path, hub, prepare=small.format(free=needed - 1))
    assert answer == (f"CheckpointError: downloading me/gem needs 0.0 GB more in {tmp_path / 'home/hub'}, which has "
                      "0.0 GB: free some space, or set HF_HUB_CACHE to a folder on another disk")
    assert not any("resolve" in request for request in hub.requests)

    hub.cuts["model.safetensors"] = [100_000, *[0] * 5]  # what has arrived is not needed again
    broken, = fetched(tmp_path, hub, prepare=small.format(free=needed))
    assert "failed" in (broken or "")
    hub.cuts.clear()
    small_files = needed - shard_size(hub)
    assert_whole(tmp_path, hub, fetched(
        tmp_path, hub, prepare=small.format(free=small_files + shard_size(hub) - 100_000))[0])


def test_a_disk_that_fills_up_while_downloading_is_one_line(tmp_path: Path, hub: FakeHub) -> None:
    full = ("import errno\nimport huggingface_hub.file_download as client\n"
            "def http_get(*_, **__): raise OSError(errno.ENOSPC, 'No space left on device')\n"
            "client.http_get = http_get\n")
    answer, = fetched(tmp_path, hub, prepare=full)
    assert answer == (f"CheckpointError: downloading me/gem filled the disk of {tmp_path / 'home/hub'}: free some "
                      "space, or set HF_HUB_CACHE to a folder on another disk, and run the command again")


def test_what_the_hub_refuses_is_one_line(tmp_path: Path, hub: FakeHub) -> None:
    hub.refusals = {"me/gated": (403, "GatedRepo"), "me/login": (401, "GatedRepo"), "me/token": (401, ""),
                    "me/down": (503, ""), "me/gem-assistant": (403, "GatedRepo")}
    refs = (tmp_path / BLOBS).with_name("refs")
    unknown, gated, login, token, down, drafter, _, revision = fetched(tmp_path, hub, *(
        f"fetch('{name}', None, True)" for name in ("me/unknown", "me/gated", "me/login", "me/token", "me/down")),
        "fetch_drafter(fetch('me/gem', None, True), True)",
        f"Path({str(refs / 'v9')!r}).write_text('{COMMIT}')",  # the cache knew a revision that the Hub has no more
        "fetch('me/gem', 'v9', True)")
    assert unknown == ("CheckpointError: no folder me/unknown here and no such repository on the Hub (or it is "
                       "private: run `hf auth login`)")
    assert gated == ("CheckpointError: me/gated on the Hub is gated: accept its licence on its page there, then run "
                     "`hf auth login`")
    assert login == gated.replace("me/gated", "me/login")
    assert drafter == gated.replace("me/gated", "me/gem-assistant")
    assert token == ("CheckpointError: the Hub refuses access to me/token (401): run `hf auth login` with an account "
                     "that may read it")
    assert (down or "").startswith("CheckpointError: downloading me/down from the Hub failed: ")
    assert "\n" not in (down or "")
    assert revision == "CheckpointError: me/gem on the Hub has no revision 'v9'"


def test_a_hub_that_gives_no_hashes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, lfs, blob_id in ((None, None, "ab"), (9, None, None), (9, SimpleNamespace(size=9, sha256=""), None)):
        sibling = SimpleNamespace(rfilename="model.safetensors", size=size, lfs=lfs, blob_id=blob_id)
        answer = SimpleNamespace(sha=COMMIT, siblings=[sibling])
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, answer=answer, **__: answer)
        with pytest.raises(CheckpointError, match=r"gives no size or no hash of model\.safetensors of me/gem"):
            listing("me/gem", None)


def test_without_network_a_whole_copy_is_enough_and_a_part_is_not(tmp_path: Path, hub: FakeHub) -> None:
    hub.cuts["model.safetensors"] = [100_000, *[0] * 5]
    fetched(tmp_path, hub)
    without = ("CheckpointError: no folder me/gem here, it is not in the Hub's cache, and the Hub cannot be reached; "
               "check the network (or HF_HUB_OFFLINE) and try again")
    assert fetched(tmp_path, hub, HF_HUB_OFFLINE="1") == [without]
    hub.cuts.clear()
    folder, nobody = fetched(tmp_path, hub, FETCH, "fetch_drafter(Source('me/other', None, 'commit'), True)")
    assert nobody is None

    hub.server.server_close()
    drafter = "fetch_drafter(fetch('me/gem', None, True), True)"
    again, revision, missing = fetched(tmp_path, hub, FETCH, "fetch('me/gem', None, True).revision", drafter)
    assert (again, revision) == (folder, COMMIT)
    assert missing == ("CheckpointError: the Hub cannot be asked for the drafter of me/gem, and its cache has none: "
                       "check the network (or HF_HUB_OFFLINE), or convert the target alone with --no-draft")


def test_a_repository_or_folder_of_pickles_is_refused_by_the_name_of_one(tmp_path: Path, hub: FakeHub) -> None:
    (hub.repositories["me/gem"] / "model.safetensors").unlink()
    answer, = fetched(tmp_path, hub)
    assert answer == ("CheckpointError: me/gem has its weights in pytorch_model.bin, a pickle, and pickles are never "
                      "read: expected *.safetensors; choose a repository or revision that has them")
    assert not any("resolve" in request for request in hub.requests)
    folder = hub.repositories["me/gem"]
    with pytest.raises(CheckpointError, match=r"gem has its weights in pytorch_model\.bin, a pickle"):
        fetch(str(folder), None, False)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"gem has no \*\.safetensors files"):
        fetch(str(folder), None, False)


def test_a_folder_is_its_own_source_and_its_drafter_lies_beside_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "target", tmp_path / "gem-bf16"))
    (folder / "pytorch_model.bin").write_bytes(b"ignored")
    source = fetch(str(folder), None, False)
    assert source == Source(str(folder), folder, None)
    assert fetch_drafter(source, False) is None
    drafter = Path(shutil.copytree(GOLDEN / "assistant", tmp_path / "gem-assistant"))
    assert fetch_drafter(source, False) == Source(str(drafter), drafter, None)
    with pytest.raises(CheckpointError, match=r"revision 'main' was given for .* only the Hub's repositories have"):
        fetch(str(folder), "main", False)


@pytest.mark.parametrize("name", ["", "no/such/folder", "~/nothing-of-this-name"])
def test_a_name_that_is_neither_folder_nor_repository_is_one_line(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"name of a checkpoint is empty|not a Hub name either"):
        fetch(name, None, False)


class FakeKaggle(SimpleNamespace):
    """Stands in for the module kagglehub: knows one handle, fails for any other."""

    def model_download(self, handle: str) -> str:
        if handle != "google/gemma/transformers/e2b/2":
            raise ValueError(f"404 Client Error.\n\nResource not found: {handle}")
        return str(self.folder)


def test_a_kaggle_handle_is_downloaded_by_kagglehub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(GOLDEN / "target", tmp_path / "2"))
    shutil.copytree(GOLDEN / "assistant", tmp_path / "2-assistant")
    monkeypatch.setitem(sys.modules, "kagglehub", FakeKaggle(folder=folder))
    source = fetch("kaggle:google/gemma/transformers/e2b/2", None, False)
    assert source == Source("kaggle:google/gemma/transformers/e2b/2", folder, None)
    assert fetch_drafter(source, False) is None
    with pytest.raises(CheckpointError, match=r"kaggle:a/b/c/d failed: 404 Client Error\.; check the handle"):
        fetch("kaggle:a/b/c/d", None, False)
    with pytest.raises(CheckpointError, match="kaggle:a/b is not a Kaggle model: expected kaggle:owner/model/"):
        fetch("kaggle:a/b", None, False)
    with pytest.raises(CheckpointError, match=r"leave it out .a Kaggle version stands at the end of the handle"):
        fetch("kaggle:a/b/c/d", "2", False)
    (folder / "model.safetensors").rename(folder / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"has its weights in model\.ckpt, a pickle"):
        fetch("kaggle:google/gemma/transformers/e2b/2", None, False)


def test_a_kaggle_handle_without_kagglehub_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(CheckpointError, match=r"^kaggle:a/b/c/d needs kagglehub, .* the extra `mlx-mtp\[kaggle\]`$"):
        fetch("kaggle:a/b/c/d", None, False)
