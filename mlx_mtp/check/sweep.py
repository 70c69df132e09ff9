"""The sweep: every case through the engine, for every number of rows and drafts; then each text's replay.

All cases of a cell run in one engine: greedy and sampled rows side by side, joining and leaving as rows come free, and
later ones beginning with what was kept of earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mlx_mtp import api, device
from mlx_mtp.api import Pair
from mlx_mtp.check.prompts import Case
from mlx_mtp.check.replay import Flip, Replay, Text, replay
from mlx_mtp.check.settings import NumDraftTokens
from mlx_mtp.engine.request import Request

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Found:
    """A flip, and the case whose text has it."""

    case: Case
    flip: Flip


@dataclass
class Cell:
    """What came of all cases with at most `rows` rows and `num_draft_tokens` drafts a round.

    texts: by case. rejected: drafts that the target refused in the middle of a text; those behind its end, which nobody
    refused, are among `drafted` only.
    """

    rows: int
    num_draft_tokens: NumDraftTokens
    texts: list[Text] = field(default_factory=list)
    rounds: int = 0
    drafted: int = 0
    rejected: int = 0
    plain_texts: int = 0
    near_ties: list[Found] = field(default_factory=list)
    violations: list[Found] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(text.tokens) for text in self.texts)


@dataclass(frozen=True)
class Sweep:
    """cells: in the order in which they ran; replays: of their texts, equal ones once."""

    cells: Sequence[Cell]
    replays: Sequence[Replay]

    @property
    def drafted(self) -> int:
        return sum(cell.drafted for cell in self.cells)

    @property
    def rejected(self) -> int:
        return sum(cell.rejected for cell in self.cells)

    @property
    def near_ties(self) -> int:
        return sum(len(cell.near_ties) for cell in self.cells)

    @property
    def violations(self) -> int:
        return sum(len(cell.violations) for cell in self.cells)


def run(
    pair: Pair, cases: Sequence[Case], rows: Sequence[int], drafts: Sequence[NumDraftTokens], tolerance: float,
    tell: Tell,
) -> Sweep:
    """Runs all cells and judges what they gave. tell(what, done, total) is told of texts decoded and replayed."""
    replays: dict[Text, Replay] = {}  # by text: equal ones of several cells are judged once
    cells = [Cell(row_count, num_draft_tokens) for row_count in rows for num_draft_tokens in drafts]
    for number, cell in enumerate(cells):
        done, total = number * len(cases), len(cells) * len(cases)
        where = f"{described(cell.rows, 'row')}, K {cell.num_draft_tokens}"
        for finished in decode(pair, cases, cell):
            tell(where, done + finished, total)
        for case, text in zip(cases, cell.texts, strict=True):
            if text not in replays:
                tell(f"{where}: replaying {case.name}", done + len(cases), total)
                with device.wired_memory():
                    replays[text] = replay(pair.target, text, tolerance)
            judge(cell, case, replays[text])
    return Sweep(cells, list(replays.values()))


def described(count: int, what: str) -> str:
    """1 row, 4 rows."""
    return f"{count} {what}{'s' * (count != 1)}"


def decode(pair: Pair, cases: Sequence[Case], cell: Cell) -> Iterator[int]:
    """Fills the cell with the engine's texts and what its rounds did; yields how many texts have ended."""
    engine = api.new_engine(pair, max_rows=cell.rows, num_draft_tokens=cell.num_draft_tokens)
    requests = [case.request(pair) for case in cases]
    drafted: dict[Request, int] = dict.fromkeys(requests, 0)
    for event in engine.run(requests):
        request = event.request
        proposed, drafted[request] = request.drafted - drafted[request], request.drafted
        if request.is_finished:
            yield sum(one.is_finished for one in requests)
        elif proposed:
            cell.rejected += proposed - request.accepted_counts[-1]
    cell.texts = [Text.of(request) for request in requests]
    cell.rounds = sum(request.rounds for request in requests)
    cell.drafted = sum(drafted.values())


def judge(cell: Cell, case: Case, judged: Replay) -> None:
    cell.plain_texts += judged.is_plain
    cell.near_ties += [Found(case, flip) for flip in judged.near_ties]
    if judged.violation is not None:
        cell.violations.append(Found(case, judged.violation))
