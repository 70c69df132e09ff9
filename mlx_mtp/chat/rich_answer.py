"""An answer on a terminal: Markdown that is final is printed, the block that still grows is drawn again and again."""

from __future__ import annotations

import time

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from mlx_mtp.channels import Part
from mlx_mtp.chat.settings import Thinking
from mlx_mtp.chat.terminal import PASTES_MARKED

SECONDS = 0.08  # between two drawings, at least
DRAWING_SHARE = 0.1  # of the time, at most: the device may wait for this thread
THOUGHT_LINES = 3  # of the thoughts, the last ones are seen as they come


class RichAnswer:
    """Draws at the bottom of the screen what may still change, and leaves above it what is final."""

    def __init__(self, console: Console, thinking: Thinking) -> None:
        self._console, self._thinking = console, thinking
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False,
                          redirect_stderr=False)
        self._waiting = ""  # what is said instead of an answer while none has come
        self._thoughts = ""
        self._began_thinking = 0.0
        self._pending = ""  # Markdown from the last block that is not final on
        self._has_printed = False
        self._next_drawing = 0.0

    def __enter__(self) -> RichAnswer:
        print(PASTES_MARKED, end="", flush=True)  # one may come before the next prompt is there
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._fold_thoughts()
        self._live.update(Text(""))
        self._print(self._pending)
        self._live.stop()

    def progress(self, done: int, total: int) -> None:
        if done < total:  # later the answer has begun
            self._waiting = f"reading {done} of {total} tokens"
            self._draw()

    def add(self, part: Part) -> None:
        self._waiting = ""
        if part.kind == "thinking":
            self._began_thinking = self._began_thinking or time.monotonic()
            self._thoughts += part.text
        elif part.kind == "answer":
            self._fold_thoughts()
            self._pending = (self._pending + part.text) if self._pending else part.text.lstrip("\n")
        self._draw()

    def _fold_thoughts(self) -> None:
        """Puts a line in the place of the thoughts."""
        if self._thoughts and self._thinking == "on":
            seconds = time.monotonic() - self._began_thinking
            self._console.print(f"▸ thought for {seconds:.1f} s (/thoughts shows it)", style="dim", markup=False)
        self._thoughts, self._began_thinking = "", 0.0

    def _print_what_is_final(self) -> None:
        if "\n" not in self._pending:
            return
        final = final_length(self._pending)
        if final:
            block, self._pending = self._pending[:final], self._pending[final:]
            self._print(block)

    def _print(self, markdown: str) -> None:
        if not markdown.strip():
            return
        if self._has_printed:
            self._console.print()
        self._console.print(as_markdown(markdown))
        self._has_printed = True

    def _draw(self) -> None:
        began = time.monotonic()
        if began < self._next_drawing:
            return
        self._print_what_is_final()  # here, and not at each token: a block may be long, and all of it is parsed
        room = max(self._console.height - 2, 1)
        shown: list[Text | _LastLines] = []
        if self._thoughts:
            shown.append(_LastLines(Text(self._thoughts.strip(), style="dim"), min(THOUGHT_LINES, room))
                         if self._thinking == "on" else Text("thinking…", style="dim"))
        if self._waiting:
            shown.append(Text(self._waiting, style="dim"))
        if self._pending.strip():
            if self._has_printed:
                shown.append(Text(""))
            shown.append(_LastLines(as_markdown(self._pending), room - 1))
        self._live.update(Group(*shown), refresh=True)
        ended = time.monotonic()
        self._next_drawing = max(began + SECONDS, ended + (ended - began) / DRAWING_SHARE)


class _LastLines:
    """As much of the end of something as fits; what is above would be beyond what can be drawn again."""

    def __init__(self, whole: Text | Markdown, room: int) -> None:
        self._whole, self._room = whole, max(room, 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._whole, options, pad=False)
        for line in lines[-self._room :]:
            yield from line
            yield Segment.line()


def as_markdown(text: str) -> Markdown:
    """To be printed. Rich would leave HTML out without a word; here it is text, as the model wrote it."""
    shown = Markdown("")
    shown.parsed = _parser().parse(text)
    return shown


def final_length(markdown: str) -> int:
    """How much of a text can not change any more, whatever follows: its whole lines up to its last block."""
    lines = markdown.splitlines(keepends=True)
    whole = lines if lines and lines[-1].endswith("\n") else lines[:-1]
    starts = [token.map[0] for token in _parser().parse("".join(whole)) if token.level == 0 and token.map is not None]
    return sum(len(line) for line in lines[: starts[-1]]) if len(starts) > 1 else 0


def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable("table").enable("strikethrough")
