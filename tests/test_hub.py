"""Names become folders through the real Hub client, against a small server of our own that speaks the Hub's protocol.

The client reads its endpoint and its cache folder when it is imported, so each case runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from mlx_mtp.checkpoint.hub import drafter_names, local_folder
from mlx_mtp.errors import CheckpointError

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "goldens/dense"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves folders as repositories. `refusals`: repository -> (status, X-Error-Code) instead of content."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.breaks_off = False
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = unquote(urlsplit(handler.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        owner_name, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        if owner_name in self.refusals:
            status, code = self.refusals[owner_name]
            send(handler, status, b"{}", {"X-Error-Code": code, "X-Error-Message": "refused"})
        elif owner_name not in self.repositories:
            send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif is_api and rest[:1] == ["tree"]:
            listing = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": etag(file)}
                for file in sorted(self.repositories[owner_name].iterdir())
            ]
            send(handler, 200, json.dumps(listing).encode())
        elif is_api:
            siblings = [{"rfilename": file.name} for file in sorted(self.repositories[owner_name].iterdir())]
            send(handler, 200, json.dumps({"id": owner_name, "sha": COMMIT, "siblings": siblings}).encode())
        else:
            file = self.repositories[owner_name] / rest[-1]
            send(handler, 200, file.read_bytes(), {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT},
                 breaks_off=self.breaks_off)


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None,
    breaks_off: bool = False,
) -> None:
    handler.send_response(status)
    for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
        handler.send_header(key, value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body[: len(body) // 2] if breaks_off else body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    fake = FakeHub()
    for name, source in {"me/gem": GOLDEN / "target", "me/gem-assistant": GOLDEN / "assistant"}.items():
        fake.repositories[name] = Path(shutil.copytree(source, tmp_path / "served" / name))
    (fake.repositories["me/gem"] / "pytorch_model.bin").write_bytes(b"never fetched")
    thread = threading.Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()
    thread.join()


def ask(tmp_path: Path, hub: FakeHub, *expressions: str, **environment: str) -> list[str | None]:
    """Evaluates expressions in a new process whose Hub is `hub`; an error counts by its text."""
    code = (
        "import json, sys, time\n"
        "time.sleep = lambda seconds: None  # between the client's attempts\n"
        "from mlx_mtp.checkpoint.hub import find_drafter, local_folder\n"
        "from mlx_mtp.errors import CheckpointError\n"
        "answers = []\n"
        "for expression in sys.argv[1:]:\n"
        "    try:\n"
        "        answer = eval(expression)\n"
        "    except CheckpointError as error:\n"
        "        answer = f'CheckpointError: {error}'\n"
        "    answers.append(answer and str(answer))\n"
        "print(json.dumps(answers))\n"
    )
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", **environment}
    clean = {key: value for key, value in os.environ.items() if "TOKEN" not in key and "proxy" not in key.lower()}
    done = subprocess.run([sys.executable, "-c", code, *expressions], cwd=ROOT, env=clean | settings, timeout=60,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def assert_is_copy(folder: str | None, source: Path, *missing: str) -> None:
    assert folder is not None
    found = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    assert found == {file.name: file.read_bytes() for file in source.iterdir() if file.name not in missing}


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
    found = ask(tmp_path, hub, "find_drafter('me/gem-4bit')", "find_drafter('me/other')")
    assert_is_copy(found[0], hub.repositories["me/gem-assistant"])
    assert found[1] is None


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
