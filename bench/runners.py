"""Who decodes a batch for the sweep: this package with K drafts, and the peers, all behind one interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, Protocol

from bench.measure import Tokens
from bench.replay import ReplayDrafter
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
    """What drafting gave in one run or several, all rows together: counts of the rounds of single rows.

    accepted, drafted: tokens, the latter None where it is not known. reached[i]: rounds that drafted more than i
    tokens; taken[i]: those that accepted at least i + 1.
    """

    rounds: int
    accepted: float
    drafted: int | None = None
    reached: tuple[int, ...] = ()
    taken: tuple[int, ...] = ()

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens a round of a row."""
        return 1 + self.accepted / self.rounds

    @property
    def acceptance_at(self) -> tuple[float, ...]:
        """[i]: of the rounds that drafted more than i tokens, the share that accepted at least i + 1."""
        return tuple(taken / reached for taken, reached in zip(self.taken, self.reached, strict=True) if reached)

    @property
    def mean_length(self) -> float | None:
        """Drafts a round."""
        return None if self.drafted is None else self.drafted / self.rounds

    @classmethod
    def pooled(cls, runs: Sequence[Drafting]) -> Drafting:
        """All rounds of some runs: with K = "auto" each run may draft otherwise."""
        drafted = [one.drafted for one in runs]
        return cls(
            rounds=sum(one.rounds for one in runs),
            accepted=sum(one.accepted for one in runs),
            drafted=None if None in drafted else sum(filter(None, drafted)),
            reached=tuple(map(sum, zip_longest(*(one.reached for one in runs), fillvalue=0))),
            taken=tuple(map(sum, zip_longest(*(one.taken for one in runs), fillvalue=0))))


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
    """This package: one engine over all runs, so that "auto" keeps what it has learned from one to the next.

    What rounds take is the pair's, as it is for every engine that a user makes: a later cell knows of an earlier one.
    """

    name = "ours"

    def __init__(self, pair: Pair, drafter: DraftModel | None, num_draft_tokens: DraftLength, prompts: Prompts) -> None:
        self.num_draft_tokens = num_draft_tokens
        chunk = PREFILL_CHUNK if is_prefilled_together(prompts) else EngineConfig().prefill_chunk
        self._max_context, self._drafter = pair.max_context, drafter
        self._engine = Engine(pair.target, drafter if num_draft_tokens else None, EngineConfig(
            num_draft_tokens=num_draft_tokens, prefill_chunk=chunk, prefix_tokens=0, max_rows=len(prompts)),
            pair.round_costs)
        self.stats: tuple[RequestStats, ...] = ()  # of the last run, up to where its first row ended

    def steps(
        self, prompts: Prompts, max_tokens: int, stop_tokens: frozenset[int] = frozenset()
    ) -> Iterator[Tokens]:
        """Texts end at `stop_tokens` too, where there are any."""
        requests = [Request(prompt, SamplingParams(max_tokens), stop_tokens, self._max_context) for prompt in prompts]
        for request in requests:
            self._engine.submit(request)
        row = {request.id: i for i, request in enumerate(requests)}
        if isinstance(self._drafter, ReplayDrafter):
            self._drafter.order = lambda: [row[request.id] for request in self._engine.decoding]
        self.stats = ()
        while not self._engine.is_idle:
            yield [(row[event.request.id], token) for event in self._engine.step() for token in event.tokens]
            if not self.stats and any(request.is_finished for request in requests):
                self.stats = tuple(request.stats(0.0) for request in requests)

    def drafting(self) -> Drafting | None:
        return None if self.num_draft_tokens == 0 else drafting_of(self.stats)


def drafting_of(stats: Sequence[RequestStats]) -> Drafting | None:
    """All rows' statistics together; None if there was no round, as for an answer of one token."""
    rounds = sum(one.rounds for one in stats)
    if not rounds:
        return None
    longest = max(max(one.rounds_by_length, default=0) for one in stats)
    return Drafting(
        rounds=rounds,
        accepted=sum(one.accepted for one in stats),
        drafted=sum(one.drafted for one in stats),
        reached=tuple(sum(count for one in stats for length, count in one.rounds_by_length.items() if length > i)
                      for i in range(longest)),
        taken=tuple(sum(sum(one.accepted_at[i : i + 1]) for one in stats) for i in range(longest)),
    )


def is_prefilled_together(prompts: Prompts) -> bool:
    return len(prompts) * max(map(len, prompts)) <= PREFILL_CHUNK


def head_start(prompts: Prompts, longest_draft: int) -> int:
    """Tokens that the first row may have before the last one has its first: a round for each chunk of the others."""
    if is_prefilled_together(prompts):
        return 0
    chunk = EngineConfig().prefill_chunk
    return sum(-(-len(prompt) // chunk) for prompt in prompts[1:]) * (longest_draft + 1)
