"""The sweep: every cell's texts are compared first, then every cell is measured, its decoders in turns.

A cell is a batch: rows × a kind of prompts × a context length. All its rows decode the same number of tokens, cut to
the shortest answer of the kind, so that none ends before the others and nothing after an end of turn is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import mlx_mtp
from bench.bandwidth import Bandwidth, weight_bytes
from bench.measure import Difference, Run, Spread, clocked, difference
from bench.prompts import ALL_KINDS, KINDS, prompts
from bench.record import Agreement, CellResult, RunnerResult, Split
from bench.replay import ReplayDrafter, replayed_drafts
from bench.rounds import measure_parts
from bench.runners import Drafting, DraftLength, Ours, Prompts, Runner, head_start
from mlx_mtp import Pair, Result
from mlx_mtp.config import EngineConfig
from mlx_mtp.device import is_gpu
from mlx_mtp.errors import RequestError

LEAST_PAIRS = 5  # of a bench's run and a generate's beside it, for their ratio to be trusted
Texts = tuple[tuple[int, ...], ...]


class ParityError(Exception):
    """Drafting changed a text where equality is demanded: no figure of that run means anything."""


@dataclass(frozen=True)
class SweepConfig:
    """What to measure. A default exists here and nowhere else.

    num_draft_tokens: K = 0 is always among them. context: prompt lengths to fill up to, 0 leaves prompts as they are.
    max_tokens: of an answer. runs: measured ones, after one that warms up. acceptance: of a drafter that replays the
    known text and is really run; None lets the drafter speak. peers: whether mlx-lm and mlx-vlm take part.
    """

    rows: tuple[int, ...] = (1, 4, 8)
    num_draft_tokens: tuple[DraftLength, ...] = (0, 1, 3, 5, "auto")
    prompts: tuple[str, ...] = tuple(KINDS)
    context: tuple[int, ...] = (0,)
    max_tokens: int = 128
    runs: int = 5
    acceptance: float | None = None
    peers: bool = False

    def __post_init__(self) -> None:
        lengths: list[DraftLength] = [0, *(k for k in self.num_draft_tokens if k != 0)]
        object.__setattr__(self, "num_draft_tokens", tuple(dict.fromkeys(lengths)))
        for k in self.num_draft_tokens:
            EngineConfig(num_draft_tokens=k)
        for kind in self.prompts:
            if kind not in ALL_KINDS:
                raise RequestError(f"there are no prompts of the kind {kind!r}; expected one of {', '.join(ALL_KINDS)}")
        for name in ("rows", "num_draft_tokens", "prompts", "context"):
            if not getattr(self, name):
                raise RequestError(f"{name} is empty; expected at least one")
        if min(self.rows) < 1 or self.runs < 1 or self.max_tokens < 2 or min(self.context) < 0:
            raise RequestError("rows and runs must be at least 1, max_tokens at least 2, context at least 0")
        if self.acceptance is not None and not 0 <= self.acceptance <= 1:
            raise RequestError(f"acceptance is {self.acceptance}; expected a share between 0 and 1")


class Peers(Protocol):
    """Makes the peers' runners of a cell. drafts: [rows, positions] for a replay, or None."""

    def runners(self, num_draft_tokens: Sequence[DraftLength], drafts: np.ndarray | None) -> list[Runner]: ...


class NoPeers:
    def runners(self, num_draft_tokens: Sequence[DraftLength], drafts: np.ndarray | None) -> list[Runner]:
        return []


@dataclass(frozen=True)
class Cell:
    """A batch and who decodes it. texts: what plain decoding of each row alone gives."""

    kind: str
    context: int
    prompts: Prompts
    texts: Texts
    runners: tuple[Runner, ...]

    @property
    def rows(self) -> int:
        return len(self.prompts)

    @property
    def answer_tokens(self) -> int:
        return len(self.texts[0])


def is_exact(pair: Pair) -> bool:
    """Whether equal text is demanded: float32 on CPU, unquantized. Elsewhere a near-tie may be decided otherwise."""
    quantized = any(isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding) for module in pair.target.modules())
    return pair.target.dtype == mx.float32 and not is_gpu() and not quantized


class Sweep:
    """Runs a SweepConfig on a pair. `check` comes before `measure`."""

    def __init__(self, pair: Pair, config: SweepConfig, bandwidth: Bandwidth, peers: Peers) -> None:
        self._pair, self._config, self._bandwidth, self._peers = pair, config, bandwidth, peers
        if pair.drafter is None:
            self._config = replace(config, num_draft_tokens=(0,))
        self._cells: list[Cell] = []
        self._differences: dict[tuple[int, int], Difference | None] = {}  # (cell, runner)
        self._failed: dict[tuple[int, int], str] = {}

    def check(self, tell: Callable[[str], None]) -> None:
        """Decodes every cell once by everyone and compares texts.

        Raises ParityError where ours differ although they must not.
        """
        self._cells = list(self._new_cells())
        for i, cell in enumerate(self._cells):
            tell(f"texts of cell {i + 1} of {len(self._cells)}: {cell.rows} rows, {cell.kind}")
            for j, runner in enumerate(cell.runners):
                self._run(i, j, cell, runner)

    def measure(self, tell: Callable[[str], None]) -> Iterator[CellResult]:
        for i, cell in enumerate(self._cells):
            tell(f"measuring cell {i + 1} of {len(self._cells)}: {cell.rows} rows, {cell.kind}")
            runs: list[list[tuple[Run, Drafting | None]]] = [[] for _ in cell.runners]
            for turn in range(self._config.runs + 1):
                for j, runner in enumerate(cell.runners):
                    run = self._run(i, j, cell, runner)
                    if turn and run is not None:
                        runs[j].append((run, runner.drafting()))
            results = tuple(self._result(i, j, cell, found) for j, found in enumerate(runs))
            base = results[0].tokens_per_s
            results = tuple(
                replace(result, speedup=result.tokens_per_s.median / base.median)
                if base is not None and result.tokens_per_s is not None else result for result in results)
            splits = self._splits(cell, results) if cell.kind == self._config.prompts[0] else ()
            yield CellResult(cell.rows, cell.kind, cell.context, tuple(map(len, cell.prompts)), cell.answer_tokens,
                             results, splits)

    def agreement(self) -> list[Agreement]:
        """The bench against mlx_mtp.generate's own statistics, on the first cell of one row: K = 0 and the next K."""
        cell = next((cell for cell in self._cells if cell.rows == 1), None)
        return [] if cell is None else [self._agreement(cell, runner) for runner in [
            runner for runner in cell.runners if isinstance(runner, Ours) and runner.num_draft_tokens != "auto"][:2]]

    def _agreement(self, cell: Cell, runner: Ours) -> Agreement:
        pair = replace(self._pair, drafter=self._drafter(cell.prompts, cell.texts))
        bench, generate = [], []
        for turn in range(max(self._config.runs, LEAST_PAIRS) + 1):
            run = clocked(1, cell.answer_tokens, runner.steps(cell.prompts, cell.answer_tokens))
            result = mlx_mtp.generate(pair, cell.prompts[0], max_tokens=cell.answer_tokens,
                                      num_draft_tokens=runner.num_draft_tokens)
            assert isinstance(result, Result)
            if turn and run.tokens_per_s is not None:
                bench.append(run.tokens_per_s)
                generate.append(result.stats.generation_tps)
        ratio = statistics.median(ours / theirs for ours, theirs in zip(bench, generate, strict=True))
        return Agreement(runner.num_draft_tokens, Spread.of(bench), Spread.of(generate), abs(ratio - 1))

    def _new_cells(self) -> Iterator[Cell]:
        config = self._config
        longest = max(EngineConfig().max_draft_tokens if k == "auto" else k for k in config.num_draft_tokens)
        for kind in config.prompts:
            for context in config.context:
                batches = [prompts(self._pair, kind, rows, context) for rows in config.rows]
                most = config.max_tokens + max(head_start(batch, longest) for batch in batches)
                every = {tuple(prompt) for batch in batches for prompt in batch}
                answers = {prompt: self._plain(prompt, most) for prompt in sorted(every)}
                shortest = min(map(len, answers.values()))
                if shortest < 2:
                    raise RequestError(f"an answer to a prompt of the kind {kind} has {shortest} tokens; expected at "
                                       "least 2, to have a time between them: choose other --prompts")
                for batch in batches:
                    texts = tuple(answers[tuple(prompt)][:shortest] for prompt in batch)
                    yield Cell(kind, context, batch, texts, tuple(self._runners(batch, texts)))

    def _plain(self, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        """The row alone, without drafts, up to where it ends by itself."""
        runner = Ours(self._pair, None, 0, [prompt])
        return clocked(1, max_tokens, runner.steps([prompt], max_tokens, self._pair.tokenizer.stop_tokens)).texts[0]

    def _drafter(self, batch: Prompts, texts: Texts) -> Any:
        drafts = self._drafts(batch, texts)
        return self._pair.drafter if drafts is None else ReplayDrafter(self._pair.drafter, drafts)

    def _drafts(self, batch: Prompts, texts: Texts) -> np.ndarray | None:
        if self._config.acceptance is None or self._pair.drafter is None:
            return None
        whole = [[*prompt, *text] for prompt, text in zip(batch, texts, strict=True)]
        return replayed_drafts(whole, self._config.acceptance, self._pair.target.config.text.vocab_size)

    def _runners(self, batch: Prompts, texts: Texts) -> list[Runner]:
        """Ours with K = 0 first, for the others are compared with it."""
        lengths, drafter = self._config.num_draft_tokens, self._drafter(batch, texts)
        ours: list[Runner] = [Ours(self._pair, drafter, k, batch) for k in lengths]
        return [*ours, *self._peers.runners(lengths, self._drafts(batch, texts))]

    def _run(self, i: int, j: int, cell: Cell, runner: Runner) -> Run | None:
        """One run, its text compared; None for a peer that cannot. A difference once seen stays."""
        if (i, j) in self._failed:
            return None
        try:
            run = clocked(cell.rows, cell.answer_tokens, runner.steps(cell.prompts, cell.answer_tokens))
        except Exception as error:  # whatever a peer raises is one of the bench's results
            if isinstance(runner, Ours):
                raise
            self._failed[i, j] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            return None
        found = difference(run.texts, cell.texts)
        if found is not None and isinstance(runner, Ours) and is_exact(self._pair):
            raise ParityError(
                f"{cell.rows} rows of {cell.kind}, K = {runner.num_draft_tokens}: row {found.row} has {found.got} at "
                f"token {found.position} and plain decoding has {found.expected}; expected the same text: run python "
                "-m mlx_mtp.check, and trust no figure until it passes")
        self._differences[i, j] = self._differences.get((i, j)) or found
        return run

    def _result(self, i: int, j: int, cell: Cell, runs: list[tuple[Run, Drafting | None]]) -> RunnerResult:
        runner = cell.runners[j]
        if not runs:
            return RunnerResult(runner.name, runner.num_draft_tokens, failed=self._failed[i, j])
        speeds = [run.tokens_per_s for run, _ in runs if run.tokens_per_s is not None]
        found = [drafting for _, drafting in runs if drafting is not None]
        drafting = Drafting.pooled(found) if found else Drafting(1, 0.0, 0)
        result = RunnerResult(
            runner.name, runner.num_draft_tokens,
            tokens_per_s=Spread.of(speeds) if speeds else None,
            tpot_ms=Spread.of(1e3 * cell.rows / speed for speed in speeds) if speeds else None,
            ttft_ms=Spread.of(1e3 * statistics.median(run.ttft) for run, _ in runs),
            mean_num_draft_tokens=drafting.mean_length,
            mean_acceptance_length=drafting.mean_acceptance_length,
            acceptance_at=drafting.acceptance_at,
            difference=self._differences[i, j])
        if not isinstance(runner, Ours) or result.tpot_ms is None or drafting.mean_length is None:
            return result
        shares = []
        for run, one in runs:
            one = one or drafting
            if run.tpot is not None and one.mean_length is not None:
                least = weight_bytes(self._pair, cell.rows, one.mean_length) / self._bandwidth.best / 1e9
                shares.append(least / (run.tpot * one.mean_acceptance_length))
        return replace(result, share_of_bound=statistics.median(shares))

    def _splits(self, cell: Cell, results: Sequence[RunnerResult]) -> tuple[Split, ...]:
        splits = []
        length = max(map(len, cell.prompts)) + cell.answer_tokens // 2
        for result in results:
            k = result.num_draft_tokens
            if result.name != Ours.name or k == "auto":
                continue
            parts = measure_parts(self._pair, cell.rows, length, k, self._config.runs)
            splits.append(Split(k, 1e3 * parts.round, 1e3 * parts.draft, 1e3 * parts.verify,
                                1e3 * (parts.round - parts.draft - parts.verify)))
        return tuple(splits)
