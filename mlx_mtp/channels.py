"""Splits a model's text, as it streams, into what it answers, what it thinks and which tools it calls.

    <|channel>thought\\nThe user wants …<channel|>It is sunny.<|tool_call>call:weather{city:<|"|>Bern<|"|>}<tool_call|>
                       └── thinking ──┘          └ answer ─┘            └──────────── tool_call ─────────┘

Markers never come out, wherever a chunk of text ends: what may be the beginning of one is held back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["answer", "thinking", "tool_call"]

CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"
TOOL_CALL, TOOL_CALL_END = "<|tool_call>", "<tool_call|>"
# Those without a meaning where they stand are dropped: a model can write anything.
MARKERS = (CHANNEL, CHANNEL_END, TOOL_CALL, TOOL_CALL_END, "<|tool_response>", "<tool_response|>", "<|think|>",
           "<|turn>", "<turn|>")


@dataclass(frozen=True)
class Part:
    """A piece of text of one kind. A tool call comes whole, without its markers; the others come as they stream."""

    kind: Kind
    text: str


class ChannelParser:
    """Takes text in chunks that end anywhere; gives it out in parts.

    prompt_end: of the prompt that the text continues. Some chat templates open a channel there, for thoughts about what
    a tool gave.
    """

    def __init__(self, prompt_end: str = "") -> None:
        _, opened, channel = prompt_end.rpartition(CHANNEL)
        is_open = bool(opened) and not any(marker in channel for marker in MARKERS)
        self._held = ""
        self._kind: Kind = "thinking" if is_open else "answer"
        self._in_name = is_open and "\n" not in channel  # of a channel, its first line: no part of the text

    def add(self, text: str) -> list[Part]:
        """The parts that `text` makes certain."""
        self._held += text
        parts: list[Part] = []
        while (found := self._first_marker()) is not None:
            at, marker = found
            before, self._held = self._held[:at], self._held[at + len(marker) :]
            self._give(parts, before)
            self._enter(marker)
        if not self._in_name and self._kind != "tool_call":
            keep = max(overlap(self._held, marker) for marker in MARKERS)
            text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            self._give(parts, text)
        return parts

    def finish(self) -> list[Part]:
        """What was held back; a tool call that has no end comes as far as it got."""
        parts: list[Part] = []
        self._give(parts, self._held)
        self._held = ""
        return parts

    def _first_marker(self) -> tuple[int, str] | None:
        watched = (TOOL_CALL_END,) if self._kind == "tool_call" else ("\n", *MARKERS) if self._in_name else MARKERS
        found = [(at, marker) for marker in watched if (at := self._held.find(marker)) >= 0]
        return min(found, default=None)

    def _give(self, parts: list[Part], text: str) -> None:
        if text and not self._in_name:
            parts.append(Part(self._kind, text))

    def _enter(self, marker: str) -> None:
        if marker == "\n":
            self._in_name = False
        elif marker == CHANNEL:
            self._kind, self._in_name = "thinking", True
        elif marker == TOOL_CALL:
            self._kind, self._in_name = "tool_call", False
        elif marker in (CHANNEL_END, TOOL_CALL_END):
            self._kind, self._in_name = "answer", False


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a beginning of `marker`, but not all of it."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)
