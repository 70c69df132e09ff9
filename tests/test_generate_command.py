"""The command: its flags, what it prints where, and how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

import pytest

import mlx_mtp
from mlx_mtp import RequestError, SamplingParams, api, demo
from mlx_mtp.config import EngineConfig
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import Request, RequestStats
from mlx_mtp.generate import main, parser

ROOT = Path(__file__).parent.parent
SHORT = ["--max-tokens", "12", "--num-draft-tokens", "3"]
FINISHED = RequestStats(1, 0, 1, 0, 0, 0, (), {}, 1.0, 1.0, 1.0, 1.0, None, 1.0)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mlx_mtp.generate", *arguments]


@pytest.fixture(scope="module")
def pair() -> api.Pair:
    return mlx_mtp.load(demo.TARGET)


def answer_of(pair: api.Pair, prompt: str, **settings: object) -> api.Result:
    """What the command should print, by way of Python."""
    tokens = pair.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    result = mlx_mtp.generate(pair, tokens, max_tokens=12, **{"num_draft_tokens": 3, **settings})
    assert isinstance(result, api.Result)
    return result


def test_every_default_is_the_dataclasses() -> None:
    args = parser().parse_args([])
    shown = SamplingParams(args.max_tokens, args.temp, args.top_k, args.top_p, args.min_p, args.seed)
    assert shown == SamplingParams()
    assert args.num_draft_tokens == EngineConfig().num_draft_tokens
    assert args.max_rows == EngineConfig().max_rows
    assert args.draft_model == api.AUTO


def test_the_flags_have_mlx_lms_names_and_each_sets_its_setting(
    monkeypatch: pytest.MonkeyPatch, pair: api.Pair
) -> None:
    seen: dict[str, object] = {}

    def load(model: object, draft_model: object, **settings: object) -> api.Pair:
        seen.update(model=model, draft_model=draft_model, **settings)
        return loaded(pair, **settings)

    def engine(_: object, **settings: object) -> Engine:
        seen.update(settings)
        return real(pair, **settings)

    def stream(_: object, __: object, requests: Iterable[Request], *___: object) -> Iterator[api.Segment]:
        seen["sampling"] = next(iter(requests)).sampling
        yield api.Segment(0, "One", [5], api.Result("One", [5], "stop", FINISHED))

    real = api.new_engine
    monkeypatch.setattr(api, "load", load)
    monkeypatch.setattr(api, "new_engine", engine)
    monkeypatch.setattr(api, "stream_requests", stream)
    assert main(["--model", "a/b", "--draft-model", "none", "--draft-bits", "4", "--max-context", "99", "-p", "Hi",
                 "-m", "7", "--temp", "0.5", "--top-p", "0.6", "--top-k", "8", "--min-p", "0.1", "--seed", "9",
                 "--num-draft-tokens", "2", "--max-rows", "3", "--verbose", "F"]) == 0
    assert (seen["model"], seen["draft_model"], seen["draft_bits"], seen["max_context"]) == ("a/b", "none", 4, 99)
    assert seen["sampling"] == SamplingParams(7, 0.5, 8, 0.6, 0.1, 9)
    assert (seen["num_draft_tokens"], seen["max_rows"]) == (2, 3)


def test_stdout_holds_the_text_and_nothing_else(pair: api.Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-p", "Hello", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert out == answer_of(pair, "Hello").text + "\n"
    assert "built-in" in err
    assert "tok/s" in err


def test_the_speed_of_a_few_rounds_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-p", "Hello", "-m", "2"]) == 0
    assert "answer 2 tokens; finished: length" in capsys.readouterr().err


def test_not_verbose_is_silent_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-p", "Hello", "-p", "Bye", "--verbose", "F", *SHORT]) == 0
    assert capsys.readouterr().err == ""


def test_the_summary_says_what_was_drafted_or_that_nothing_was(
    pair: api.Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["-p", "Hello", *SHORT])
    with_drafts = capsys.readouterr().err.splitlines()[-1]
    main(["-p", "Hello", *SHORT, "--num-draft-tokens", "0"])
    without = capsys.readouterr().err.splitlines()[-1]
    assert "drafts" in with_drafts
    assert f"answer {len(answer_of(pair, 'Hello').tokens)} tokens" in with_drafts
    assert "drafts" not in without


def test_two_prompts_come_out_in_order_each_as_if_alone(pair: api.Pair, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["What is in the module `os`?", "Hello"]
    texts = [answer_of(pair, prompt).text for prompt in prompts]
    assert texts[0] != texts[1]
    for order in (prompts, prompts[::-1]):
        assert main([*(part for prompt in order for part in ("-p", prompt)), *SHORT]) == 0
        expected = texts if order == prompts else texts[::-1]
        assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)


@pytest.mark.parametrize("arguments", [["-p", "-"], []])
def test_a_dash_or_no_prompt_reads_stdin(
    arguments: list[str], pair: api.Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    assert main([*arguments, *SHORT]) == 0
    assert capsys.readouterr().out == answer_of(pair, "Hello").text + "\n"


def test_no_prompt_at_a_terminal_is_an_error_and_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("never read"))
    assert main([]) == 2
    assert capsys.readouterr().err == "error: no prompt given: pass --prompt, or --prompt - to read stdin\n"


def test_the_prompt_is_taken_as_it_stands_if_asked_so(pair: api.Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-p", "import os", "--ignore-chat-template", *SHORT]) == 0
    plain = mlx_mtp.generate(pair, "import os", max_tokens=12)
    assert capsys.readouterr().out == plain.text + "\n"


def test_the_system_prompt_comes_before_the_prompt(
    pair: api.Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[int]] = []
    real = api.new_request
    monkeypatch.setattr(api, "new_request", lambda p, tokens, sampling: seen.append(tokens) or real(
        p, tokens, sampling))
    assert main(["-p", "Hello", "--system-prompt", "Be brief.", "-m", "1"]) == 0
    text = pair.tokenizer.decode(seen[0])
    assert 0 < text.index("Be brief.") < text.index("Hello")


def test_json_lines_hold_text_tokens_reason_and_stats(pair: api.Pair, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["What is in the module `os`?", "Hello"]
    assert main(["--json", "-p", prompts[0], "-p", prompts[1], "--temp", "1", "--seed", "3", *SHORT]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    for line, prompt in zip(lines, prompts, strict=True):
        expected = answer_of(pair, prompt, temperature=1.0, seed=3)
        assert line.keys() == {"text", "tokens", "finish_reason", "stats"}
        assert (line["text"], line["tokens"]) == (expected.text, expected.tokens)
        assert line["finish_reason"] == expected.finish_reason
        assert line["stats"].keys() == {field.name for field in fields(RequestStats)} == asdict(expected.stats).keys()
        assert line["stats"]["generation_tokens"] == len(line["tokens"])


def test_importing_the_command_does_not_hide_the_function_of_that_name() -> None:
    import mlx_mtp.generate as module

    assert callable(mlx_mtp.generate)
    with pytest.raises(RequestError):
        module(None, "Hello", tempo=1)  # type: ignore[operator]


def loaded(pair: api.Pair, before_reading: Callable[[api.Pair], object], **_: object) -> api.Pair:
    """A stand-in for loading."""
    before_reading(pair)
    return pair


class InterruptedAfter:
    """A stand-in for decoding: some segments, then Ctrl-C."""

    def __init__(self, *segments: api.Segment) -> None:
        self.segments = segments

    def __call__(self, *_: object, **__: object) -> object:
        yield from self.segments
        raise KeyboardInterrupt


@pytest.mark.parametrize(("arguments", "printed"), [
    (["-p", "a"], "One"),
    (["-p", "a", "-p", "b"], "One\nTw\n"),
    (["-p", "a", "--json"], '{"text": "One", "tokens": [5], "finish_reason": "interrupted", "stats": null}\n'),
])
def test_ctrl_c_keeps_what_came_of_each_answer(
    arguments: list[str], printed: str, monkeypatch: pytest.MonkeyPatch, pair: api.Pair,
    capsys: pytest.CaptureFixture[str]
) -> None:
    segments = [api.Segment(0, "One", [5])] + [api.Segment(1, "Tw", [6])] * ("b" in arguments)
    monkeypatch.setattr(api, "stream_requests", InterruptedAfter(*segments))
    monkeypatch.setattr(api, "load", lambda *_, **settings: loaded(pair, **settings))
    assert main(arguments) == 130
    out, err = capsys.readouterr()
    assert out == printed
    assert err.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize("flag", ["--json", "--verbose"])
def test_ctrl_c_prints_what_had_finished_behind_a_running_answer_as_finished(
    flag: str, monkeypatch: pytest.MonkeyPatch, pair: api.Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = api.Result("Two", [6, 7], "stop", FINISHED)
    segments = api.Segment(0, "One", [5]), api.Segment(1, "Two", [6, 7], whole)
    monkeypatch.setattr(api, "stream_requests", InterruptedAfter(*segments))
    monkeypatch.setattr(api, "load", lambda *_, **settings: loaded(pair, **settings))
    assert main(["-p", "a", "-p", "b", flag, *(["T"] if flag == "--verbose" else [])]) == 130
    out, err = capsys.readouterr()
    if flag == "--json":
        running, finished = map(json.loads, out.splitlines())
        assert (running["text"], running["finish_reason"], running["stats"]) == ("One", "interrupted", None)
        assert (finished["text"], finished["tokens"], finished["finish_reason"]) == ("Two", [6, 7], "stop")
        assert finished["stats"] == json.loads(json.dumps(asdict(FINISHED)))
    else:
        assert out == "One\nTwo\n"
        assert [line for line in err.splitlines() if line.startswith("---")] == ["--- 1", "--- 2"]


def test_several_prompts_are_summed_up_one_by_one_and_together(
    pair: api.Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["What is in the module `os`?", "Hello", "What is in `re`?"]
    results = [answer_of(pair, prompt) for prompt in prompts]
    assert main([*(part for prompt in prompts for part in ("-p", prompt)), "--max-rows", "2", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert out == "".join(f"{result.text}\n" for result in results)
    lines = [line for line in err.splitlines() if line.startswith(("---", "[prompt"))]
    assert [line[:5] for line in lines] == ["--- 1", "[prom", "--- 2", "[prom", "--- 3", "[prom"]
    for line, result in zip(lines[1::2], results, strict=True):
        assert f"answer {len(result.tokens)} tokens" in line
    stats = [result.stats for result in results]
    accepted, drafted, rounds = (sum(getattr(one, name) for one in stats) for name in ("accepted", "drafted", "rounds"))
    tokens = sum(len(result.tokens) for result in results)
    assert re.fullmatch(rf"\[3 requests, {tokens} tokens, [0-9.]+ tok/s; accepted "
                        rf"{accepted} of {drafted} drafts, {1 + accepted / rounds:.2f} tokens a round\]",
                        err.splitlines()[-1])


@pytest.mark.parametrize(("encoding", "errors"), [("utf-8", "strict"), ("utf-8", "surrogateescape"),
                                                  ("ascii", "strict")])
def test_bytes_on_stdin_that_are_no_text_are_one_line_and_its_advice_helps(
    encoding: str, errors: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Caf\xe9"), encoding, errors))
    assert main(SHORT) == 2
    assert capsys.readouterr() == ("", f"error: what came on stdin is not text in {encoding}: convert it to that, or "
                                       "set PYTHONIOENCODING to the encoding it is in\n")
    advised = subprocess.run(command(*SHORT), cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "latin-1"},
                             input=b"Caf\xe9", capture_output=True, check=False)
    assert advised.returncode == 0, advised.stderr


def test_an_answer_beyond_stdouts_encoding_comes_to_its_end(
    monkeypatch: pytest.MonkeyPatch, pair: api.Pair
) -> None:
    written = io.BytesIO()
    whole = api.Result("naïve 🦙!", [5, 6], "stop", FINISHED)
    segments = api.Segment(0, "naïve ", [5]), api.Segment(0, "🦙!", [6], whole)
    monkeypatch.setattr(api, "stream_requests", lambda *_, **__: iter(segments))
    monkeypatch.setattr(api, "load", lambda *_, **settings: loaded(pair, **settings))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    assert main(["-p", "a"]) == 0
    assert written.getvalue() == b"na?ve ?!\n"


LONG = command("-p", "import os", "--ignore-chat-template", "--max-tokens", "4000", "--temp", "2")


def test_sigint_in_the_middle_of_an_answer_keeps_its_beginning_and_exits_with_130(pair: api.Pair) -> None:
    with subprocess.Popen(LONG, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        beginning = b""
        while len(beginning) < 20:
            beginning += process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "interrupted"
    assert "Traceback" not in err.decode()
    text = (beginning + rest).decode()
    whole = mlx_mtp.generate(pair, "import os", max_tokens=12, temperature=2.0).text
    common = min(len(text), len(whole))
    assert common >= 10
    assert text[:common] == whole[:common]


def test_a_reader_that_has_enough_ends_it_without_a_traceback() -> None:
    with subprocess.Popen(LONG, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 141
    assert "Traceback" not in err.decode()
    assert "Exception" not in err.decode()


def test_help_takes_at_most_0_7_seconds() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        done = subprocess.run(command("--help"), cwd=ROOT, capture_output=True, text=True, check=True)
        assert "--num-draft-tokens" in done.stdout
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) <= 0.7


@pytest.mark.parametrize("code", [
    "import mlx_mtp",
    "import mlx_mtp.generate as g, contextlib\nwith contextlib.suppress(SystemExit): g.main(['--help'])",
    "import mlx_mtp.generate as g\nassert g.main(['-p', 'x', '--num-draft-tokens', '9']) == 2",
])
def test_neither_torch_nor_transformers_is_imported_before_it_must(code: str) -> None:
    check = "\nimport sys; print(sorted({'torch', 'transformers', 'mlx_lm', 'huggingface_hub'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code + check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
