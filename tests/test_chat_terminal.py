"""The command in a real terminal (a pseudo-terminal), and without any."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pexpect
import pytest
from rich.console import Console

from mlx_mtp.channels import Part
from mlx_mtp.chat import rich_answer
from mlx_mtp.chat.__main__ import main, parser
from mlx_mtp.chat.rich_answer import RichAnswer, as_markdown, final_length
from mlx_mtp.chat.settings import NAMES
from mlx_mtp.chat.terminal import holding_ctrl_c

pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")  # pexpect's, beside MLX's threads

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "mlx_mtp.chat"]
READY = "\x1b\\[\\?2004h"  # a prompt is there
GAP = r"(?:\s|\x1b\[[0-9;?]*[A-Za-z])+"  # where a line may be broken
STATUS = r"(\d+) tokens, [\d.]+ tok/s, mean acceptance length [\d.]+, K (\d+), context (\d+) of 4096"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>]")
ENDLESS = "/set temp 2\r/set max_tokens 3000\r"  # what such a hot model says seldom ends by itself


def user_folders(home: Path) -> dict[str, str]:
    """An environment in which the user's files lie under `home`, and no size of another terminal."""
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return environment | {"HOME": str(home), "XDG_DATA_HOME": str(home / "data"), "TERM": "xterm-256color",
                          "XDG_CONFIG_HOME": str(home / "config"), "XDG_STATE_HOME": str(home / "state"),
                          "PROMPT_TOOLKIT_NO_CPR": "1", "PYTHONIOENCODING": "utf-8", "NO_COLOR": ""}


def started(home: Path, *arguments: str, columns: int = 80) -> Any:
    child = pexpect.spawn(COMMAND[0], [*COMMAND[1:], *arguments], cwd=str(ROOT), env=user_folders(home),
                          dimensions=(30, columns), encoding="utf-8", timeout=30)
    child.delaybeforesend = None
    child.expect(READY)
    return child


def expect(child: Any, pattern: str) -> None:
    child.expect(pattern.replace(" ", GAP))


def saved(home: Path) -> dict[str, Any]:
    """The conversation that was written last."""
    files = sorted(home.rglob("conversations/*.json"), key=lambda path: path.stat().st_mtime_ns)
    conversation: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8"))
    return conversation


def said(home: Path, role: str = "user") -> list[str]:
    return [message["content"] for message in saved(home)["messages"] if message["role"] == role]


def test_three_turns_every_command_and_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    child = started(tmp_path, "-m", "30")
    for question in ("Explain `winreg.HKEY_USERS`.", "Hello ünd 🦙", "And `operator.lt`?"):
        child.send(question + "\r")
        expect(child, STATUS)
    used = int(child.match[3])
    assert said(tmp_path) == ["Explain `winreg.HKEY_USERS`.", "Hello ünd 🦙", "And `operator.lt`?"]
    for line, expected in (
        ("/help", "/export file"), ("/stats", f"context: {used} of 4096"), ("/undo", "taken back: And"),
        ("/system Be brief.", "system prompt: Be brief."), ("/set top_k 5", "top_k is 5"), ("/set", "thinking off"),
        ("/retry", STATUS), (f"/save {tmp_path}/a.json", "saved to"), (f"/export {tmp_path}/a.md", "written to"),
        ("/reset", "a new conversation begins"), (f"/load {tmp_path}/a.json", "going on after 2 turns"),
        ("/tools", "tools: none"), ("/model", "model: built-in"), ("/model /nowhere", "error: "),
        ("/thoughts", "error: "), ("/set temp hot", "error: temperature is 'hot'"), ("/what", "error: there is no"),
        ("/load nowhere.json", "error: nowhere.json cannot be read"), ("/tools nowhere.py", "error: the tools file"),
    ):
        child.send(line + "\r")
        expect(child, expected)
    child.send("/edit\r")
    child.expect("edit> ")
    child.send("\x7f" * 20 + "Bye\r")  # the old message is there to be edited
    expect(child, STATUS)
    assert said(tmp_path)[-1] == "Bye"
    child.send(ENDLESS + "Go on\r")
    expect(child, "max_tokens is 3000")
    expect(child, "Go on")
    time.sleep(0.5)
    child.sendintr()
    child.expect("stopped")
    expect(child, STATUS)
    answer = saved(tmp_path)["messages"][-1]
    assert answer["is_interrupted"]
    assert answer["content"]
    assert said(tmp_path)[-1] == "Go on"
    child.send("\x1b[A")  # Up: what was typed last
    expect(child, "Go on")
    child.sendintr()
    expect(child, "Ctrl-D or /quit leaves")
    child.send("/quit\r")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_long_paste_in_a_narrow_window_a_kill_and_the_conversation_goes_on(tmp_path: Path) -> None:
    child = started(tmp_path, "-m", "20", columns=40)
    pasted = "\n".join("ünd 🦙" if i % 50 == 0 else "x" for i in range(300))
    child.send(f"\x1b[200~{pasted}\x1b[201~")
    child.send("\r")
    expect(child, STATUS)
    assert said(tmp_path) == [pasted]
    child.send("one\x1b\rtwo\nthree\r")  # Alt-Enter and Ctrl-J
    expect(child, STATUS)
    assert said(tmp_path)[-1] == "one\ntwo\nthree"
    child.send("/stats\r")
    expect(child, "in the draft:(.*)" + READY)
    bars = re.findall(r"  \d+ +\d+% of +\d+ █+", ESCAPES.sub("", child.match[1]))  # the prompt may follow the last one
    assert bars
    assert all(len(bar) <= 40 for bar in bars), bars
    child.send(ENDLESS + "Go on\r")
    expect(child, "max_tokens is 3000")
    expect(child, "Go on")
    time.sleep(0.4)
    child.kill(signal.SIGKILL)
    child.expect(pexpect.EOF)
    child.close()
    assert said(tmp_path)[-1] == "Go on"
    assert len(said(tmp_path, "assistant")) == 2

    child = started(tmp_path, "--resume", "-m", "20")
    assert "going on after 3 turns" in child.before
    assert "/retry asks again" in child.before
    child.send("/retry\r")
    expect(child, STATUS)
    assert len(said(tmp_path, "assistant")) == 3
    child.send("\x1b[A\x1b[A")  # the history is the last session's too
    expect(child, "Go on")
    child.sendintr()
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert len(list(tmp_path.rglob("conversations/*.json"))) == 1


def test_without_a_terminal_lines_go_in_answers_come_out_and_all_else_goes_to_stderr(tmp_path: Path) -> None:
    (tmp_path / "config" / "mlx_mtp").mkdir(parents=True)
    (tmp_path / "config" / "mlx_mtp" / "chat.json").write_text("{")
    lines = ["Hello", "", '"""Two', 'lines 🦙"""', "/set temp hot", "/stats", "Caf\udce9", "/load nowhere", "Bye"]
    done = subprocess.run(
        [*COMMAND, "-m", "12"], cwd=ROOT, env=user_folders(tmp_path),
        input="\n".join(lines).encode("utf-8", "surrogateescape"), capture_output=True, check=False)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 2, err
    assert "Traceback" not in err
    assert said(tmp_path) == ["Hello", "Two\nlines 🦙", "Bye"]
    answers = said(tmp_path, "assistant")
    assert [part.strip() for part in answers] == answers
    assert "".join(out.split()) == "".join("".join(answers).split())
    assert len(re.findall(STATUS, err)) == 3
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    for error, word in zip(errors, ["chat.json", "hot", "no character", "nowhere"], strict=True):
        assert word in error


@pytest.mark.parametrize(("flag", "name"), [("--resume", "none.json"), ("--tools", "tools.py")])
def test_without_a_terminal_nothing_is_said_to_another_conversation_or_without_the_tools(
    tmp_path: Path, flag: str, name: str
) -> None:
    (tmp_path / "tools.py").write_text("def (")
    done = subprocess.run([*COMMAND, flag, str(tmp_path / name)], cwd=ROOT, env=user_folders(tmp_path), input="Hello\n",
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert [name in line for line in done.stderr.splitlines() if line.startswith("error: ")] == [True]
    assert not list(tmp_path.rglob("conversations/*.json"))


def test_ctrl_c_without_a_terminal_keeps_what_came_and_exits_with_130(tmp_path: Path) -> None:
    with subprocess.Popen([*COMMAND, "-m", "3000", "--temp", "2"], cwd=ROOT, env=user_folders(tmp_path), bufsize=0,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Hello\nNever read\n")
        while len(process.stdout.read(1).strip()) == 0:
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert said(tmp_path) == ["Hello"]
    assert saved(tmp_path)["messages"][-1]["is_interrupted"]


def test_help_is_quick_and_imports_no_model_and_no_terminal() -> None:
    check = ("import sys, contextlib, mlx_mtp.chat.__main__ as chat\n"
             "with contextlib.suppress(SystemExit): chat.main(['--help'])\n"
             "print(sorted({'torch', 'transformers', 'mlx_lm', 'huggingface_hub', 'prompt_toolkit', 'rich'} "
             "& set(sys.modules)))")
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 5
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--thinking" in done.stdout


def test_a_flag_sets_what_it_names_and_a_bad_one_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    args = vars(parser().parse_args([]))
    assert all(args[name] is None for name in NAMES)
    for arguments, complaint in ((["--temp", "hot"], "temperature is 'hot'"), (["--model", "/nowhere"], "/nowhere"),
                                 (["--num-draft-tokens", "99"], "num_draft_tokens is 99")):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert complaint in err
        assert err.count("\n") == 1


MARKDOWN = """\
# Title

Some *text* with `code`
over two lines.

1. one

   more of one
2. two
```python
def f():

    return "```"
```
<div>a block</div>

| a | b |
|---|---|
| 1 | 2 |

> quote
lazy
Last one."""


def test_what_is_printed_while_it_streams_reads_as_the_whole_does() -> None:
    """Fed a character at a time: what is called final never changes its meaning."""
    blocks, pending = [], ""
    for letter in MARKDOWN:
        pending += letter
        if letter == "\n" and (final := final_length(pending)):
            blocks.append(pending[:final])
            pending = pending[final:]
    blocks.append(pending)
    assert "".join(blocks) == MARKDOWN
    assert len(blocks) >= 5

    def shown(*texts: str) -> list[str]:
        console = Console(width=40, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
        for text in texts:
            console.print(as_markdown(text))
        console.file.close()
        return [line.strip() for line in console.export_text().splitlines() if line.strip()]

    assert shown(*blocks) == shown(MARKDOWN)
    assert "<div>a block</div>" in shown(MARKDOWN), "HTML is what a model may be asked for"


def test_a_long_block_is_not_parsed_again_for_each_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    parser = rich_answer._parser
    monkeypatch.setattr(rich_answer, "_parser", lambda: parsed.append(1) or parser())
    with open(os.devnull, "w") as nowhere, RichAnswer(Console(file=nowhere, force_terminal=True), "off") as answer:
        for i in range(500):
            answer.add(Part("answer", "```\n" if i == 0 else f"line {i}\n"))
    assert len(parsed) < 100


def test_ctrl_c_pressed_twice_at_once_is_one_wish_and_again_later_ends_what_does_not_heed_it(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    with holding_ctrl_c() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop()
        monkeypatch.setattr("mlx_mtp.chat.terminal.PATIENCE", 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
