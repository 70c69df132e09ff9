"""Turns as requests: answers equal a fresh run of the whole conversation, and only new tokens are run."""

from __future__ import annotations

import io
import itertools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_support import TEMPLATE, Recorder, ToldEngine, model_with_template, new_chat, new_session

import mlx_mtp
from mlx_mtp import RequestError, SamplingParams, api, device
from mlx_mtp.channels import Part
from mlx_mtp.chat.__main__ import main
from mlx_mtp.chat.conversation import Conversation
from mlx_mtp.chat.session import Session
from mlx_mtp.chat.settings import Settings
from mlx_mtp.chat.tools import Toolbox
from mlx_mtp.engine import engine as engine_module
from mlx_mtp.engine.request import Request

SHORT = Settings(SamplingParams(max_tokens=12), num_draft_tokens=3)
SYSTEM = "Answer as the documentation of Python's standard library would, in a sentence or two and without examples."
QUESTIONS = ["Explain `winreg.HKEY_USERS`.", "What does `tkinter.ttk.Widget` do?", "Hello ünd 🦙",
             "Explain `zipfile.Path.iterdir`."]


@pytest.fixture(scope="module")
def session() -> Session:
    return new_session()


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return new_session(model_with_template(tmp_path_factory.mktemp("templated")))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What the chat asked for, one a turn."""
    seen: list[Request] = []
    real = api.stream_requests

    def stream(pair: api.Pair, engine: object, given: list[Request], on_prefill: object) -> Iterator[api.Segment]:
        seen.extend(request for request in given if request.keep_answer)
        return real(pair, engine, given, on_prefill)  # type: ignore[arg-type]

    monkeypatch.setattr(api, "stream_requests", stream)
    return seen


def fresh_answer(session: Session, request: Request) -> list[int]:
    """The same prompt's answer in an engine that has seen nothing, by plain decoding."""
    result = mlx_mtp.generate(session.pair, list(request.prompt), sampling=request.sampling, num_draft_tokens=0)
    assert isinstance(result, api.Result)
    return result.tokens


def common_length(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_answer_equals_a_fresh_run_of_the_whole_conversation_and_only_new_tokens_are_run(
    temperature: float, session: Session, requests: list[Request], tmp_path: Path
) -> None:
    session.use(3)
    chat = new_chat(session, tmp_path, settings=Settings(SamplingParams(20, temperature, seed=5), 3))
    chat.conversation.system = SYSTEM
    for question in QUESTIONS[:3]:
        chat.take(question)
        assert requests[-1].tokens == fresh_answer(session, requests[-1])
        assert requests[-1].prompt == session.pair.tokenizer.encode_chat(chat.conversation.visible()[:-1])
    answers_kept = 0
    for before, after in itertools.pairwise(requests):
        known = [*before.prompt, *before.tokens[:-1]]
        assert after.reused == common_length(known, list(after.prompt))
        answers_kept += after.reused > len(before.prompt)
    assert answers_kept >= 1, "a tokenizer may split an answer otherwise than the model wrote it, but seldom does"


def test_what_the_template_rewrites_is_run_again_and_the_common_beginning_is_not(
    templated: Session, requests: list[Request], tmp_path: Path
) -> None:
    """This template puts an empty thought before an answer, and leaves it out when the answer lies behind."""
    templated.use(3)
    chat = new_chat(templated, tmp_path, settings=SHORT)
    chat.conversation.system = SYSTEM
    for question in QUESTIONS[1:]:
        chat.take(question)
        assert requests[-1].tokens == fresh_answer(templated, requests[-1])
    for before, after in itertools.pairwise(requests):
        common = common_length(list(before.prompt), list(after.prompt))
        assert common < len(before.prompt), "the template rewrote nothing, so this proves nothing"
        assert after.reused == common


def test_the_answer_after_a_stopped_a_retried_and_an_undone_one_equals_a_fresh_run_too(
    session: Session, requests: list[Request], tmp_path: Path
) -> None:
    session.use(3)
    view = Recorder()
    chat = new_chat(session, tmp_path, view, Settings(SamplingParams(20, 1.5, seed=1), 3))
    chat.take(QUESTIONS[0])
    chat.take("/retry")
    assert requests[0].prompt == requests[1].prompt
    assert requests[0].tokens != requests[1].tokens, "a retry has another seed"
    assert chat.conversation.messages[-1].content == session.pair.tokenizer.decode(requests[1].tokens).strip()
    stop_after(chat, view, 8)
    chat.take(QUESTIONS[1])
    assert chat.conversation.messages[-1].is_interrupted
    assert 0 < len(requests[-1].tokens) < 20
    assert "stopped" in view.notes
    view.on_part = lambda part: None
    for line in (QUESTIONS[2], "/undo", QUESTIONS[3]):
        chat.take(line)
    for request in requests:
        whole = fresh_answer(session, request)
        assert whole[: len(request.tokens)] == request.tokens
    assert requests[-1].reused > 0
    assert [message.content for message in chat.conversation.messages if message.role == "user"] == [
        QUESTIONS[0], QUESTIONS[1], QUESTIONS[3]]


def stop_after(chat: object, view: Recorder, letters: int) -> None:
    """Ctrl-C once so much of an answer is there."""
    def on_part(part: Part) -> None:
        if sum(len(part.text) for part in view.answers[-1]) >= letters:
            signal.raise_signal(signal.SIGINT)
            view.on_part = lambda part: None

    view.on_part = on_part


def test_the_second_turn_behind_1500_tokens_starts_in_0_15_of_the_first_ones_time(
    session: Session, requests: list[Request], tmp_path: Path
) -> None:
    text = " ".join(f"Line {i} of a long text about `module_{i}`." for i in range(100))
    ratios = []
    for _ in range(3):  # the best of three: others use this machine too
        session.use(3)
        chat = new_chat(session, tmp_path, settings=Settings(SamplingParams(max_tokens=8), 3))
        chat.take(text)
        chat.take("And?")
        first, second = chat.stats[-2:]
        assert first.prompt_tokens >= 1500
        assert second.prompt_tokens - second.reused_tokens < 20
        ratios.append(second.ttft / first.ttft)
        if ratios[-1] <= 0.15:
            break
    assert min(ratios) <= 0.15


def test_thoughts_are_parted_from_the_answer_kept_and_never_sent_back(templated: Session, tmp_path: Path) -> None:
    said = "<|channel>thought\nFirst, 🦙.\n<channel|>A llama."
    view = Recorder()
    engine = ToldEngine(templated, said, "Fine.")
    templated._engine = engine  # type: ignore[assignment]
    chat = new_chat(templated, tmp_path, view, Settings(thinking="on"))
    for line in ("Who?", "And now?"):
        chat.take(line)
    message = chat.conversation.messages[1]
    assert (message.content, message.thinking) == ("A llama.", "First, 🦙.")
    assert {part.kind for part in view.answers[0]} == {"answer", "thinking"}
    assert "<|think|>" in engine.prompts[0]
    assert "<|turn>model\nA llama.<turn|>" in engine.prompts[1]
    assert "First" not in engine.prompts[1]
    assert "First" in Conversation.load(next((tmp_path / "conversations").iterdir())).messages[1].thinking


def test_thoughts_that_the_template_opens_itself_are_no_answer(tmp_path: Path) -> None:
    """As Gemma 4's newer templates do after what a tool gave."""
    opening = TEMPLATE.replace("{%- if add_generation_prompt and not at.open -%}",
                               "{%- if at.open and enable_thinking -%}{{- '<|channel>thought\\n' -}}{%- endif -%}"
                               "{%- if add_generation_prompt and not at.open -%}")
    assert opening != TEMPLATE
    session = new_session(model_with_template(tmp_path, opening))
    engine = ToldEngine(session, "<|tool_call>call:clock{}<tool_call|>", "It is noon.\n<channel|>Noon.")
    session._engine = engine  # type: ignore[assignment]
    chat = new_chat(session, tmp_path, settings=Settings(thinking="on"))
    (tmp_path / "tools.py").write_text('def clock() -> str:\n    """The time."""\n    return "12:00"\n')
    chat.use_tools(Toolbox.load(tmp_path / "tools.py"))
    chat.take("What time is it?")
    assert engine.prompts[1].endswith("<|channel>thought\n")
    answer = chat.conversation.messages[-1]
    assert (answer.content, answer.thinking) == ("Noon.", "It is noon.")


def test_without_thinking_the_template_is_not_asked_for_any(templated: Session, tmp_path: Path) -> None:
    engine = ToldEngine(templated, "Yes.")
    templated._engine = engine  # type: ignore[assignment]
    new_chat(templated, tmp_path).take("Who?")
    assert "<|think|>" not in engine.prompts[0]
    assert engine.prompts[0].endswith("<|turn>model\n<|channel>thought\n<channel|>")


def test_the_oldest_turns_are_left_out_with_a_note_when_the_context_is_full_and_a_warning_comes_before(
    tmp_path: Path, requests: list[Request]
) -> None:
    small = new_session(max_context=256)
    assert small.context == 256
    view = Recorder()
    chat = new_chat(small, tmp_path, view, Settings(SamplingParams(max_tokens=12), 3))
    chat.conversation.system = "Be brief."
    for i in range(7):
        chat.take(f"Question {i}: what does `os.path.join` do with {i} paths?")
        assert len(requests[-1].prompt) + len(requests[-1].tokens) <= 256
    assert requests[-1].tokens == fresh_answer(small, requests[-1])
    text = small.pair.tokenizer.decode(requests[-1].prompt)
    assert "Be brief." in text
    assert "Question 6" in text
    assert "Question 0" not in text
    assert any("context is full: the model does not see the oldest" in note for note in view.notes)
    assert any("% full" in note for note in view.notes)
    kept = Conversation.load(next((tmp_path / "conversations").iterdir()))
    assert len(kept.turns) == 7
    assert kept.left_out == chat.conversation.left_out > 0
    leavings = [note for note in view.notes if "does not see" in note]
    assert len(leavings) < 4, "several turns at once: each time the whole prompt is run again"
    view.lines = iter(["word " * 400])
    chat.run()
    assert "the context holds 256, the answer included: shorten it" in view.errors[0]
    assert len(chat.conversation.turns) == 7, "the message that does not fit is not kept"


def test_a_context_that_the_device_cannot_hold_is_not_promised(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert session.context == session.pair.max_context == 4096
    full = session.context
    for available in (200_000_000, 14_000_000):
        monkeypatch.setattr(device, "memory_bytes", lambda available=available: available)
        session.use(3)
        held, full = session.context, min(full, session.context)
    assert 2 < held < 4096
    monkeypatch.undo()
    session.use(3)


def test_flags_reach_the_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def load(*_: object, **settings: Any) -> api.Pair:
        given.update(settings)
        raise RequestError("enough")

    monkeypatch.setattr(api, "load", load)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["--model", "X", "--draft-bits", "4", "--max-context", "512", "--no-calibration", "--no-kernels"]) == 2
    del given["before_reading"]
    assert given == {"model": "X", "draft_model": api.AUTO, "draft_bits": 4, "max_context": 512, "calibrate": False,
                     "kernels": False}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_answer_that_was_broken_off_the_next_one_is_as_ever(
    session: Session, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent:
        def progress(self, done: int, total: int) -> None:
            pass

        def add(self, part: Part) -> None:
            pass

    def broken(output: object) -> None:
        raise error

    asked = [2, 5, 9], SamplingParams(6), Silent(), lambda: False
    expected = session.answer(*asked).content
    with monkeypatch.context() as patched:
        patched.setattr(engine_module, "read", broken)
        with pytest.raises(error):
            session.answer(*asked)
    assert session.answer(*asked).content == expected
