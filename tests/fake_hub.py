"""A small server that speaks the Hub's protocol, and a way to ask the real client about it in a process of its own.

It serves folders as repositories: the listing with sizes and hashes, small files by git's hash, large ones (LFS) by
sha256 through a redirect to a second host name, HTTP ranges, and uploads. It can refuse, cut a connection in the
middle of a file, and damage a body while its length stays right.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "goldens/dense"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")


class FakeHub:
    """Serves folders as repositories.

    refusals: repository -> (status, X-Error-Code) instead of content; cuts: file name -> after how many bytes of the
    body the connection ends, one request each; stalls: instead of ending it says nothing more; damaged: names of
    files whose bodies are wrong; breaks_off: every body ends half-way; has_xet: the Hub offers its own transfer
    besides HTTP, under an address where nobody answers.
    requests: "METHOD /path" in their order; ranges: what large files were asked for, (name, Range header).
    uploads: what was committed, repository -> path -> content.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.cuts: dict[str, list[int]] = {}
        self.damaged: set[str] = set()
        self.breaks_off = self.has_xet = self.stalls = False
        self.released = threading.Event()
        self.requests: list[str] = []
        self.ranges: list[tuple[str, str | None]] = []
        self.tokens: dict[str, set[str | None]] = {"hub": set(), "storage": set()}
        self.stored: dict[str, bytes] = {}
        self.uploads: dict[str, dict[str, bytes]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                hub.answer(self)

            do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        port = self.server.server_address[1]
        self.address, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = unquote(urlsplit(handler.path).path).strip("/").split("/")
        host = "storage" if parts[0] in ("content", "store") else "hub"
        self.tokens[host].add(handler.headers["Authorization"])
        if host == "storage":
            self.answer_storage(handler, parts)
        elif handler.command in ("POST", "PUT"):
            self.answer_upload(handler, parts)
        else:
            is_api = parts[:2] == ["api", "models"]
            owner_name, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
            if owner_name in self.refusals:
                self.refuse(handler, owner_name)
            elif owner_name not in self.repositories:
                send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif len(rest) > 1 and rest[1] not in ("main", COMMIT):
                send(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif is_api:
                self.answer_listing(handler, owner_name, is_tree=rest[:1] == ["tree"])
            else:
                self.answer_file(handler, owner_name, rest[-1])

    def refuse(self, handler: BaseHTTPRequestHandler, owner_name: str) -> None:
        status, code = self.refusals[owner_name]
        send(handler, status, b"{}", {"X-Error-Code": code, "X-Error-Message": "refused"})

    def answer_listing(self, handler: BaseHTTPRequestHandler, owner_name: str, is_tree: bool) -> None:
        files: list[dict[str, Any]] = []
        for file in sorted(self.repositories[owner_name].iterdir()):
            size, name = file.stat().st_size, "path" if is_tree else "rfilename"
            entry: dict[str, Any] = {name: file.name, "size": size, "oid" if is_tree else "blobId": git_hash(file)}
            if file.suffix in LARGE:
                entry["lfs"] = {"oid" if is_tree else "sha256": sha256(file), "size": size, "pointerSize": 130}
                if self.has_xet:
                    entry["xetHash"] = sha256(file)
            files.append({"type": "file", **entry} if is_tree else entry)
        answer: Any = files if is_tree else {"id": owner_name, "sha": COMMIT, "siblings": files}
        send(handler, 200, json.dumps(answer).encode())

    def answer_file(self, handler: BaseHTTPRequestHandler, owner_name: str, name: str) -> None:
        file = self.repositories[owner_name] / name
        headers = {"X-Repo-Commit": COMMIT}
        if file.suffix not in LARGE:
            self.send_content(handler, file, headers | {"ETag": f'"{git_hash(file)}"'})
            return
        if self.has_xet:
            headers |= {"X-Xet-Hash": sha256(file), "X-Xet-Refresh-Route": f"{self.address}/nobody/here"}
        send(handler, 302, b"", headers | {
            "Location": f"{self.storage}/content/{owner_name}/{name}?signature=expires",
            "ETag": f'"{git_hash(file)}"', "X-Linked-Etag": f'"{sha256(file)}"',
            "X-Linked-Size": str(file.stat().st_size),
        })

    def answer_storage(self, handler: BaseHTTPRequestHandler, parts: list[str]) -> None:
        if parts[0] == "store":
            self.stored[parts[1]] = body_of(handler)
            send(handler, 200, b"")
            return
        if handler.command == "GET":
            self.ranges.append((parts[-1], handler.headers["Range"]))
        self.send_content(handler, self.repositories["/".join(parts[1:3])] / parts[-1], {})

    def send_content(self, handler: BaseHTTPRequestHandler, file: Path, headers: dict[str, str]) -> None:
        content, start, status = file.read_bytes(), 0, 200
        if file.name in self.damaged:
            content = bytes([content[0] ^ 1]) + content[1:]
        if handler.headers["Range"]:
            start, status = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-")), 206
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        cuts = self.cuts.get(file.name, [])
        stop = cuts.pop(0) if cuts and handler.command == "GET" else None
        send(handler, status, content[start:], headers, len(content[start:]) // 2 if self.breaks_off else stop)
        if self.stalls and stop is not None:
            self.released.wait()

    def answer_upload(self, handler: BaseHTTPRequestHandler, parts: list[str]) -> None:
        body = body_of(handler)
        owner_name = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2]).removesuffix(".git")
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            owner_name = f"{asked['organization']}/{asked['name']}"
            answer: Any = {"url": f"{self.address}/{owner_name}", "id": owner_name}
        elif parts[:2] == ["api", "validate-yaml"]:
            answer = {"errors": [], "warnings": []}
        elif "preupload" in parts:
            answer = {"files": [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False} for file in json.loads(body)["files"]]}
        elif parts[-1] == "batch":
            answer = {"transfer": "basic", "objects": [
                {**item, "actions": {"upload": {"href": f"{self.storage}/store/{item['oid']}"}}}
                for item in json.loads(body)["objects"]]}
        else:
            self.commit(owner_name, [json.loads(line) for line in body.splitlines()])
            answer = {"commitUrl": f"{self.address}/{owner_name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        if owner_name in self.refusals:
            self.refuse(handler, owner_name)
        else:
            send(handler, 200, json.dumps(answer).encode())

    def commit(self, owner_name: str, lines: list[dict[str, Any]]) -> None:
        files = self.uploads.setdefault(owner_name, {})
        for value in (line["value"] for line in lines if line["key"] != "header"):
            files[value["path"]] = (base64.b64decode(value["content"]) if "content" in value
                                    else self.stored[value["oid"]])


def git_hash(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def body_of(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers["Content-Length"]:
        return handler.rfile.read(int(handler.headers["Content-Length"]))
    body = b""
    while size := int(handler.rfile.readline(), 16):  # in chunks, each followed by an empty line
        body += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return body


def send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None,
    stop: int | None = None,
) -> None:
    """stop: ends the connection after so many bytes of the body."""
    handler.send_response(status)
    for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
        handler.send_header(key, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body[:stop])


@contextmanager
def serving(folder: Path) -> Iterator[FakeHub]:
    """A Hub with me/gem and its drafter, served from copies in `folder`."""
    fake = FakeHub()
    for name, source in {"me/gem": GOLDEN / "target", "me/gem-assistant": GOLDEN / "assistant"}.items():
        fake.repositories[name] = Path(shutil.copytree(source, folder / name))
    (fake.repositories["me/gem"] / "pytorch_model.bin").write_bytes(b"never fetched")
    thread = threading.Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        fake.released.set()
        fake.server.shutdown()
        fake.server.server_close()
        thread.join()


def environment(tmp_path: Path, hub: FakeHub, **settings: str) -> dict[str, str]:
    """For a process whose Hub is `hub` and whose cache is in `tmp_path`."""
    clean = {key: value for key, value in os.environ.items() if "TOKEN" not in key and "proxy" not in key.lower()}
    return clean | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
                    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", **settings}


def ask(tmp_path: Path, hub: FakeHub, *expressions: str, prepare: str = "", **settings: str) -> list[str | None]:
    """Evaluates expressions in a new process whose Hub is `hub`; an error counts by its text. Says nothing on stderr.

    The client reads its endpoint and its cache folder when it is imported, hence the process.
    """
    code = (
        "import json, sys, time\n"
        "time.sleep = lambda seconds: None  # between the client's attempts\n"
        "from pathlib import Path\n"
        "from mlx_mtp.checkpoint.hub import find_drafter, local_folder, published_drafter\n"
        "from mlx_mtp.errors import CheckpointError\n"
        f"{prepare}\n"
        "answers = []\n"
        "for expression in sys.argv[1:]:\n"
        "    try:\n"
        "        answer = eval(expression)\n"
        "    except CheckpointError as error:\n"
        "        answer = f'CheckpointError: {error}'\n"
        "    answers.append(answer and str(answer))\n"
        "print(json.dumps(answers))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *expressions], cwd=ROOT, timeout=60,
                          env=environment(tmp_path, hub, **settings), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return list(json.loads(done.stdout))


def assert_is_copy(folder: str | None, source: Path, *missing: str) -> None:
    assert folder is not None
    found = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    assert found == {file.name: file.read_bytes() for file in source.iterdir() if file.name not in missing}
