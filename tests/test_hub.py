"""Names become folders through the real Hub client, against a server of our own that speaks the Hub's protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, ask, assert_is_copy, serving

from mlx_mtp.checkpoint.hub import drafter_names, local_folder
from mlx_mtp.errors import CheckpointError


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with serving(tmp_path / "served") as fake:
        yield fake


def test_a_name_is_downloaded_once_and_then_found_without_network(tmp_path: Path, hub: FakeHub) -> None:
    both = "local_folder('me/gem')", "find_drafter('me/gem')"
    target, drafter, *again = ask(tmp_path, hub, *both, *both)
    assert_is_copy(target, hub.repositories["me/gem"], "pytorch_model.bin")
    assert_is_copy(drafter, hub.repositories["me/gem-assistant"])
    assert again == [target, drafter]
    downloads = [request for request in hub.requests if request.startswith("GET") and "resolve" in request]
    assert len(downloads) == len(set(downloads))
    assert not any("pytorch_model.bin" in download for download in downloads)

    hub.requests.clear()
    assert ask(tmp_path, hub, *both, HF_HUB_OFFLINE="1") == [target, drafter]
    assert not hub.requests

    hub.server.server_close()
    assert ask(tmp_path, hub, *both) == [target, drafter]


def test_the_drafter_of_a_quantized_target_may_have_its_name_without_the_precision(
    tmp_path: Path, hub: FakeHub
) -> None:
    assert drafter_names("me/gem-4bit") == [
        "me/gem-4bit-assistant", "me/gem-assistant", "me/gem-assistant-4bit", "me/gem-assistant-bf16"]
    assert drafter_names("me/gem") == ["me/gem-assistant", "me/gem-assistant-bf16"]
    assert drafter_names("me/X-UD-MLX-4bit")[1:] == [
        "me/X-assistant", "me/X-assistant-UD-MLX-4bit", "me/X-assistant-bf16"]
    found = ask(tmp_path, hub, "find_drafter('me/gem-4bit')", "find_drafter('me/other')")
    assert_is_copy(found[0], hub.repositories["me/gem-assistant"])
    assert found[1] is None


def test_a_snapshot_in_the_hubs_cache_has_its_repositorys_drafter_and_a_conversion_googles(
    tmp_path: Path, hub: FakeHub
) -> None:
    hub.repositories["google/gemma-4-X-assistant"] = hub.repositories["me/gem-assistant"]
    hub.refusals["google/gemma-4-Y-assistant"] = (403, "GatedRepo")
    names = ("local_folder('me/gem')", "'you/Gemma-4-X-MLX-4bit'", "'you/gemma-4-Y'", "'me/gem-4bit'",
             "local_folder('me/gem-assistant')")
    found = ask(tmp_path, hub, *(f"published_drafter({name})" for name in names))
    for drafter in found[:2]:
        assert_is_copy(drafter, hub.repositories["me/gem-assistant"])
    assert found[2:] == [None] * 3


def test_whatever_a_converter_appended_the_drafter_of_a_published_model_is_googles(
    tmp_path: Path, hub: FakeHub
) -> None:
    for name in ("E4B-it", "26B-A4B-it", "26B-A4B-it-qat-q4_0-unquantized", "12B-it"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "name.json").write_text(json.dumps(name))
        hub.repositories[f"google/gemma-4-{name}-assistant"] = folder
    expected = {
        "you/gemma-4-e4b-it-OptiQ-4bit": "E4B-it", "you/gemma-4-26B-A4B-it-4bit-DWQ": "26B-A4B-it",
        "you/gemma-4-26B-A4B-it-QAT-MLX-4bit": "26B-A4B-it-qat-q4_0-unquantized",
        "you/gemma-4-12b-it-qat-OptiQ-4bit": "12B-it", "you/gemma-4-E4B-4bit": None, "you/gemma-4-E4B-italian": None}
    found = ask(tmp_path, hub, *(f"published_drafter({name!r})" for name in expected))
    names = [None if folder is None else json.loads((Path(folder) / "name.json").read_text()) for folder in found]
    assert names == list(expected.values())


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_working_directory(name: str) -> None:
    with pytest.raises(CheckpointError, match="the name of a checkpoint is empty: expected a folder or a Hub name"):
        local_folder(name)


def test_what_the_hub_refuses_is_said_in_one_line(tmp_path: Path, hub: FakeHub) -> None:
    hub.refusals = {"me/gated": (403, "GatedRepo"), "me/login": (401, "GatedRepo"), "me/private": (401, "RepoNotFound"),
                    "me/token": (401, "")}
    hub.refusals["me/unknown-assistant"] = (403, "GatedRepo")
    unknown, gated, login, private, token, deeper, drafter = ask(
        tmp_path, hub, "local_folder('me/unknown')", "local_folder('me/gated')", "local_folder('me/login')",
        "local_folder('me/private')", "local_folder('me/token')", "local_folder('me/gem/deeper')",
        "find_drafter('me/unknown')")
    assert unknown == ("CheckpointError: no folder me/unknown here and no such repository on the Hub (or it is "
                       "private: run `hf auth login`)")
    assert login == gated.replace("me/gated", "me/login")
    assert gated == ("CheckpointError: me/gated on the Hub is gated: accept its licence on its page there, then run "
                     "`hf auth login`")
    assert private == unknown.replace("me/unknown", "me/private")
    assert drafter == gated.replace("me/gated", "me/unknown-assistant")
    assert token == ("CheckpointError: the Hub refuses access to me/token (401): run `hf auth login` with an account "
                     "that may read it")
    assert deeper.startswith("CheckpointError: no folder me/gem/deeper, and it is not a Hub name either")


def test_without_network_and_without_a_copy_the_network_is_named(tmp_path: Path, hub: FakeHub) -> None:
    hub.server.server_close()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        answer, drafter = ask(tmp_path, hub, "local_folder('me/gem')", "find_drafter('me/gem')", **environment)
        assert answer == ("CheckpointError: no folder me/gem here, it is not in the Hub's cache, and the Hub cannot be "
                          "reached; check the network (or HF_HUB_OFFLINE) and try again")
        assert drafter is None


def test_a_download_that_breaks_off_says_so_and_the_next_one_finishes_it(tmp_path: Path, hub: FakeHub) -> None:
    hub.breaks_off = True
    answer, = ask(tmp_path, hub, "local_folder('me/gem')")
    assert answer is not None
    assert answer.startswith("CheckpointError: downloading me/gem from the Hub failed: ")
    assert answer.endswith("run the command again, finished files are kept")
    assert "\n" not in answer
    hub.breaks_off = False
    assert_is_copy(ask(tmp_path, hub, "local_folder('me/gem')")[0], hub.repositories["me/gem"], "pytorch_model.bin")
