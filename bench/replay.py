"""A drafter whose acceptance is chosen and whose cost is real: it runs the drafter's step and drafts a known text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_mtp.config import AttentionKind
from mlx_mtp.models.drafter import Candidates, Context, Drafter


class _Steps:
    """A round's context, its rows' drafts, and how many steps it has seen."""

    def __init__(self, real: Context, newest: mx.array, drafts: mx.array) -> None:
        self.real, self.newest, self.drafts, self.count = real, newest, drafts, 0


def replayed_drafts(texts: Sequence[Sequence[int]], acceptance: float, vocab_size: int, seed: int = 0) -> np.ndarray:
    """[rows, positions] int32: each row's prompt and answer, wrong at random with probability 1 - acceptance."""
    width = max(map(len, texts)) + 16
    known = np.array([[*text, *[0] * (width - len(text))] for text in texts])
    right = np.random.default_rng(seed).random(known.shape) < acceptance
    return np.where(right, known, (known + 1) % vocab_size).astype(np.int32)


class ReplayDrafter:
    """Drafts what `drafts` [rows, positions] says. Rows must join in that order.

    order: tells which of them decode in this round, where some may end before the others.
    """

    def __init__(self, drafter: Drafter, drafts: np.ndarray) -> None:
        self._drafter, self._drafts = drafter, mx.array(drafts)
        self.order: Callable[[], Sequence[int]] | None = None

    def context(
        self, keys_values: Mapping[AttentionKind, tuple[mx.array, mx.array]],
        key_positions: Mapping[AttentionKind, mx.array], newest_positions: mx.array,
    ) -> _Steps:
        drafts = self._drafts[: newest_positions.size] if self.order is None else self._drafts[mx.array(self.order())]
        return _Steps(self._drafter.context(keys_values, key_positions, newest_positions), newest_positions, drafts)

    def __call__(self, embedding: mx.array, hidden: mx.array, context: _Steps) -> tuple[Candidates, mx.array]:
        candidates, hidden = self._drafter(embedding, hidden, context.real)
        context.count += 1
        where = mx.minimum(context.newest + context.count, context.drafts.shape[1] - 1)
        known = mx.take_along_axis(context.drafts, where[:, None], axis=1)
        paid = mx.argmax(candidates.logits, axis=-1, keepdims=True).astype(mx.int32)  # so that it is really run
        return Candidates(mx.zeros(known.shape), known + 0 * paid), hidden
