"""The file of answers: it takes whole lines only, and no line that is not ours is ever lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_mtp import RequestError
from mlx_mtp.output_file import OutputFile

NAMES = ["aa", "bb", "cc"]


def answer(index: int, **changed: Any) -> dict[str, Any]:
    return {"index": index, "text": "é\u2028\n", "finish_reason": "stop", "fingerprint": NAMES[index], **changed}


def answers(*lines: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def test_what_is_written_is_there_at_once_one_line_each_and_is_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for index in range(3):
        output = OutputFile(path, NAMES)
        assert output.done == index
        output.write(answer(index))
        assert output.done == index + 1
        assert [json.loads(line) for line in path.read_text().splitlines()] == [answer(i) for i in range(index + 1)]
        output.close()


@pytest.mark.parametrize("torn", ["{", '{"index": 1, ', answers(answer(1))[:-2], answers(answer(1))[:-1]])
def test_a_torn_last_line_is_cut_off(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(answers(answer(0)) + torn)
    OutputFile(path, NAMES).close()
    assert path.read_text() == answers(answer(0))


OTHERS = ["my notes", "my notes\nmore\n", "{}\n", '{"index": 0}\n', '{"index": 1, "te', "[" * 100_000, "\0\0", "1\n",
          "\n", '{"index": 0, "precious": "mine"}', '{"host": "x", "fingerprint": "y"}', '["fingerprint"]',
          answers(answer(1)), *(answers(answer(0) | changed) for changed in (
              {"index": 1}, {"fingerprint": "xx"}, {"fingerprint": None}, {"finish_reason": "interrupted"},
              {"finish_reason": None}))]


@pytest.mark.parametrize("content", OTHERS)
def test_a_line_of_something_else_is_an_error_that_changes_nothing(content: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(RequestError, match=r"out\.jsonl:1 is not the answer to prompt 1 with this model and these"):
        OutputFile(path, NAMES)
    assert path.read_text() == content
    path.write_text(answers(answer(0), answer(1)) + "my notes")
    with pytest.raises(RequestError, match=r"out\.jsonl:3 is not the answer to prompt 3"):
        OutputFile(path, NAMES)
    path.write_text(answers(answer(0), answer(1)))
    OutputFile(path, NAMES).close()  # as advised; and the failures left no lock


def test_more_answers_than_prompts_are_an_error_that_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for content in (answers(answer(0), answer(1)), answers(answer(0)) + "{" * 3):
        path.write_text(content)
        with pytest.raises(RequestError, match="has more lines than there are prompts, which are 1: give those"):
            OutputFile(path, NAMES[:1])
        assert path.read_text() == content


def test_two_jobs_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = OutputFile(path, NAMES)
    code = f"from mlx_mtp.output_file import OutputFile; OutputFile(__import__('pathlib').Path({str(path)!r}), [])"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"another run is writing to {path}: wait for it" in second.stderr.splitlines()[-1]
    with pytest.raises(RequestError, match="another run is writing"):
        OutputFile(path, NAMES)
    first.close()
    OutputFile(path, NAMES).close()


@pytest.mark.parametrize(("name", "message"), [
    ("nowhere/out.jsonl", r"cannot be written \(No such file or directory\): fix that or name another --output"),
    (".", r"cannot be written \(Is a directory\)"),
])
def test_what_cannot_be_opened_is_one_line(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        OutputFile(tmp_path / name, NAMES)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line_and_a_device_is_not_read() -> None:
    output = OutputFile(Path("/dev/full"), NAMES)  # it reads as zeros without end
    with pytest.raises(RequestError, match=r"/dev/full cannot be written \(No space left on device\): fix"):
        output.write(answer(0))
    assert output.done == 0
    output.close()
