"""What a sweep found: a verdict, a table for people, and JSON (its schema stands in `__main__`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from mlx_mtp.api import Pair
from mlx_mtp.check.settings import CheckConfig
from mlx_mtp.check.sweep import Cell, Found, Sweep, described

Verdict = Literal["holds", "broken", "proves nothing"]
COLORS: dict[Verdict, str] = {"holds": "green", "broken": "red", "proves nothing": "yellow"}
EDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, math.inf)  # of the margins that are counted together, in logits
PLAIN_WIDTH = 120  # where there is no terminal to ask


@dataclass(frozen=True)
class Report:
    """tolerance: in logits. environment: see `environment.card`. seconds: of the sweep."""

    pair: Pair
    sweep: Sweep
    settings: CheckConfig
    tolerance: float
    environment: dict[str, str]
    notes: Sequence[str]
    seconds: float

    @property
    def verdict(self) -> Verdict:
        if self.sweep.violations:
            return "broken"
        return "proves nothing" if self.pair.drafter is not None and not self.sweep.rejected else "holds"

    @property
    def reason(self) -> str:
        """The verdict in one or two lines."""
        sweep = self.sweep
        texts, tokens = sum(len(cell.texts) for cell in sweep.cells), sum(cell.tokens for cell in sweep.cells)
        if self.verdict == "broken":
            first = next(found for cell in sweep.cells for found in cell.violations)
            cell = next(cell for cell in sweep.cells if first in cell.violations)
            return (f"The promise is BROKEN in {sweep.violations} of {described(texts, 'text')}: {self._affected()}.\n"
                    f"First: {self._told(cell, first)}.")
        if self.verdict == "proves nothing":
            did = f"none of {sweep.drafted} drafts was" if sweep.drafted else "nothing was drafted, so no draft was"
            return (f"Nothing is proven: {did} rejected. Decode more (--max-tokens, --prompts-file), let it draft "
                    "(--num-draft-tokens), or check decoding without a drafter (--draft-model none).")
        drafts = f" and {sweep.rejected} rejected drafts" if sweep.drafted else ""
        ties = "each token is plain decoding's own choice"
        if sweep.near_ties:
            lost = max(flip.margin for one in sweep.replays for flip in one.near_ties)
            ties = (f"{sweep.near_ties} differ from plain decoding's own choice, and lose to it by at most {lost:.3g} "
                    f"logits, within the tolerance of {self.tolerance:g}")
        return f"The promise holds over {tokens} tokens in {described(texts, 'text')}{drafts}: {ties}."

    def as_json(self) -> dict[str, Any]:
        sweep, cells = self.sweep, self.sweep.cells
        counts = ("texts", "tokens", "rounds", "drafted", "rejected", "plain_texts", "near_ties", "violations")
        shown = [_counted(cell) for cell in cells]
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "environment": self.environment,
            "settings": asdict(self.settings) | {"tolerance": self.tolerance},
            "totals": {name: sum(cell[name] for cell in shown) for name in counts}
            | {"replays": len(sweep.replays), "replayed_tokens": sum(len(one.leads) for one in sweep.replays),
               "seconds": round(self.seconds, 3)},
            "cells": shown,
            "margins": self.margins(),
            "near_ties": [self._located(cell, found) for cell in cells for found in cell.near_ties],
            "violations": [self._located(cell, found) for cell in cells for found in cell.violations],
            "notes": list(self.notes),
        }

    def margins(self) -> list[dict[str, Any]]:
        """By size, as far as `up_to`: decisions of plain decoding, and flips, each distinct text counted once."""
        replays = self.sweep.replays
        flips = [flip for one in replays for flip in (*one.near_ties, *([one.violation] if one.violation else []))]
        decided = np.concatenate([one.leads for one in replays])
        lost = np.array([flip.margin for flip in flips])
        return [{"up_to": _finite(edge), "decided": int(np.sum(np.searchsorted(EDGES[:-1], decided) == i)),
                 "flipped": int(np.sum(np.searchsorted(EDGES[:-1], lost) == i))} for i, edge in enumerate(EDGES)]

    def show(self, console: Console) -> None:
        """Prints the table: boxed and coloured on a terminal, else in plain columns."""
        for key, value in self.environment.items():
            console.print(f"{key:10} {value}", highlight=False, markup=False, soft_wrap=True)
        cells = _table(console, "rows", "K", "texts", "as plain", "tokens", "rounds", "drafted", "rejected",
                       "near-ties", "violations")
        for cell in self.sweep.cells:
            counted = _counted(cell)
            cells.add_row(*(str(counted[name]) for name in (
                "rows", "num_draft_tokens", "texts", "plain_texts", "tokens", "rounds", "drafted", "rejected",
                "near_ties", "violations")), style="red" if cell.violations else "")
        margins = _table(console, "margin in logits", "tokens decided by it", "tokens lost by it")
        for edge, row in zip(EDGES, self.margins(), strict=True):
            size = "exact tie" if edge == 0 else f"up to {edge:g}" if edge < math.inf else f"above {EDGES[-2]:g}"
            margins.add_row(size, str(row["decided"]), str(row["flipped"]))
        console.print(cells, margins, sep="\n")
        console.print(self.reason, style=COLORS[self.verdict], highlight=False, markup=False, soft_wrap=True)

    def _affected(self) -> str:
        """Which cells are broken, by what they have in common."""
        broken = [cell for cell in self.sweep.cells if cell.violations]
        rows = sorted({cell.rows for cell in broken})
        drafts = list(dict.fromkeys(cell.num_draft_tokens for cell in broken))
        whole = [cell for cell in self.sweep.cells if not cell.violations]
        plain = " (K = 0 is not)" if 0 not in drafts and any(cell.num_draft_tokens == 0 for cell in whole) else ""
        single = " (1 row is not)" if 1 not in rows and any(cell.rows == 1 for cell in whole) else ""
        return f"with rows {_listed(rows)}{single}, K {_listed(drafts)}{plain}"

    def _told(self, cell: Cell, found: Found) -> str:
        case, flip = found.case, found.flip
        lost = (f"which loses to it by {flip.margin:.3g} logits; the tolerance is {self.tolerance:g}"
                if math.isfinite(flip.margin) else "which no change of logits explains")
        return (f"prompt {case.name!r}, temperature {case.sampling.temperature:g}, seed {case.sampling.seed}, "
                f"{described(cell.rows, 'row')}, K {cell.num_draft_tokens}, token {flip.index} of the answer (position "
                f"{len(case.tokens) + flip.index}): expected {self._token(flip.expected)}, got "
                f"{self._token(flip.got)}, {lost}")

    def _token(self, token: int | None) -> str:
        return "the end" if token is None else f"{token} ({self.pair.tokenizer.decode([token])!r})"

    def _located(self, cell: Cell, found: Found) -> dict[str, Any]:
        case, flip = found.case, found.flip
        return {
            "prompt": case.name, "temperature": case.sampling.temperature, "seed": case.sampling.seed,
            "rows": cell.rows, "num_draft_tokens": cell.num_draft_tokens, "index": flip.index,
            "position": len(case.tokens) + flip.index, "got": flip.got, "expected": flip.expected,
            "margin": _finite(flip.margin),
        }


def console_for_stdout() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def _counted(cell: Cell) -> dict[str, Any]:
    return {
        "rows": cell.rows, "num_draft_tokens": cell.num_draft_tokens, "texts": len(cell.texts), "tokens": cell.tokens,
        "rounds": cell.rounds, "drafted": cell.drafted, "rejected": cell.rejected, "plain_texts": cell.plain_texts,
        "near_ties": len(cell.near_ties), "violations": len(cell.violations),
    }


def _table(console: Console, *columns: str) -> Table:
    table = Table(box=box.SIMPLE if console.is_terminal else None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if math.isfinite(number) else None


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
