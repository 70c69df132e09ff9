"""A job of many prompts: what a file of them may hold, and that the file of answers survives whatever stops the job."""

from __future__ import annotations

import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mlx_mtp
from mlx_mtp import api, batch, demo
from mlx_mtp.generate import main
from mlx_mtp.progress import SECONDS

ROOT = Path(__file__).parent.parent
PROMPTS = ["Explain `os.path.join`.", "Hello", "What is in the module `re`?", "Explain `bisect.insort`.", "Bye", "Why?"]
LINES = [{"prompt": prompt, "id": f"p{i}", "max_tokens": [8, 2][i % 2], "seed": i, "temperature": i / 4}
         for i, prompt in enumerate(PROMPTS)]
SHORT = ["-m", "12", "--verbose", "F"]


@pytest.fixture(scope="module")
def pair() -> api.Pair:
    return mlx_mtp.load(demo.TARGET)


@pytest.fixture
def loaded(pair: api.Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a test the seconds that loading takes."""
    load_quickly(pair, monkeypatch)


def load_quickly(pair: api.Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, before_reading: Callable[[api.Pair], object], **__: object) -> api.Pair:
        before_reading(pair)
        return pair

    monkeypatch.setattr(api, "load", load)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Prompts with settings of their own, some of which end long before those in front of them."""
    return write(tmp_path / "prompts.jsonl", LINES)


@pytest.fixture(scope="module")
def whole(pair: api.Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers to `prompts`, of a job that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        load_quickly(pair, patch)
        assert run(write(folder / "prompts.jsonl", LINES), output=folder / "out.jsonl") == 0
    return folder / "out.jsonl"


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copy(whole, tmp_path / "out.jsonl"))


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def results(path: Path) -> list[dict[str, Any]]:
    """The lines of an output file; the times in `stats` differ from run to run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["stats"] = {name: line["stats"][name] for name in ("prompt_tokens", "generation_tokens")}
    return lines


def run(prompts: Path | str, *more: str, output: Path | None = None) -> int:
    return main(["--prompts-file", str(prompts), *(["--output", str(output)] if output else []), *SHORT, *more])


# What is wrong is said before anything runs


CHAT = [{"role": "user", "content": "Hi"}]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("line", "more", "message"), [
    ({"prompt": "x " * 5000}, [], "tokens; the model's context holds 4096, the answer included: shorten the prompt"),
    ({"prompt": "\ud800"}, [], "which is no character but a byte that is not UTF-8"),
])
def test_what_only_the_tokenizer_knows_is_said_with_the_line_before_any_prompt_runs(
    line: object, more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "stream_requests", lambda *_: pytest.fail("a prompt is run"))
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}, line])
    assert run(path, *more, output=tmp_path / "out.jsonl") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}:3: ")
    assert message in err
    assert not (tmp_path / "out.jsonl").exists()


# What comes out


@pytest.mark.usefixtures("loaded")
def test_output_is_one_object_a_line_in_input_order_each_as_if_alone(
    pair: api.Pair, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prompts, "--max-rows", "2", output=tmp_path / "out.jsonl") == 0
    assert capsys.readouterr() == ("", "")
    found = results(tmp_path / "out.jsonl")
    assert [(line["index"], line["id"]) for line in found] == [(i, f"p{i}") for i in range(len(PROMPTS))]
    for i, line in enumerate(found):
        tokens = pair.tokenizer.encode_chat([{"role": "user", "content": PROMPTS[i]}])
        alone = mlx_mtp.generate(pair, tokens, max_tokens=[8, 2][i % 2], temperature=i / 4, seed=i)
        assert isinstance(alone, api.Result)
        assert (line["text"], line["tokens"], line["finish_reason"]) == (alone.text, alone.tokens, alone.finish_reason)
        assert line["stats"] == {"prompt_tokens": len(tokens), "generation_tokens": len(alone.tokens)}
        assert list(line) == ["index", "id", "text", "tokens", "finish_reason", "stats", "fingerprint"]


@pytest.mark.usefixtures("loaded")
def test_without_output_the_same_objects_or_the_texts_go_to_stdout(
    prompts: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prompts, "--json", "--max-rows", "3") == 0
    (tmp_path / "stdout.jsonl").write_text(capsys.readouterr().out)
    assert results(tmp_path / "stdout.jsonl") == results(whole)
    assert run(prompts) == 0
    assert capsys.readouterr().out == "".join(f"{line['text']}\n" for line in results(whole))


@pytest.mark.usefixtures("loaded")
def test_prompts_come_from_stdin_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(write(tmp_path / "p.txt", PROMPTS[:2]), "--json") == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(PROMPTS[:2])))
    assert run("-", "--json") == 0
    found = capsys.readouterr().out
    assert [json.loads(line)["text"] for line in found.splitlines()] == [
        json.loads(line)["text"] for line in expected.splitlines()]
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "a"}\n{"prompt": "a", "seed": -1}'))
    assert run("-") == 2
    assert capsys.readouterr().err.startswith("error: stdin:2: seed is -1")


@pytest.mark.usefixtures("loaded")
def test_the_system_prompt_goes_before_prompts_and_conversations_that_have_none(
    pair: api.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    real = api.new_request
    monkeypatch.setattr(api, "new_request", lambda p, tokens, more: seen.append(tokens) or real(p, tokens, more))
    own = [{"role": "system", "content": "Be long."}, *CHAT]
    path = write(tmp_path / "p.jsonl", [{"prompt": "Hi"}, {"messages": CHAT}, {"messages": own}])
    assert run(path, "--system-prompt", "Be brief.", "-m", "1", output=tmp_path / "out.jsonl") == 0
    brief = pair.tokenizer.encode_chat([{"role": "system", "content": "Be brief."}, *CHAT])
    assert seen[:3] == [brief, brief, pair.tokenizer.encode_chat(own)]
    del seen[:]
    assert run(write(tmp_path / "p.txt", ["import os"]), "--ignore-chat-template", "-m", "1") == 0
    assert seen[0] == pair.tokenizer.encode("import os")


# What stops a job


@pytest.mark.usefixtures("loaded")
def test_a_file_cut_anywhere_is_completed_and_what_was_whole_is_kept_to_the_byte(
    prompts: Path, whole: Path, output: Path
) -> None:
    everything = whole.read_bytes()
    lines = everything.splitlines(keepends=True)
    for keep in (0, 1, len(lines[0]) - 1, len(lines[0]), len(lines[0]) + 13, len(everything) - 1):
        output.write_bytes(everything[:keep])
        assert run(prompts, "--max-rows", "3", "--num-draft-tokens", "1", output=output) == 0
        assert results(output) == results(whole), keep
        kept = everything[: everything.rfind(b"\n", 0, keep) + 1]
        assert output.read_bytes().startswith(kept)


@pytest.mark.usefixtures("loaded")
def test_a_finished_job_runs_and_reads_nothing_and_more_lines_are_appended(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, fewer = tmp_path / "out.jsonl", write(tmp_path / "fewer.jsonl", LINES[:3])
    assert run(fewer, output=output) == 0
    before = output.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(api, "stream_requests", lambda *_: pytest.fail("a prompt is run"))
        assert run(fewer, "--verbose", "T", output=output) == 0
    assert capsys.readouterr() == ("", f"{output} holds all 3 answers: nothing is left to do\n")
    assert output.read_bytes() == before
    assert run(prompts, "--verbose", "T", output=output) == 0
    err = capsys.readouterr().err.splitlines()
    assert f"{output} holds 3 of 6 answers: going on after them" in err
    assert err[-1].startswith("[3 requests, ")
    assert output.read_bytes().startswith(before)
    assert len(results(output)) == 6


def changed(index: int, **fields: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda lines: [line | fields if i == index else line for i, line in enumerate(lines)]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("change", "more", "line"), [
    (changed(1, prompt="Hi"), [], 2), (changed(0, seed=77), [], 1), (changed(2, stop=["x"]), [], 3),
    (changed(1, max_tokens=4), [], 2), (changed(1, id="other"), [], 2), (lambda lines: lines[::-1], [], 1),
    (list, ["--system-prompt", "x"], 1), (list, ["--top-k", "3"], 1), (list, ["--model", "another/name"], 1),
    (list, ["--ignore-chat-template"], 1),
])
def test_answers_to_other_prompts_or_settings_are_an_error_that_changes_nothing(
    change: Callable[[list[Any]], list[Any]], more: list[str], line: int, prompts: Path, output: Path,
    capsys: pytest.CaptureFixture[str]
) -> None:
    before = output.read_bytes()
    assert run(write(prompts, change(LINES)), *more, output=output) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {output}:{line} is not the answer to prompt {line} with this model and these set")
    assert err.count("\n") == 1
    assert output.read_bytes() == before


@pytest.mark.usefixtures("loaded")
def test_each_advice_for_answers_to_other_prompts_helps(prompts: Path, output: Path, tmp_path: Path) -> None:
    before = output.read_text().splitlines(keepends=True)
    write(prompts, changed(4, prompt="Hi")(LINES))
    assert run(prompts, output=output) == 2
    assert run(prompts, output=tmp_path / "another.jsonl") == 0
    output.write_text("".join(before[:4]))  # "delete that line and all after it"
    assert run(prompts, output=output) == 0
    assert results(output) == results(tmp_path / "another.jsonl")
    output.write_text("".join(before))
    assert run(write(prompts, LINES), output=output) == 0  # "give those that it was made with"


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("more", [["--num-draft-tokens", "0"], ["--max-rows", "1"], ["--draft-model", "none"],
                                  ["--max-context", "3000"]])
def test_what_never_changes_the_text_is_free_to_change_between_runs(
    more: list[str], prompts: Path, whole: Path, output: Path
) -> None:
    output.write_text("".join(output.read_text().splitlines(keepends=True)[:5]))
    assert run(prompts, *more, output=output) == 0
    assert results(output) == results(whole)


@pytest.mark.usefixtures("loaded")
def test_answers_that_were_interrupted_are_not_taken_for_finished(
    prompts: Path, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "stream_requests", StoppedAfter(9, interrupt))
    assert run(prompts, "--json") == 130
    output.write_text(capsys.readouterr().out)
    finished = [json.loads(line)["finish_reason"] != "interrupted" for line in output.read_text().splitlines()]
    assert set(finished) == {True, False}
    assert run(prompts, output=output) == 2
    assert f"error: {output}:{finished.index(False) + 1} is not the answer" in capsys.readouterr().err


def slowly(*arguments: Any, real: Callable[..., Iterator[api.Segment]] = api.stream_requests) -> Iterator[api.Segment]:
    """The real decoding, with a pause after each segment that is long enough for what has come to be drawn."""
    for segment in real(*arguments):
        yield segment
        time.sleep(SECONDS)


class StoppedAfter:
    """The real decoding, and what happens after some segments of it."""

    def __init__(self, count: int, then: Callable[[], object]) -> None:
        self._count, self._then, self._real = count, then, api.stream_requests

    def __call__(self, *arguments: Any) -> Iterator[api.Segment]:
        for i, segment in enumerate(self._real(*arguments)):
            if i == self._count:
                self._then()
            yield segment


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("count", [0, 5, 12])
def test_ctrl_c_leaves_whole_lines_in_order_and_the_next_run_goes_on(
    count: int, prompts: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(api, "stream_requests", StoppedAfter(count, interrupt))
        assert run(prompts, "--verbose", "T", output=output) == 130
    out, err = capsys.readouterr()
    done = len(results(output))
    assert results(output) == results(whole)[:done]
    assert done < 6
    assert out == ""
    assert err.splitlines()[-3:] == [
        f"{output} holds {done} of 6 answers: the same command goes on after them", "", "interrupted"]
    assert run(prompts, output=output) == 0
    assert results(output) == results(whole)


def start(prompts: Path, output: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_mtp.generate", "--prompts-file", str(prompts), "--output", str(output),
         "--max-rows", "2"], cwd=ROOT, stderr=subprocess.PIPE)


def wait_for_lines(process: subprocess.Popen[bytes], output: Path, count: int) -> None:
    for _ in range(6000):
        if output.exists() and output.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, "the job ended before it could be stopped"
        time.sleep(0.005)
    raise AssertionError(f"{output} never had {count} lines")


@pytest.mark.parametrize("seed", [0])
def test_kills_at_random_moments_and_ctrl_c_cost_nothing_but_time(
    seed: int, pair: api.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(seed)
    lines = [{"prompt": prompt, "seed": i, "temperature": 1.0, "max_tokens": generator.randint(10, 40)}
             for i, prompt in enumerate(PROMPTS * 3)]
    prompts, output, whole = write(tmp_path / "p.jsonl", lines), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    for end in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        with start(prompts, output) as process:
            held = output.read_bytes().count(b"\n") if output.exists() else 0
            wait_for_lines(process, output, held + generator.randint(1, 3))
            time.sleep(generator.random() * 0.05)
            process.send_signal(end)
            _, err = process.communicate(timeout=30)
        assert process.returncode == (130 if end == signal.SIGINT else -9)
        assert b"Traceback" not in err
    assert 0 < len(output.read_bytes().splitlines()) < len(lines)
    load_quickly(pair, monkeypatch)
    assert main(["--prompts-file", str(prompts), "--output", str(output), "--verbose", "F"]) == 0
    assert main(["--prompts-file", str(prompts), "--output", str(whole), "--verbose", "F"]) == 0
    assert results(output) == results(whole)


# What is shown meanwhile


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("loaded")
def test_a_terminal_shows_what_is_done_and_is_left_clean(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(api, "stream_requests", slowly)  # else how far it is when it is drawn is up to the machine
    assert run(prompts, "--verbose", "T", output=tmp_path / "out.jsonl") == 0
    shown = sys.stderr.getvalue()
    with pytest.raises(AssertionError, match=r"\n?\x1b.*[1-5]/6, \d rows?, [0-9.]+ tok/s, \d\.\d\d tokens a round"):
        raise AssertionError(shown)
    hidden, restored = "\x1b[?25l", "\x1b[?25h"  # the cursor
    assert shown.count(hidden) == shown.count(restored) >= 2
    assert shown.splitlines()[-1].endswith("tokens a round]")


@pytest.mark.usefixtures("loaded")
def test_where_there_is_no_terminal_only_notes_and_the_summary_are_shown(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prompts, "--verbose", "T", output=tmp_path / "out.jsonl") == 0
    tokens = sum(len(line["tokens"]) for line in results(tmp_path / "out.jsonl"))
    (summary,) = capsys.readouterr().err.splitlines()
    assert summary.startswith(f"[6 requests, {tokens} tokens, ")


@pytest.mark.usefixtures("loaded")
def test_what_is_interrupted_while_it_is_printed_is_not_printed_again(
    prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch.Texts, "_print", lambda self, index, text: print(index) or signal.raise_signal(2))
    assert main(["--prompts-file", str(prompts), "--verbose", "F"]) == 130
    assert capsys.readouterr().out.split().count("0") == 1
