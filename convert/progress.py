"""Bars on stderr, if that is a terminal: bytes, rate and time left while converting, steps while verifying."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Bar:
    """One bar; `advance` adds to what is done, `show` says what is being done and how far it is."""

    def __init__(self, progress: Progress, text: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(text, total=total)

    def advance(self, count: int) -> None:
        self._progress.update(self._task, advance=count)

    def show(self, text: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=text, completed=done, total=total)


@contextmanager
def bytes_bar(text: str, total: int) -> Iterator[Bar]:
    """A bar of bytes, with rate and time left."""
    with _progress(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as progress:
        yield Bar(progress, text, total)


@contextmanager
def steps_bar(text: str) -> Iterator[Bar]:
    """A bar of steps, whose text and total change."""
    with _progress(MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        yield Bar(progress, text, None)


def _progress(*columns: BarColumn | DownloadColumn | MofNCompleteColumn | TimeRemainingColumn | TransferSpeedColumn
              ) -> Progress:
    console = Console(stderr=True)
    return Progress(TextColumn("{task.description}", markup=False), BarColumn(), *columns, console=console,
                    transient=True, disable=not console.is_terminal)
