"""One line on a terminal's stderr that says what goes on and goes away; nothing where there is no terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

SECONDS = 0.1  # between two drawings


class Progress:
    """What is being done, how far it is, and how long it will take."""

    def __init__(self, is_wanted: bool) -> None:
        self._is_wanted = is_wanted and sys.stderr is not None and sys.stderr.isatty()  # None where it was closed
        self._bar: Bar | None = None
        self._drawn = 0.0

    def show(self, text: str, done: int = 0, total: int | None = None) -> None:
        """total: None where nobody knows it."""
        if not self._is_wanted:
            return
        if self._bar is None:
            self._bar = _bar()
            self._bar.add_task(text)
            self._bar.start()
            self._drawn = 0.0
        now = time.monotonic()
        is_due = now - self._drawn >= SECONDS
        self._bar.update(self._bar.task_ids[0], description=text, completed=done, total=total, refresh=is_due)
        self._drawn = now if is_due else self._drawn

    def clear(self) -> None:
        """Takes the line away, so that something else can be printed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False,
        auto_refresh=False,  # nothing is drawn while others may draw, as the Hub's client while it downloads
    )
