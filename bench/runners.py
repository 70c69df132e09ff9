"""Who decodes a batch for the sweep: this package with K drafts, and the peers, all behind one interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from bench.measure import Tokens
from mlx_mtp import Pair
from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import Request, RequestStats
from mlx_mtp.spec_decode.loop import DraftModel

DraftLength = int | Literal["auto"]
Prompts = Sequence[Sequence[int]]

# Prompts are prefilled together, as the peers do, where they fit into one pass of so many tokens; else one by one.
PREFILL_CHUNK = 2048


@dataclass(frozen=True)
class Drafting:
    """What drafting gave in one run, all rows together.

    mean_acceptance_length: tokens a round of a row. acceptance_at[i]: of the rounds that drafted more than i tokens,
    the share that accepted at least i + 1. mean_length: drafts a round.
    """

    mean_acceptance_length: float
    acceptance_at: tuple[float, ...] = ()
    mean_length: float | None = None


class Runner(Protocol):
    """Decodes prompts greedily to `max_tokens` each. name: whose; num_draft_tokens: K, or "auto"."""

    @property
    def name(self) -> str: ...

    @property
    def num_draft_tokens(self) -> DraftLength: ...

    def steps(self, prompts: Prompts, max_tokens: int) -> Iterator[Tokens]:
        """Yields (row, token) pairs as the host gets them, rows numbered as the prompts are."""

    def drafting(self) -> Drafting | None:
        """Of the last run; None for plain decoding, and where it is not known."""


class Ours:
    """This package: one engine over all runs, so that "auto" keeps what it has learned from one to the next."""

    name = "ours"

    def __init__(self, pair: Pair, drafter: DraftModel | None, num_draft_tokens: DraftLength, prompts: Prompts) -> None:
        self.num_draft_tokens = num_draft_tokens
        chunk = PREFILL_CHUNK if is_prefilled_together(prompts) else EngineConfig().prefill_chunk
        self._max_context = pair.max_context
        self._engine = Engine(pair.target, drafter if num_draft_tokens else None, EngineConfig(
            num_draft_tokens=num_draft_tokens, prefill_chunk=chunk, prefix_tokens=0, max_rows=len(prompts)))
        self.stats: tuple[RequestStats, ...] = ()  # of the last run, up to where its first row ended

    def steps(
        self, prompts: Prompts, max_tokens: int, stop_tokens: frozenset[int] = frozenset()
    ) -> Iterator[Tokens]:
        """Texts end at `stop_tokens` too, where there are any."""
        requests = [Request(prompt, SamplingParams(max_tokens), stop_tokens, self._max_context) for prompt in prompts]
        for request in requests:
            self._engine.submit(request)
        row = {request.id: i for i, request in enumerate(requests)}
        self.stats = ()
        while not self._engine.is_idle:
            yield [(row[event.request.id], token) for event in self._engine.step() for token in event.tokens]
            if not self.stats and any(request.is_finished for request in requests):
                self.stats = tuple(request.stats(0.0) for request in requests)

    def drafting(self) -> Drafting | None:
        return None if self.num_draft_tokens == 0 else drafting_of(self.stats, self.num_draft_tokens)


def drafting_of(stats: Sequence[RequestStats], num_draft_tokens: DraftLength) -> Drafting | None:
    """All rows' statistics together; None if there was no round, as for an answer of one token."""
    def reached(i: int) -> int:
        """Rounds that drafted more than i tokens."""
        if num_draft_tokens != "auto":
            return rounds
        return sum(count for one in stats for length, count in one.rounds_by_length.items() if length > i)

    rounds = sum(one.rounds for one in stats)
    if not rounds:
        return None
    longest = max(len(one.accepted_at) for one in stats)
    taken = [sum(sum(one.accepted_at[i : i + 1]) for one in stats) for i in range(longest)]
    return Drafting(
        mean_acceptance_length=1 + sum(one.accepted for one in stats) / rounds,
        acceptance_at=tuple(count / reached(i) for i, count in enumerate(taken)),
        mean_length=sum(one.drafted for one in stats) / rounds,
    )


def is_prefilled_together(prompts: Prompts) -> bool:
    return len(prompts) * max(map(len, prompts)) <= PREFILL_CHUNK


def head_start(prompts: Prompts, longest_draft: int) -> int:
    """Tokens that the first row may have before the last one has its first: a round for each chunk of the others."""
    if is_prefilled_together(prompts):
        return 0
    chunk = EngineConfig().prefill_chunk
    return sum(-(-len(prompt) // chunk) for prompt in prompts[1:]) * (longest_draft + 1)
