"""Logits -> tokens, with keyed noise.

A row's token at position p is argmax(filtered logits / temperature + gumbel(seed, p)): by the Gumbel-max trick a draw
from the filtered distribution, yet a function of nothing but the logits, the seed and the position. Target and drafter
use the same noise, so a drafter that thinks alike draws alike, acceptance is plain equality, and neither drafts nor
neighbours in the batch can change the text. Temperature 0 drops noise and filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.config import SamplingParams
from mlx_mtp.device import is_gpu

ALL_TOKENS = 2**31 - 1
SORT_BLOCK = 2048  # numbers that MLX sorts on a GPU in one kernel; more take a pass of all of them for each doubling


@dataclass(frozen=True)
class Sampler:
    """The sampling settings of a batch as arrays [B, 1, 1], plus what the host knows of them.

    The flags say what no row needs, so that it is not computed; `widest_top_k` is the largest top_k if every sampled
    row has one, else 0: then only so many logits need sorting.
    """

    temperature: mx.array
    top_k: mx.array
    top_p: mx.array
    min_p: mx.array
    seed: mx.array
    is_greedy: bool
    needs_sort: bool
    needs_min_p: bool
    widest_top_k: int

    @classmethod
    def of(cls, rows: Sequence[SamplingParams]) -> Sampler:
        def column(values: list[float], dtype: mx.Dtype = mx.float32) -> mx.array:
            return mx.array(values, dtype)[:, None, None]

        sampled = [row for row in rows if row.temperature > 0]
        return cls(
            temperature=column([row.temperature for row in rows]),
            top_k=column([min(row.top_k or ALL_TOKENS, ALL_TOKENS) for row in rows], mx.int32),
            top_p=column([row.top_p for row in rows]),
            min_p=column([row.min_p for row in rows]),
            seed=mx.array([row.seed for row in rows], mx.uint32),
            is_greedy=not sampled,
            needs_sort=any(row.top_k or row.top_p < 1 for row in sampled),
            needs_min_p=any(row.min_p for row in sampled),
            widest_top_k=max((row.top_k for row in sampled), default=0) if all(row.top_k for row in sampled) else 0,
        )

    def noise(self, positions: mx.array, vocab_size: int) -> mx.array | None:
        """Gumbel noise [B, L, V] for the tokens at `positions` [B, L]; None if every row is greedy."""
        if self.is_greedy:
            return None
        seeds = mx.broadcast_to(self.seed[:, None], positions.shape)
        keys = mx.stack([seeds, positions.astype(mx.uint32)], axis=-1).reshape(-1, 2)
        draw = mx.vmap(lambda key: mx.random.gumbel((vocab_size,), key=key))
        return draw(keys).reshape(*positions.shape, vocab_size)

    def choose(self, logits: mx.array, noise: mx.array | None) -> mx.array:
        """logits [B, L, C] and noise for the same tokens, or None -> index of the chosen one, [B, L] int32."""
        scores = logits if noise is None else self.scores(logits, noise)  # in float32 the best one is the same
        return mx.argmax(scores, axis=-1).astype(mx.int32)

    def scores(self, logits: mx.array, noise: mx.array | None) -> mx.array:
        """What the choice is the argmax of: [B, L, C] float32."""
        scores = logits.astype(mx.float32)
        if noise is None:
            return scores
        sampled = self.temperature > 0
        # Below their maximum first: at a tiny temperature the quotient must not overflow.
        scaled = (scores - scores.max(axis=-1, keepdims=True)) / mx.where(sampled, self.temperature, 1.0)
        return mx.where(sampled, self._filter(scaled) + noise, scores)

    def _filter(self, scaled: mx.array) -> mx.array:
        """Tempered logits [B, L, C], the best at 0, with all that top-k, top-p or min-p drops at minus infinity."""
        lowest = mx.array(-float("inf"))
        if self.needs_min_p:
            lowest = mx.log(self.min_p)  # the best token stands at 0
        if self.needs_sort:
            lowest = mx.maximum(lowest, self._nucleus_edge(scaled))
        return mx.where(scaled >= lowest, scaled, -float("inf"))

    def _nucleus_edge(self, scaled: mx.array) -> mx.array:
        """The smallest logit that top-k, then top-p among those, keep: [B, L, 1]."""
        size = scaled.shape[-1]
        width = min(self.widest_top_k or size, size)
        best = -mx.sort(-largest(scaled, width), axis=-1)
        rank = mx.arange(width, dtype=mx.int32)
        best = mx.where(rank < self.top_k, best, -float("inf"))
        probabilities = mx.softmax(best, axis=-1)
        before = mx.cumsum(probabilities, axis=-1) - probabilities
        # A running sum can reach 1 before the last token, so a row without top-p is not put to that test.
        kept = ((before < self.top_p) | (self.top_p >= 1) | (rank == 0)) & (best > -float("inf"))
        return mx.where(kept, best, float("inf")).min(axis=-1, keepdims=True)


def largest(scores: mx.array, count: int) -> mx.array:
    """The `count` largest numbers of the last axis, in no order. As mx.topk, which on a GPU sorts the whole axis."""
    while is_gpu() and 2 * count <= SORT_BLOCK < scores.shape[-1] and scores.shape[-1] % SORT_BLOCK == 0:
        blocks = mx.sort(scores.reshape(*scores.shape[:-1], -1, SORT_BLOCK), axis=-1)
        scores = blocks[..., -count:].flatten(-2)
    return scores if count == scores.shape[-1] else mx.topk(scores, count, axis=-1)
