"""The chat without a terminal or a real model: files, settings, tools, commands, and errors that end nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_support import Recorder, ToldEngine, model_with_template, new_chat, new_session

from mlx_mtp import RequestError, SamplingParams
from mlx_mtp.chat import figures, settings, tools
from mlx_mtp.chat.commands import COMMANDS
from mlx_mtp.chat.conversation import Conversation, Message, ToolCall, write_whole
from mlx_mtp.chat.session import Session
from mlx_mtp.chat.settings import Settings
from mlx_mtp.chat.tools import Toolbox
from mlx_mtp.engine.request import RequestStats

CALL = '<|tool_call>call:add{a:2,b:<|"|>3<|"|>}<tool_call|>'
TOOLS = '''
from __future__ import annotations
from math import floor

def add(a: int, b: str) -> str:
    """Adds.

    Args:
        a: a number
        b: another, as text
    """
    return f"{a + floor(float(b))} 🦙"

def fail(reason: str) -> dict:
    """Fails.

    Args:
        reason: why
    """
    raise ValueError(reason)

def _hidden(): pass
'''


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return new_session(model_with_template(tmp_path_factory.mktemp("templated")))


@pytest.fixture
def toolbox(tmp_path: Path) -> Toolbox:
    path = tmp_path / "tools.py"
    path.write_text(TOOLS)
    return Toolbox.load(path)


def told(session: Session, *texts: str) -> ToldEngine:
    engine = ToldEngine(session, *texts)
    session._engine = engine  # type: ignore[assignment]
    return engine


def conversation() -> Conversation:
    call = ToolCall("call_0", "add", {"a": 1, "b": "2"})
    return Conversation([
        Message("user", "Hi 🦙\n\nthere"), Message("assistant", "", "Hm.", (call,)),
        Message("tool", "3", name="add", tool_call_id="call_0"), Message("assistant", "Three.", is_interrupted=True),
        Message("user", "More")], "Be brief.", 1, "a/b")


def test_a_saved_conversation_comes_back_as_it_was_and_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "one.json"
    conversation().save(path)
    assert Conversation.load(path) == conversation()
    assert "Hi 🦙" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["one.json"], "nothing is left beside it"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.json"
    write_whole(path, "old")

    def replace(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(RequestError, match="No space left on device"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["one.json"]


@pytest.mark.parametrize("content", [
    b"{", b"\xff", b"[]", b'{"format": "x", "messages": []}', b'{"format": "mlx_mtp.chat/1", "messages": [1]}',
    b'{"format": "mlx_mtp.chat/1", "messages": [{"role": "user"}]}',
    b'{"format": "mlx_mtp.chat/1", "messages": [{"role": "user", "content": "", "colour": 1}]}',
    b'{"format": "mlx_mtp.chat/1", "messages": [{"role": "assistant", "content": ""}]}',
    b'{"format": "mlx_mtp.chat/1", "messages": [{"role": "assistant", "content": "", "tool_calls": [3]}]}',
    b'{"format": "mlx_mtp.chat/1", "messages": [], "left_out": "all"}',
])
def test_what_is_no_conversation_is_one_line_that_names_the_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"x\.json") as caught:
        Conversation.load(path)
    assert "\n" not in str(caught.value)


def test_the_markdown_holds_what_was_said_thought_and_called() -> None:
    text = conversation().markdown()
    for part in ("## System\n\nBe brief.", "## User\n\nHi 🦙\n\nthere", "Hm.", '"add"', "## Tool (add)\n\n3",
                 "Three.\n\n*(interrupted)*"):
        assert part in text


def test_settings_are_the_dataclasses_and_each_can_be_set_by_its_flags_name(tmp_path: Path) -> None:
    assert Settings().sampling == SamplingParams()
    changed = Settings().with_values({"temp": "0.5", "top-k": "7", "max_tokens": "9", "num_draft_tokens": "2",
                                      "thinking": "hide", "seed": "3", "min-p": "0.1", "top_p": "0.9"})
    assert changed == Settings(SamplingParams(9, 0.5, 7, 0.9, 0.1, 3), 2, "hide")
    path = tmp_path / "chat.json"
    assert settings.load(path) == Settings()
    settings.save(changed, path)
    assert settings.load(path) == changed
    settings.save(Settings(), path)
    assert json.loads(path.read_text()) == {}


@pytest.mark.parametrize("content", ["{", "3", '{"tempo": 1}', '{"temperature": "hot"}', '{"thinking": 1}'])
def test_a_broken_settings_file_is_one_line_that_names_it(content: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text(content)
    with pytest.raises(RequestError, match=r"chat\.json cannot be used"):
        settings.load(path)


def test_tools_are_offered_called_after_a_yes_and_their_results_fed_back(
    session: Session, toolbox: Toolbox, tmp_path: Path
) -> None:
    said = f"<|channel>thought\nAdd them.\n<channel|>{CALL}"
    engine = told(session, said, "Five.", "Bye.")
    view = Recorder()
    chat = new_chat(session, tmp_path, view, Settings(thinking="hide"))
    chat.use_tools(toolbox)
    assert list(toolbox.functions) == ["add", "fail"]
    chat.take("2 + 3?")
    assert view.asked == ["call add(a=2, b='3')?"]
    assert "<|tool>declaration:add" in engine.prompts[0]
    assert engine.prompts[1].endswith(
        "<|turn>model\n<|channel>thought\nAdd them.\n<channel|>" + CALL
        + '<|tool_response>response:add{value:<|"|>5 🦙<|"|>}<tool_response|>')
    assert [message.role for message in chat.conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.conversation.messages[-1].content == "Five."
    chat.take("Thanks")
    assert "Add them." not in engine.prompts[2]
    assert Conversation.load(next((tmp_path / "conversations").iterdir())) == chat.conversation


@pytest.mark.parametrize(("call", "agrees", "told_model"), [
    (CALL, False, tools.REFUSED),
    ('<|tool_call>call:fail{reason:<|"|>no }<|"|>}<tool_call|>', True, "Error: ValueError: no }"),
    ("<|tool_call>call:add{a:1}<tool_call|>", True, "Error: TypeError"),
    ("<|tool_call>call:rob{a:1}<tool_call|>", True, "Error: there is no function rob."),
])
def test_a_call_that_is_refused_or_fails_is_told_to_the_model(
    call: str, agrees: bool, told_model: str, session: Session, toolbox: Toolbox, tmp_path: Path
) -> None:
    engine = told(session, call, "I see.")
    chat = new_chat(session, tmp_path, Recorder(agrees=agrees))
    chat.use_tools(toolbox)
    chat.take("Go")
    assert told_model in engine.prompts[1]
    assert chat.conversation.messages[-1].content == "I see."


def test_a_trusted_chat_asks_nothing_and_a_model_that_calls_for_ever_is_told_to_stop(
    session: Session, toolbox: Toolbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_mtp.chat.chat.MOST_CALLS", 3)
    engine = told(session, *[CALL] * 5, "Done.")
    view = Recorder()
    chat = new_chat(session, tmp_path, view, is_trusted=True)
    chat.use_tools(toolbox)
    chat.take("Go")
    assert view.asked == []
    assert engine.prompts[-1].count("5 🦙") == 3
    assert engine.prompts[-1].count("more than 3 calls") == 1
    assert len(engine.prompts) == 5
    assert view.notes[-1].endswith("the turn ends here")
    assert chat.conversation.messages[-1].role == "assistant"
    assert not chat.conversation.messages[-1].tool_calls


def test_a_call_that_cannot_be_read_is_one_line_and_the_answer_stays(session: Session, tmp_path: Path) -> None:
    told(session, "Let me see.<|tool_call>call:add{a:<tool_call|>")
    view = Recorder()
    chat = new_chat(session, tmp_path, view)
    chat.take("Go")
    assert view.errors == ["the model's tool call cannot be read ('call:add{a:'): nothing was called"]
    assert chat.conversation.messages[-1].content == "Let me see."


def test_ctrl_c_at_the_question_refuses_the_call_and_the_turn_goes_on(
    session: Session, toolbox: Toolbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def confirm(_: str) -> bool:
        raise KeyboardInterrupt

    told(session, CALL, "As you like.")
    view = Recorder()
    monkeypatch.setattr(view, "confirm", confirm)
    chat = new_chat(session, tmp_path, view)
    chat.use_tools(toolbox)
    chat.take("Go")
    assert [message.content for message in chat.conversation.messages] == ["Go", "", tools.REFUSED, "As you like."]


@pytest.mark.parametrize("body", ["raise SystemExit(3)", "x = []; x.append(x); return x", "return {(1, 2): 3}"])
def test_a_tool_that_leaves_or_gives_what_is_no_json_ends_nothing(body: str) -> None:
    names: dict[str, Any] = {}
    exec(f"def add():\n    {body}", names)
    assert Toolbox({"add": names["add"]}).call(ToolCall("call_0", "add", {})).content.startswith("Error: ")


def test_half_a_character_is_kept_as_json_writes_it_and_loses_no_conversation(
    session: Session, tmp_path: Path
) -> None:
    told(session, "One.")
    view = Recorder(["Hi", "/system Caf\udce9", "More"])
    chat = new_chat(session, tmp_path, view)
    chat.run()
    assert len(view.errors) == 1
    kept = Conversation.load(next((tmp_path / "conversations").iterdir()))
    assert (kept.system, len(kept.messages)) == ("Caf\udce9", 2)


@pytest.mark.parametrize(("source", "message"), [
    ("def (", "SyntaxError"), ("import nowhere_at_all", "ModuleNotFoundError"), ("raise SystemExit(3)", "SystemExit"),
    ("x = 3", "defines no function"), ("def f(x):\n    'Does.'", "type hint"), (None, "FileNotFoundError"),
])
def test_a_broken_tools_file_is_one_line(source: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tools.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(RequestError, match=message) as caught:
        Toolbox.load(path)
    assert "\n" not in str(caught.value)


def test_whatever_goes_wrong_is_one_line_and_the_chat_goes_on(session: Session, tmp_path: Path) -> None:
    told(session, "Still here.")
    view = Recorder(["/set temp hot", "/set colour 3", "/set temp", f"/load {tmp_path}/none.json", "/model /nowhere",
                     f"/tools {tmp_path}/none.py", "/hlep", "/undo", "/retry", "/edit", "/save", "/quit now",
                     f"/save {tmp_path}/a\0b", "/hlep\nof two lines", "", "  ", "Hello?"])
    chat = new_chat(session, tmp_path, view)
    chat.run()
    assert len(view.errors) == 14
    assert not any("\n" in error for error in view.errors)
    assert "did you mean /help?" in view.errors[6]
    assert chat.conversation.messages[-1].content == "Still here."


def test_a_folder_that_cannot_be_written_is_told_once_and_the_chat_goes_on(session: Session, tmp_path: Path) -> None:
    told(session, "One.", "Two.")
    (tmp_path / "conversations").write_text("in the way")
    view = Recorder(["Hi", "Ho"])
    chat = new_chat(session, tmp_path, view)
    chat.run()
    assert len(view.errors) == 1
    assert [message.content for message in chat.conversation.messages] == ["Hi", "One.", "Ho", "Two."]


def test_the_commands_do_what_help_says(session: Session, tmp_path: Path) -> None:
    engine = told(session, "One.", "Other one.", "Edited one.", "Two.")
    view = Recorder()
    chat = new_chat(session, tmp_path, view)
    chat.take("/help")
    assert all(name in view.shown[-1] for name in COMMANDS)
    chat.take("/system Be brief.")
    chat.take("Hi")
    chat.take("/retry")
    assert [message.content for message in chat.conversation.messages] == ["Hi", "Other one."]
    chat.take("/edit")
    assert [message.content for message in chat.conversation.messages] == ["Hi, changed", "Edited one."]
    chat.take(f"/save {tmp_path}/kept.json")
    chat.take("More")
    chat.take("/undo")
    chat.take(f"/export {tmp_path}/kept.md")
    assert "## User\n\nHi, changed\n\n## Assistant\n\nEdited one.\n" in (tmp_path / "kept.md").read_text()
    before = chat.conversation
    chat.take("/reset")
    assert (chat.conversation.messages, chat.conversation.system) == ([], "Be brief.")
    chat.take(f"/load {tmp_path}/kept.json")
    assert chat.conversation == before
    chat.take("/set")
    assert "temperature 0.0" in view.shown[-1]
    chat.take("/set thinking hide")
    chat.take("/set save")
    assert settings.load(tmp_path / "chat.json").thinking == "hide"
    chat.take("/system -")
    assert chat.conversation.system is None
    chat.take("/quit")
    assert chat.is_over
    assert all("Be brief." in prompt for prompt in engine.prompts)
    assert view.errors == []


def test_the_bars_show_each_positions_share_of_the_rounds_that_drafted_so_far() -> None:
    stats = RequestStats(100, 60, 41, 20, 50, 21, (15, 5, 1), {2: 10, 3: 10}, 2.05, 1.0, 20.0, 0.25, 4.0, 1.0)
    for width in (40, 120):
        lines = figures.report([stats], 4096, 141, width).splitlines()
        assert max(map(len, lines)) <= 80
        bars = [line for line in lines if "█" in line]
        assert [bar.split()[:4] for bar in bars] == [
            ["1", "75%", "of", "20"], ["2", "25%", "of", "20"], ["3", "10%", "of", "10"]]
        room = min(width, 80) - bars[0].index("█")
        assert [bar.count("█") for bar in bars] == [round(share * room) for share in (0.75, 0.25, 0.1)]
        assert all(len(bar) <= width for bar in bars)
    assert "60 of them reused" in lines[1]
    assert any("2.00x the speed of plain decoding" in line for line in lines)
    assert "no answer" not in figures.report([], 4096, 0, 40)
