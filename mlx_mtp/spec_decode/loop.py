"""The loop: draft, verify, accept, commit. One row is a batch of one; zero drafts is plain decoding.

Invariant: the newest token of a row is never in the cache. A round therefore stages K + 1 positions, the newest token
and its K drafts, and commits accepted + 1 of them.

Nothing here reads from the device. Accepted counts stay in arrays; positions, masks, writes and gathers follow from
them. So the host can hand over round t + 1 before it has read the tokens of round t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx

from mlx_mtp.config import AttentionKind
from mlx_mtp.kv_cache import CacheStage, KVCache
from mlx_mtp.models.drafter import Candidates, Context
from mlx_mtp.models.target import Target
from mlx_mtp.spec_decode.sampler import Sampler


class DraftModel(Protocol):
    """What the loop asks of a drafter; `models.drafter.Drafter` is one, a test's replay of a known text another."""

    def context(
        self,
        keys_values: Mapping[AttentionKind, tuple[mx.array, mx.array]],
        key_positions: Mapping[AttentionKind, mx.array],
        newest_positions: mx.array,
    ) -> Context:
        """Builds once a round what its steps share."""

    def __call__(self, embedding: mx.array, hidden: mx.array, context: Context) -> tuple[Candidates, mx.array]:
        """One step: ([B, D], [B, D]) -> candidates for the next token, hidden [B, D] for the next step."""


@dataclass(frozen=True)
class DecodeState:
    """A batch between two rounds; all of it on the device.

    last_token: [B] int32, the newest token, not in the cache; hidden: [B, D], the target's after its final norm at
    the position before; cache: the rows' K/V and lengths (mutable: a round commits to it); sampler: the rows' settings.
    """

    last_token: mx.array
    hidden: mx.array
    cache: KVCache
    sampler: Sampler

    def join(self, other: DecodeState, sampler: Sampler) -> DecodeState:
        """Puts the rows of `other` behind these; it is used up by that. `sampler` is that of all rows."""
        self.cache.join(other.cache)
        return replace(
            self,
            last_token=mx.concatenate([self.last_token, other.last_token]),
            hidden=mx.concatenate([self.hidden, other.hidden]),
            sampler=sampler,
        )

    def drop_row(self, row: int, sampler: Sampler) -> DecodeState:
        """Ends a row: the last one moves into its place. `sampler` is that of the rows that remain."""
        self.cache.drop_row(row)
        order = [*range(row), self.cache.rows, *range(row + 1, self.cache.rows)][: self.cache.rows]
        keep = mx.array(order, mx.int32)
        return replace(self, last_token=self.last_token[keep], hidden=self.hidden[keep], sampler=sampler)


@dataclass(frozen=True)
class RoundOutput:
    """What a round decided: `packed` [B, K + 2] int32 holds each row's K + 1 target tokens and its accepted count.

    A row's new tokens are the first accepted + 1 of its target tokens. One array, so that the host reads once.
    """

    packed: mx.array


def prefill_chunk(
    target: Target, state: DecodeState, tokens: mx.array, valid: mx.array
) -> tuple[DecodeState, CacheStage]:
    """Runs one chunk of every row's prompt and commits it; also returns its stage, which holds the chunk's K/V.

    tokens: [B, L] int32, rows padded on the right; valid: [B] int32, how many are real. `hidden` of a row that has
    real tokens in this chunk becomes the one at the last of them.
    """
    stage = state.cache.stage(tokens.shape[1], valid)
    last = target(tokens, stage, keep=mx.maximum(valid - 1, 0))[:, 0]
    state.cache.commit(valid, tokens.shape[1])
    return replace(state, hidden=mx.where((valid > 0)[:, None], last, state.hidden)), stage


def first_token(target: Target, state: DecodeState) -> DecodeState:
    """Draws each row's first token from the last prompt position: the head runs on that one only."""
    logits = target.choice_logits(state.hidden)[:, None]
    noise = state.sampler.noise(state.cache.lengths[:, None], logits.shape[-1])
    return replace(state, last_token=state.sampler.choose(logits, noise)[:, 0])


def decode_round(
    target: Target, drafter: DraftModel | None, state: DecodeState, num_draft_tokens: int
) -> tuple[DecodeState, RoundOutput]:
    """One round over the whole batch: at most num_draft_tokens + 1 new tokens a row, at least one."""
    cache, sampler = state.cache, state.sampler
    newest = cache.lengths
    steps = mx.arange(1, num_draft_tokens + 2, dtype=mx.int32)
    noise = sampler.noise(newest[:, None] + steps, target.config.text.vocab_size)

    drafts = draft(target, drafter, state, num_draft_tokens, noise)  # [B, K]
    block = mx.concatenate([state.last_token[:, None], drafts], axis=1)
    hidden = target(block, cache.stage(num_draft_tokens + 1))
    tokens = sampler.choose(target.choice_logits(hidden), noise)  # [B, K + 1]

    accepted = mx.cumprod((drafts == tokens[:, :-1]).astype(mx.int32), axis=1).sum(axis=1)  # [B]
    cache.commit(accepted + 1, num_draft_tokens + 1)
    state = replace(
        state,
        last_token=mx.take_along_axis(tokens, accepted[:, None], axis=1)[:, 0],
        hidden=mx.take_along_axis(hidden, accepted[:, None, None], axis=1)[:, 0],
    )
    return state, RoundOutput(mx.concatenate([tokens, accepted[:, None]], axis=1))


def draft(
    target: Target, drafter: DraftModel | None, state: DecodeState, num_draft_tokens: int, noise: mx.array | None
) -> mx.array:
    """The drafter's next tokens of every row, [B, K] int32, drawn with the noise that the target will draw with."""
    if drafter is None or num_draft_tokens == 0:
        return mx.zeros((state.cache.rows, 0), mx.int32)
    cache, donors = state.cache, target.config.text.donors
    context = drafter.context(
        {kind: cache.read(layer) for kind, layer in donors.items()},
        {kind: cache.key_positions(kind) for kind in donors},
        cache.lengths,
    )
    token, hidden = state.last_token, state.hidden
    drafts = []
    for step in range(num_draft_tokens):
        candidates, hidden = drafter(target.embed(token), hidden, context)
        token = choose_draft(state.sampler, candidates, None if noise is None else noise[:, step])
        drafts.append(token)
    return mx.stack(drafts, axis=1)


def choose_draft(sampler: Sampler, candidates: Candidates, noise: mx.array | None) -> mx.array:
    """Draws among the candidates only: [B] int32. noise: [B, V] or None."""
    if noise is not None:
        noise = noise if candidates.token_ids is None else mx.take_along_axis(noise, candidates.token_ids, axis=-1)
        noise = noise[:, None]
    choice = sampler.choose(candidates.logits[:, None], noise)
    if candidates.token_ids is not None:
        choice = mx.take_along_axis(candidates.token_ids, choice, axis=-1)
    return choice[:, 0]


def padded(pieces: Sequence[Sequence[int]]) -> tuple[mx.array, mx.array]:
    """Token lists of any lengths as a chunk for `prefill_chunk`: (tokens [B, L], valid [B])."""
    longest = max(len(piece) for piece in pieces)
    tokens = [[*piece, *[0] * (longest - len(piece))] for piece in pieces]
    return mx.array(tokens, mx.int32), mx.array([len(piece) for piece in pieces], mx.int32)
