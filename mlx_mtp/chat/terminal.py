"""A terminal with editing, colours and Markdown; and everything else, where text is just text."""

from __future__ import annotations

import signal
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from mlx_mtp.channels import Part
from mlx_mtp.chat.settings import Thinking
from mlx_mtp.errors import RequestError
from mlx_mtp.progress import Progress

INPUT_FLAGS, LOCAL_FLAGS = 0, 3  # of what tcgetattr returns
PASTES_MARKED, PASTES_UNMARKED = "\x1b[?2004h", "\x1b[?2004l"  # so that a prompt tells them from typing
PATIENCE = 2.0  # seconds: Ctrl-C pressed again within them is the same wish, and what came is kept
FENCE = '"""'  # around a message of several lines, where there is no editor for it


class AnswerView(Protocol):
    """Shows one answer as it comes; used as a context."""

    def __enter__(self) -> AnswerView: ...
    def __exit__(self, *_: object) -> None: ...
    def progress(self, done: int, total: int) -> None: ...
    def add(self, part: Part) -> None: ...


class View(Protocol):
    """Where a chat takes place. is_interactive: somebody sits there and can be asked."""

    @property
    def is_interactive(self) -> bool: ...
    @property
    def width(self) -> int: ...
    def read(self) -> str | None:
        """The next message or command; None at the end. Raises KeyboardInterrupt for Ctrl-C."""

    def edit(self, text: str) -> str | None:
        """The text as the user changed it; None if there is nobody to do it."""

    def confirm(self, question: str) -> bool: ...
    def answer(self, thinking: Thinking) -> AnswerView: ...
    def show(self, text: str) -> None:
        """What a command was asked for."""

    def note(self, text: str) -> None:
        """What a user may want to know."""

    def error(self, text: str) -> None: ...


class Stop:
    """Whether Ctrl-C was pressed. One more after PATIENCE, where the first is not heeded, raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._pressed: float | None = None

    def __call__(self) -> bool:
        return self._pressed is not None

    def press(self) -> None:
        now = time.monotonic()
        if self._pressed is not None and now - self._pressed > PATIENCE:
            raise KeyboardInterrupt
        self._pressed = now if self._pressed is None else self._pressed


@contextmanager
def holding_ctrl_c() -> Iterator[Stop]:
    """Within it Ctrl-C interrupts nothing: whoever works asks the Stop between two steps."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.press()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def silent_keyboard() -> Iterator[None]:
    """Within it what is typed between two prompts, which would tear what is drawn, is not shown; the next one gets it.

    Enter stays what it is: as a line's end it could not be told from Ctrl-J. Ctrl-C stays a signal.
    """
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    silent = termios.tcgetattr(keyboard)
    silent[INPUT_FLAGS] &= ~termios.ICRNL
    silent[LOCAL_FLAGS] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(keyboard, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        print(PASTES_UNMARKED, end="", flush=True)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


class PlainView:
    """Answers to stdout and nothing else there; the rest to stderr. A message is a line, or lines between fences."""

    width = 80

    def __init__(self, is_interactive: bool) -> None:
        self.is_interactive, self.has_complained = is_interactive, False

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self) -> str | None:
        line = self._line("> ")
        if line is None or not line.startswith(FENCE):
            return line
        lines = [line[len(FENCE) :]]
        while not lines[-1].rstrip().endswith(FENCE):
            line = self._line("… ")
            if line is None:
                raise RequestError(f"the message that began with {FENCE} has no end: expected {FENCE} after it")
            lines.append(line)
        lines[-1] = lines[-1].rstrip()[: -len(FENCE)]
        return "\n".join(lines).strip("\n")

    def edit(self, text: str) -> str | None:
        return None

    def confirm(self, question: str) -> bool:
        if not self.is_interactive:
            self.note(f"{question}: not asked, there is no terminal (--yes allows it)")
            return False
        line = self._line(f"{question} [y/N] ")
        return line is not None and line.strip().lower() in ("y", "yes")

    def answer(self, thinking: Thinking) -> AnswerView:
        return PlainAnswer(thinking)

    def show(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(f"[{text}]", file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        self.has_complained = True
        print(f"error: {text}", file=sys.stderr, flush=True)

    def _line(self, prompt: str) -> str | None:
        if self.is_interactive:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None


class PlainAnswer:
    """Writes the answer to stdout as it comes, thoughts to stderr."""

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._progress = Progress(True)
        self._has_begun = False

    def __enter__(self) -> PlainAnswer:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.clear()
        print(flush=True)

    def progress(self, done: int, total: int) -> None:
        if done < total:  # later the answer has begun
            self._progress.show(f"prompt {done}/{total}", done, total)

    def add(self, part: Part) -> None:
        self._progress.clear()
        if part.kind == "thinking" and self._thinking == "on":
            print(part.text, end="", file=sys.stderr, flush=True)
        elif part.kind == "answer":
            text = part.text if self._has_begun else part.text.lstrip()
            self._has_begun = self._has_begun or bool(text)
            print(text, end="", flush=True)


class RichView:
    """A prompt with history, editing, several lines and paste; Markdown as it streams."""

    is_interactive, has_complained = True, False

    def __init__(self, history: Path, commands: Sequence[str]) -> None:
        from prompt_toolkit import PromptSession
        from rich.console import Console

        self._console = Console(highlight=False)
        self._prompt = _prompt_session(history, commands)
        self._confirmation = PromptSession[str]()  # its answers are no messages: they stay out of the history
        self._keyboard = silent_keyboard()

    def __enter__(self) -> RichView:
        self._keyboard.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._keyboard.__exit__(None, None, None)

    @property
    def width(self) -> int:
        return self._console.width

    def read(self) -> str | None:
        return self._ask("> ", "")

    def edit(self, text: str) -> str | None:
        return self._ask("edit> ", text) or ""

    def confirm(self, question: str) -> bool:
        self._console.print(question, style="yellow", markup=False)
        try:
            return self._confirmation.prompt("y/N> ").strip().lower() in ("y", "yes")
        except EOFError:
            return False

    def answer(self, thinking: Thinking) -> AnswerView:
        from mlx_mtp.chat.rich_answer import RichAnswer

        return RichAnswer(self._console, thinking)

    def show(self, text: str) -> None:
        self._console.print(text, markup=False)

    def note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False)

    def error(self, text: str) -> None:
        self._console.print(f"error: {text}", style="red", markup=False, soft_wrap=True)

    def _ask(self, prompt: str, text: str) -> str | None:
        try:
            return str(self._prompt.prompt(prompt, default=text))
        except EOFError:
            return None


def _prompt_session(history: Path, commands: Sequence[str]) -> Any:
    """Enter sends, Alt-Enter or Ctrl-J begins a new line, what is pasted stays as it is."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    class Kept(FileHistory):
        """Where the file cannot be read or written, what was typed is kept until the end: that ends no chat."""

        def load_history_strings(self) -> list[str]:
            try:
                return list(super().load_history_strings())
            except OSError:
                return []

        def store_string(self, string: str) -> None:
            with suppress(OSError, UnicodeError):
                history.parent.mkdir(parents=True, exist_ok=True)
                super().store_string(string)

    completer = WordCompleter(list(commands), sentence=True)
    return PromptSession[str](history=Kept(history), multiline=True, key_bindings=keys, completer=completer,
                              complete_while_typing=False, enable_open_in_editor=True, prompt_continuation="  ")
