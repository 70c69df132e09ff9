"""One decoding of a batch, by the bench's own clock; and what several of them amount to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

Tokens = list[tuple[int, int]]  # (row, token) of one step


@dataclass(frozen=True)
class Run:
    """Tokens of each row; seconds from the start to each row's first token, and, while all rows decode, a token.

    Only the time from when every row has its first token until the first row ends counts for `tokens_per_s`; it is
    None if there is no such time. Rows of equal length of one short prefill begin and end almost together.
    """

    texts: tuple[tuple[int, ...], ...]
    ttft: tuple[float, ...]
    tokens_per_s: float | None

    @property
    def tpot(self) -> float | None:
        """Seconds an output token of each row."""
        return None if self.tokens_per_s is None else len(self.texts) / self.tokens_per_s


def clocked(rows: int, max_tokens: int, steps: Iterable[Tokens]) -> Run:
    """Runs a batch to its end. Steps must hand their tokens over when the host has them."""
    texts: list[list[int]] = [[] for _ in range(rows)]
    first = [0.0] * rows
    all_began = counted = 0.0
    speed = None
    start = time.perf_counter()
    for step in steps:
        now = time.perf_counter()
        for row, token in step:
            if not texts[row]:
                first[row] = now - start
            texts[row].append(token)
        if not all_began and all(texts):
            all_began, counted = now, sum(map(len, texts))
        elif all_began and speed is None and any(len(text) >= max_tokens for text in texts):
            speed = (sum(map(len, texts)) - counted) / (now - all_began)
    return Run(tuple(map(tuple, texts)), tuple(first), speed)


@dataclass(frozen=True)
class Spread:
    """Median and range of one figure over the runs."""

    median: float
    least: float
    most: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        runs = tuple(values)
        return cls(statistics.median(runs), min(runs), max(runs), runs)


@dataclass(frozen=True)
class Difference:
    """Where texts leave those of plain decoding: how many rows do, and the first token of a row that is another."""

    rows: int
    row: int
    position: int
    got: int | None
    expected: int | None


def difference(texts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> Difference | None:
    """What differs first, by position; None if nothing does. A text that ends early differs where it ends."""
    found = [(at, row) for row, (text, other) in enumerate(zip(texts, expected, strict=True))
             if (at := _first_difference(text, other)) is not None]
    if not found:
        return None
    at, row = min(found)
    return Difference(len(found), row, at, _token(texts[row], at), _token(expected[row], at))


def _first_difference(text: Sequence[int], other: Sequence[int]) -> int | None:
    pairs: Iterator[tuple[int | None, int | None]] = (
        (_token(text, i), _token(other, i)) for i in range(max(len(text), len(other))))
    return next((i for i, (got, expected) in enumerate(pairs) if got != expected), None)


def _token(text: Sequence[int], index: int) -> int | None:
    return text[index] if index < len(text) else None
