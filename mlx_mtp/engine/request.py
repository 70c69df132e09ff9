"""Everything about one request in one object."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlx_mtp.config import SamplingParams
from mlx_mtp.errors import RequestError

FinishReason = Literal["stop", "length", "aborted"]
State = Literal["waiting", "prefilling", "decoding", "finished"]


@dataclass(frozen=True)
class RequestStats:
    """What a request cost and what drafting gave it.

    reused_tokens: of the prompt, those that were not run because an earlier one began alike.
    rounds: target passes after the prefill. drafted, accepted: draft tokens proposed, and those that became text (what
    comes after a stop does not count). accepted_at[i]: rounds in which at least i + 1 drafts did. rounds_by_length: of
    the rounds, how many proposed K drafts, by K.
    mean_acceptance_length: tokens a round, 1 + accepted / rounds. prompt_tps, generation_tps: tokens/s of the prefill
    (what was reused not counted) and of decoding after the first token; of a few rounds that says little, since a CPU's
    first token may be read when the next round is nearly done. ttft: seconds from submission to the first token, 0.0 if
    none came. plain_seconds: what its rounds would have taken without drafts, by the rounds of K = 0 that were
    measured; None if none was. peak_memory: GB that MLX held at most since the generation began.
    """

    prompt_tokens: int
    reused_tokens: int
    generation_tokens: int
    rounds: int
    drafted: int
    accepted: int
    accepted_at: tuple[int, ...]
    rounds_by_length: dict[int, int]
    mean_acceptance_length: float
    prompt_tps: float
    generation_tps: float
    ttft: float
    plain_seconds: float | None
    peak_memory: float


@dataclass(eq=False)
class Request:
    """A prompt on its way to a text: what was asked for, what has come, and when.

    stop_tokens end the request and are not part of its tokens; max_tokens may be lowered to what the context holds.
    keep_answer: the K/V of the answer stay for a prompt that goes on from it (a chat's next turn).
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    stop_tokens: frozenset[int]
    max_context: int
    keep_answer: bool = False
    id: int = -1  # the engine's, once it is submitted
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    reused: int = 0  # tokens of the prompt whose K/V were there already
    prefilled: int = 0  # tokens of the prompt that are in the cache, or on their way into it
    committed: int = 0  # tokens in the cache as far as the host has read, those after a stop included
    rounds_by_length: Counter[int] = field(default_factory=Counter)
    tokens_by_rows: Counter[int] = field(default_factory=Counter)  # of the batch that they came in
    accepted_counts: list[int] = field(default_factory=list)
    last_taken: int = 0  # tokens, by the last round, and rows of its batch
    last_rows: int = 0
    submitted: float = field(default_factory=time.perf_counter)
    prefill_began_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("the prompt is empty: expected at least one token")
        if len(self.prompt) >= self.max_context:
            raise RequestError(f"the prompt has {len(self.prompt)} tokens; the model's context holds "
                               f"{self.max_context}, the answer included: shorten the prompt")

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def state(self) -> State:
        if self.is_finished:
            return "finished"
        if self.tokens or self.prefilled == len(self.prompt):
            return "decoding"
        return "prefilling" if self.prefilled > self.reused else "waiting"

    @property
    def most_tokens(self) -> int:
        return min(self.sampling.max_tokens, self.max_context - len(self.prompt))

    @property
    def length(self) -> int:
        """Tokens of the row that are known to the host, the newest included."""
        return len(self.prompt) + len(self.tokens)

    @property
    def rounds(self) -> int:
        return self.rounds_by_length.total()

    @property
    def drafted(self) -> int:
        return sum(k * rounds for k, rounds in self.rounds_by_length.items())

    def receive(self, tokens: Sequence[int], drafted: int | None = None, rows: int = 1) -> list[int]:
        """Takes tokens in order up to a stop token or max_tokens; returns those that belong to the text.

        drafted: how many drafts the round proposed whose accepted ones, and one more, these are; None for a prefill's.
        rows: of the batch in that round.
        """
        taken: list[int] = []
        self.last_token_at = time.perf_counter()
        if not self.tokens:
            self.first_token_at = self.last_token_at
        self.committed += len(tokens) if drafted is not None else len(self.prompt)
        for token in tokens:
            if token in self.stop_tokens:
                self.finish_reason = "stop"
                break
            taken.append(token)
            if len(self.tokens) + len(taken) >= self.most_tokens:
                self.finish_reason = "length"
                break
        self.tokens += taken
        self.last_taken, self.last_rows = len(taken), rows
        if drafted is not None:
            self.rounds_by_length[drafted] += 1
            self.tokens_by_rows[rows] += len(taken)
            self.accepted_counts.append(min(len(tokens) - 1, len(taken)))
        return taken

    def stop_after(self, count: int) -> int:
        """Ends the request with its first `count` tokens (a stop string ends there); returns how many were dropped."""
        surplus = len(self.tokens) - count
        del self.tokens[count:]
        self.finish_reason = "stop"
        if self.accepted_counts:
            kept = max(self.last_taken - surplus, 0)
            self.accepted_counts[-1] = min(self.accepted_counts[-1], kept)
            self.tokens_by_rows[self.last_rows] -= self.last_taken - kept
            self.last_taken = kept
        return surplus

    def stats(self, peak_memory: float, plain_seconds: float | None = None) -> RequestStats:
        """What only the engine knows, `Engine.plain_seconds`, and what only MLX does are the caller's to give."""
        accepted = sum(self.accepted_counts)
        longest = max(self.accepted_counts, default=0)
        ttft = self.first_token_at - self.submitted if self.first_token_at else 0.0
        prefill = self.first_token_at - self.prefill_began_at
        decoding = self.last_token_at - self.first_token_at
        return RequestStats(
            prompt_tokens=len(self.prompt),
            reused_tokens=self.reused,
            generation_tokens=len(self.tokens),
            rounds=self.rounds,
            drafted=self.drafted,
            accepted=accepted,
            accepted_at=tuple(sum(count > i for count in self.accepted_counts) for i in range(longest)),
            rounds_by_length=dict(sorted(self.rounds_by_length.items())),
            mean_acceptance_length=1 + accepted / self.rounds if self.rounds else 1.0,
            prompt_tps=(len(self.prompt) - self.reused) / prefill if prefill > 0 else 0.0,
            generation_tps=(len(self.tokens) - 1) / decoding if decoding > 0 and self.tokens else 0.0,
            ttft=ttft,
            plain_seconds=plain_seconds,
            peak_memory=peak_memory,
        )
