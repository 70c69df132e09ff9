"""A file of prompts: JSON objects or plain text, one request a line.

    {"prompt": "Why is the sky blue?", "max_tokens": 200, "id": "sky"}
    {"messages": [{"role": "user", "content": "Hi"}], "temperature": 1.0, "seed": 7}
"""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mlx_mtp.config import SamplingParams
from mlx_mtp.errors import MtpError, RequestError

JSON_LINES = (".jsonl", ".ndjson")
SETTINGS = tuple(field.name for field in fields(SamplingParams))
FORM = '{"prompt": "…"} or {"messages": […]}'


@dataclass(frozen=True)
class Line:
    """What one line asks for. prompt: text, or a conversation. where: file and line, for errors about it."""

    prompt: str | Sequence[Mapping[str, Any]]
    sampling: SamplingParams
    where: str = ""
    id: str | int | None = None


def read(path: Path) -> str:
    """A file's text. Raises RequestError if it cannot be read, and names the line that is not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"the prompts file {path} cannot be read ({error.strerror}): check its name") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{path}:{line}: holds bytes that are not UTF-8: convert the file to UTF-8") from error


def read_stdin() -> str:
    """All of stdin as text, without a byte order mark. Raises RequestError for what is none."""
    try:
        text = sys.stdin.read()
        text.encode("utf-8")  # in the C locale, bytes that cannot be decoded come as lone surrogates
    except UnicodeError as error:
        raise RequestError(f"what came on stdin is not text in {sys.stdin.encoding}: convert it to that, or set "
                           "PYTHONIOENCODING to the encoding it is in") from error
    return text.removeprefix("\ufeff")


def load(name: str, defaults: SamplingParams) -> list[Line]:
    """The requests of the file `name`, or of stdin if that is "-". Raises RequestError, as `read` and `parse` do."""
    return parse(read_stdin(), "stdin", defaults) if name == "-" else parse(read(Path(name)), name, defaults)


def parse(text: str, name: str, defaults: SamplingParams) -> list[Line]:
    """The requests of a file called `name`; what a line does not set is as in `defaults`.

    JSON lines if `name` ends in .jsonl or the first line that is not blank is a JSON object; else each line is a prompt
    as it stands. Blank lines are skipped. Raises RequestError with name and number of the first bad line.
    """
    lines = [(f"{name}:{number}", line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)
             if line.strip()]  # not splitlines, which also splits at characters that a JSON string may hold
    if not lines:
        raise RequestError(f"{name} holds no prompts: expected one a line, as text or as {FORM}")
    if name.lower().endswith(JSON_LINES) or _is_object(lines[0][1]):
        return [_of_json(line, where, defaults) for where, line in lines]
    for where, line in lines:
        if _is_object(line) and ("prompt" in (given := json.loads(line)) or "messages" in given):
            raise RequestError(f"{where}: is a JSON object, but the first line is not: make all lines objects; to "
                               "learn what keeps the first from being one, name the file *.jsonl")
    return [Line(line, defaults, where) for where, line in lines]


@contextmanager
def told(where: str) -> Iterator[None]:
    """Puts in front of an error where the request stands that it is about."""
    try:
        yield
    except MtpError as error:
        if not where:
            raise
        raise type(error)(f"{where}: {error}") from error


def _is_object(line: str) -> bool:
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _of_json(line: str, where: str, defaults: SamplingParams) -> Line:
    with told(where):
        try:
            given = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"is not JSON ({error}): expected an object such as {FORM}") from error
        if not isinstance(given, dict):
            raise RequestError(f"is {reprlib.repr(given)}; expected an object such as {FORM}")
        known = ("prompt", "messages", "id", *SETTINGS)
        for key in given:
            if key not in known:
                raise RequestError(f"has the key {key!r}; expected some of {', '.join(known)}")
        name = given.get("id")
        if isinstance(name, bool) or not isinstance(name, str | int | None):
            raise RequestError(f"id is {reprlib.repr(name)}; expected text or a whole number")
        sampling = replace(defaults, **{key: given[key] for key in SETTINGS if key in given})
        return Line(_prompt(given), sampling, where, name)


def _prompt(given: Mapping[str, Any]) -> str | Sequence[Mapping[str, Any]]:
    if "prompt" in given and "messages" in given:
        raise RequestError("has both prompt and messages; expected one of them")
    if "prompt" not in given and "messages" not in given:
        raise RequestError(f"has neither prompt nor messages; expected {FORM}")
    if "messages" in given:
        return _conversation(given["messages"])
    prompt = given["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError(f"prompt is {reprlib.repr(prompt)}; expected text (a conversation is given as messages)")
    return prompt


def _conversation(messages: object) -> Sequence[Mapping[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages is {reprlib.repr(messages)}; expected a list of objects with role and content")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {number} is {reprlib.repr(message)}; expected an object with role and content")
        content, calls = message.get("content"), message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise RequestError(f"tool_calls of message {number} are {reprlib.repr(calls)}; expected a list of objects")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if calls and content is None:
            continue
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestError(f"the content of message {number} is {reprlib.repr(content)}; expected text, or a "
                                   'list of {"type": "text", "text": "…"}')
    return messages
