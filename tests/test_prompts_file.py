"""A file of prompts: what its lines may hold, and the one line that a bad one is answered with."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_mtp import MemoryBudgetError, MtpError, RequestError, SamplingParams, api
from mlx_mtp.generate import main
from mlx_mtp.prompts_file import Line, load, parse, told

DEFAULTS = SamplingParams(9, 0.5, seed=3)
CHAT = [{"role": "user", "content": "Hi"}]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def run(prompts: Path, *more: str) -> int:
    return main(["--prompts-file", str(prompts), "-m", "12", "--verbose", "F", *more])


@pytest.mark.parametrize(("name", "text", "expected"), [
    ("p.jsonl", '{"prompt": "a"}\n\n \n{"messages": [{"role": "user", "content": "Hi"}]}\n',
     [Line("a", DEFAULTS, "p.jsonl:1"), Line(CHAT, DEFAULTS, "p.jsonl:4")]),
    ("p.txt", '\n{"prompt": "a", "id": 7}\r\n', [Line("a", DEFAULTS, "p.txt:2", 7)]),
    ("p.txt", '{"prompt": "a\u2028b"}', [Line("a\u2028b", DEFAULTS, "p.txt:1")]),
    ("p.txt", "one\r\n\n  two \n", [Line("one", DEFAULTS, "p.txt:1"), Line("  two ", DEFAULTS, "p.txt:3")]),
    ("p.txt", '{x} is\n{"a": 1}\n[1]', [Line("{x} is", DEFAULTS, "p.txt:1"), Line('{"a": 1}', DEFAULTS, "p.txt:2"),
                                       Line("[1]", DEFAULTS, "p.txt:3")]),
    ("p.jsonl", '{"prompt": "a", "max_tokens": 1, "temperature": 0, "top_k": 2, "top_p": 0.5, "min_p": 0.1, "seed": 4, '
                '"stop": ["x", "y"]}', [Line("a", SamplingParams(1, 0.0, 2, 0.5, 0.1, 4, ("x", "y")), "p.jsonl:1")]),
    ("p.jsonl", '{"prompt": "a", "stop": "x"}', [Line("a", SamplingParams(9, 0.5, seed=3, stop=("x",)), "p.jsonl:1")]),
])
def test_json_lines_are_requests_and_other_lines_are_prompts_as_they_stand(
    name: str, text: str, expected: list[Line]
) -> None:
    assert parse(text, name, DEFAULTS) == expected


ROLE = "message 1 is .*; expected an object with role and content"
CONTENT = r'the content of message 2 is .*; expected text, or a list of \{"type": "text"'
BAD_LINES = [
    ("not json", r"is not JSON \(.*\): expected an object such as \{\"prompt\": \"…\"\}"),
    ("[1]", r"is \[1\]; expected"), ('{"prompt": "a"', "is not JSON"), ("[" * 100_000, "is not JSON"),
    ({"prompt": "a", "max_token": 3}, "has the key 'max_token'; expected some of prompt, messages, id, max_tokens, "),
    ({}, "has neither prompt nor messages"), ({"prompt": "a", "messages": CHAT}, "has both prompt and messages"),
    ({"prompt": " "}, "prompt is ' '; expected text"), ({"prompt": CHAT}, r"prompt is \[.*given as messages"),
    ({"prompt": "a", "id": [1]}, r"id is \[1\]; expected text or a whole"), ({"prompt": "a", "id": True}, "id is True"),
    ({"prompt": "a", "temperature": -1}, "temperature is -1; expected a finite number"),
    ({"prompt": "a", "max_tokens": None}, "max_tokens is None"), ({"prompt": "a", "seed": "1"}, "seed is '1'"),
    ({"prompt": "a", "top_p": float("nan")}, "top_p is nan"), ({"prompt": "a", "stop": ["", 1]}, "stop is"),
    ({"prompt": "a", "stop": {"x": 1}}, "stop is"), ({"messages": []}, r"messages is \[\]; expected a list"),
    ({"messages": "Hi"}, "messages is 'Hi'"), ({"messages": ["Hi"]}, ROLE), ({"messages": [{"content": "Hi"}]}, ROLE),
    ({"messages": [*CHAT, {"role": "assistant"}]}, CONTENT),
    ({"messages": [*CHAT, {"role": "assistant", "tool_calls": 5}]}, r"tool_calls of message \d are 5; expected a list"),
    ({"messages": [*CHAT, {"role": "assistant", "tool_calls": [5]}]}, r"tool_calls of message \d are \[5\]; expected"),
    ({"messages": [*CHAT, {"role": "a", "content": 3}]}, CONTENT),
    ({"messages": [*CHAT, {"role": "a", "content": [{"type": "image"}]}]}, CONTENT),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_one_error_with_file_and_line_before_anything_is_loaded(
    line: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    path = write(tmp_path / "p.jsonl", [{"prompt": "fine"}, "", line, {"prompt": ""}])
    assert run(path, "--output", str(tmp_path / "out.jsonl")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {path}:3: ")
    assert err.count("\n") == 1
    assert len(err) < 500
    with pytest.raises(RequestError, match=message):
        parse(path.read_text(), "p.jsonl", DEFAULTS)
    assert not (tmp_path / "out.jsonl").exists()


def test_an_object_of_a_request_among_plain_lines_is_not_taken_for_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"prompt": "first", }', {"prompt": "second"}]
    assert run(write(tmp_path / "p.txt", lines)) == 2
    assert "p.txt:2: is a JSON object, but the first line is not" in capsys.readouterr().err
    assert run(write(tmp_path / "p.jsonl", lines)) == 2  # as advised
    assert "p.jsonl:1: is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(("data", "message"), [
    (b"one\ntw\xff\n", r"/p\.txt:2: holds bytes that are not UTF-8: convert the file"),
    (b"\xff\xfea\0", r"/p\.txt:1: holds bytes that are not UTF-8"),
    (b" \n\n", r"/p\.txt holds no prompts: expected one a line"),
    (None, r"the prompts file .*p\.txt cannot be read \(No such file or directory\): check its name"),
])
def test_a_file_that_is_none_is_one_error(
    data: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if data is not None:
        (tmp_path / "p.txt").write_bytes(data)
    assert run(tmp_path / "p.txt") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(err)
    assert err.count("\n") == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["--prompts-file", "p.txt", "-p", "Hi"], "argument --prompt/-p: not allowed with argument --prompts-file"),
    (["-p", "Hi", "--output", "o.jsonl"], "--output is given without --prompts-file"),
    (["--prompts-file", "p.txt", "--output", "nowhere/o.jsonl"], "there is no folder nowhere for --output"),
    (["--prompts-file", "p.txt", "--output", "."], "--output . is a folder"),
    (["--prompts-file", "p.txt", "--output", "./p.txt"], "--output is the prompts file itself"),
    (["--prompts-file", "p.txt", "--max-rows", "0"], "max_rows is 0; expected a whole number of at least 1"),
    (["--prompts-file", "c.jsonl", "--ignore-chat-template"], "c.jsonl:2: has messages, which only the chat template"),
])
def test_flags_that_do_not_go_together_are_one_line_before_anything_is_loaded(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.txt", ["Hi"])
    write(tmp_path / "c.jsonl", [{"prompt": "Hi"}, {"messages": CHAT}])
    try:
        code = main(arguments)
    except SystemExit as end:  # argparse's way
        code = end.code
    assert code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_each_error_keeps_its_type_when_it_is_told_with_its_line() -> None:
    for kind in (MemoryBudgetError, RequestError):
        with pytest.raises(MtpError) as raised, told("p.txt:3"):
            raise kind("no")
        assert type(raised.value) is kind
        assert str(raised.value) == "p.txt:3: no"


def test_a_byte_order_mark_on_stdin_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('\ufeff{"prompt": "Hi", "id": "q"}\n'))
    line, = load("-", DEFAULTS)
    assert (line.prompt, line.id, line.where) == ("Hi", "q", "stdin:1")
