"""What a sweep found: the schema of its JSON file, and the tables that are printed.

The file is one `Record` as JSON: every dataclass below an object with its fields as keys, a tuple a list, None null.
Times are in milliseconds, rates in tokens or 10^9 bytes a second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.measure import Difference, Spread
from bench.runners import DraftLength
from mlx_mtp.check.command import write_whole

NOTHING = "-"
SCHEMA = "mlx_mtp bench.decode 1"


@dataclass(frozen=True)
class RunnerResult:
    """One decoder in one cell.

    name: ours, mlx-lm or mlx-vlm. num_draft_tokens: K, 0 for plain decoding. tokens_per_s: of all rows together,
    while all decode; null where that time was none. tpot_ms: of one row. ttft_ms: median over the rows, from when all
    are submitted. speedup: tokens_per_s over that of ours with K = 0. mean_num_draft_tokens, mean_acceptance_length,
    acceptance_at: over the rounds of all runs, see bench.runners.Drafting. share_of_bound: the least time in which a
    round's weights can be read, over the round's time, the median of the runs; null for the peers.
    difference: from plain decoding of each row alone; null if there is none. failed: why a peer did not run; all
    figures are null then.
    """

    name: str
    num_draft_tokens: DraftLength
    tokens_per_s: Spread | None = None
    tpot_ms: Spread | None = None
    ttft_ms: Spread | None = None
    speedup: float | None = None
    mean_num_draft_tokens: float | None = None
    mean_acceptance_length: float | None = None
    acceptance_at: tuple[float, ...] = ()
    share_of_bound: float | None = None
    difference: Difference | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Split:
    """A round of ours in the engine's pipeline and its parts, each measured alone, in turns; rest_ms is what they leave
    over, less than nothing where they overlap."""

    num_draft_tokens: int
    round_ms: float
    draft_ms: float
    verify_ms: float
    rest_ms: float


@dataclass(frozen=True)
class CellResult:
    """One batch. prompts: their kind; context: the tokens asked for, 0 for the prompts as they are; answer_tokens: that
    every row decodes, cut so that none ends earlier; splits: only of the first kind of prompts."""

    rows: int
    prompts: str
    context: int
    prompt_tokens: tuple[int, ...]
    answer_tokens: int
    runners: tuple[RunnerResult, ...]
    splits: tuple[Split, ...] = ()


@dataclass(frozen=True)
class Agreement:
    """One row decoded by the bench and by mlx_mtp.generate in turns: tokens/s by the bench's clock, and by the
    statistics that generate returns. apart: |bench / generate - 1|, the median of the pairs."""

    num_draft_tokens: DraftLength
    bench_tokens_per_s: Spread
    generate_tokens_per_s: Spread
    apart: float


@dataclass(frozen=True)
class Record:
    """card: machine and checkpoint. settings: of the sweep. bandwidth: GB/s of the probes (bench.bandwidth).
    is_exact: whether equal text was demanded (float32 on CPU) or differences are only reported."""

    card: Mapping[str, str]
    settings: Mapping[str, Any]
    bandwidth: Mapping[str, float]
    is_exact: bool
    cells: tuple[CellResult, ...]
    agreement: tuple[Agreement, ...] = ()
    schema: str = field(default=SCHEMA)

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")


COLUMNS = ("rows", "prompts", "tokens", "decoder", "K", "tok/s", "(range)", "speed-up", "TTFT ms", "TPOT ms",
           "accepted", "of bound", "text")


def cell_lines(cell: CellResult) -> list[tuple[str, ...]]:
    """A line of the table for each decoder; `accepted` is the mean acceptance length."""
    name = f"{cell.prompts} {cell.context}" if cell.context else cell.prompts
    start = (str(cell.rows), name, f"{_range(cell.prompt_tokens)}+{cell.answer_tokens}")
    return [(*start, result.name, _length(result), *_figures(result)) for result in cell.runners]


def _figures(result: RunnerResult) -> tuple[str, ...]:
    if result.failed is not None:
        return (NOTHING,) * 7 + (f"did not run: {result.failed}",)
    speed = result.tokens_per_s
    return (
        _number(speed and speed.median, 1),
        f"({speed.least:.1f} to {speed.most:.1f})" if speed else NOTHING,
        _number(result.speedup, 2) + ("x" if result.speedup else ""),
        _number(result.ttft_ms and result.ttft_ms.median, 1),
        _number(result.tpot_ms and result.tpot_ms.median, 2),
        _number(result.mean_acceptance_length, 2),
        NOTHING if result.share_of_bound is None else f"{result.share_of_bound:.0%}",
        difference_text(result.difference),
    )


def difference_text(difference: Difference | None) -> str:
    if difference is None:
        return "same"
    return f"{difference.rows} rows differ, the first (row {difference.row}) at token {difference.position}"


def split_lines(cell: CellResult) -> list[tuple[str, ...]]:
    name = f"{cell.prompts} {cell.context}" if cell.context else cell.prompts
    return [(str(cell.rows), name, str(split.num_draft_tokens), f"{split.round_ms:.2f}", f"{split.draft_ms:.2f}",
             f"{split.verify_ms:.2f}", f"{split.rest_ms:.2f}") for split in cell.splits]


SPLIT_COLUMNS = ("rows", "prompts", "K", "round ms", "draft", "verify", "rest")


def print_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their longest entry; the first row of numbers is aligned right."""
    widths = [max(len(line[i]) for line in (columns, *lines)) for i in range(len(columns))]
    for line in (columns, *lines):
        print("  ".join(text.ljust(width) if _is_text(columns[i]) else text.rjust(width)
                        for i, (text, width) in enumerate(zip(line, widths, strict=True))).rstrip())


def _is_text(column: str) -> bool:
    return column in ("prompts", "decoder", "text", "(range)")


def _length(result: RunnerResult) -> str:
    mean = result.mean_num_draft_tokens
    return f"auto ({mean:.1f})" if result.num_draft_tokens == "auto" and mean is not None else str(
        result.num_draft_tokens)


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)}-{max(values)}"
