"""Faults for the lossless check to find. Each lies in the drafted or batched path alone; the replay does not meet it.

A replay runs one row: a prefill of whole chunks, then passes over one token, its sampler asked for one position at a
time. So what happens in blocks of 2 to 8 tokens, in rounds with drafts, or when rows move, happens to the engine only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.config import EngineConfig
from mlx_mtp.engine import engine
from mlx_mtp.kv_cache import KVCache
from mlx_mtp.models import target as target_module
from mlx_mtp.models.target import Target
from mlx_mtp.spec_decode.sampler import Sampler

Plant = Callable[[pytest.MonkeyPatch], None]


def is_block(count: int) -> bool:
    """Whether so many tokens are verified together; the prompts of the tests are longer, a replay's passes shorter."""
    return 1 < count <= EngineConfig().max_draft_tokens + 1


def drafts_see_the_draft_after_them(patch: pytest.MonkeyPatch) -> None:
    """A wrong mask: in verification each query sees one key too many."""
    real = target_module.target_mask

    def leaky(queries: mx.array, keys: mx.array, window: int | None) -> mx.array:
        return real(queries + is_block(queries.shape[1]), keys, window)

    patch.setattr(target_module, "target_mask", leaky)


def a_ring_has_less_slack_than_drafts(patch: pytest.MonkeyPatch) -> None:
    """A stale cache: rejected drafts overwrite what the window still needs. One slot is enough for a replay."""
    patch.setattr(EngineConfig, "ring_slack", property(lambda self: 1))
    patch.setattr(KVCache, "_check_block", lambda self, count: None)


def a_moved_row_keeps_what_the_ended_one_wrote(patch: pytest.MonkeyPatch) -> None:
    """A stale cache: the last row moves into a free place, its K/V do not. A replay's only row never moves."""
    real = KVCache.drop_row

    def drop_row(cache: KVCache, row: int) -> None:
        buffers = dict(cache._buffers)
        cache._buffers.clear()
        real(cache, row)
        cache._buffers.update(buffers)

    patch.setattr(KVCache, "drop_row", drop_row)


def a_rejected_draft_is_committed(patch: pytest.MonkeyPatch) -> None:
    """One position too many, so that a rejected draft's K/V are seen. The replay commits for itself."""
    real = engine.decode_round

    def round_(target: Target, drafter: Any, state: Any, count: int) -> Any:
        state, output = real(target, drafter, state, count)
        if count:
            state.cache.commit((output.packed[:, -1] < count).astype(mx.int32), 1)
        return state, output

    patch.setattr(engine, "decode_round", round_)


class _Lenient:
    """A target that favours the drafts that it verifies by so many logits."""

    def __init__(self, target: Target, favour: float) -> None:
        self._target, self._favour, self._drafts = target, favour, mx.zeros((1, 0))
        self.config, self.embed = target.config, target.embed

    def __call__(self, tokens: mx.array, stage: Any) -> mx.array:
        self._drafts = tokens[:, 1:]
        return self._target(tokens, stage)

    def choice_logits(self, hidden: mx.array) -> mx.array:
        logits = self._target.choice_logits(hidden)
        favoured = mx.arange(logits.shape[-1]) == self._drafts[..., None]
        favoured = mx.pad(favoured.astype(logits.dtype), [(0, 0), (0, 1), (0, 0)])
        return logits + self._favour * favoured


def drafts_are_accepted_too_liberally(patch: pytest.MonkeyPatch) -> None:
    """A biased sampler: a draft that loses by less than a logit wins. The replay asks the target itself."""
    real = engine.decode_round
    patch.setattr(engine, "decode_round", lambda target, *rest: real(_Lenient(target, 1.0), *rest))


def noise_is_keyed_by_the_wrong_position(patch: pytest.MonkeyPatch) -> None:
    """A biased sampler: fair draws, but in blocks not those that the seed promises. A replay draws one at a time."""
    real = Sampler.noise

    def noise(sampler: Sampler, positions: mx.array, vocab_size: int) -> mx.array | None:
        return real(sampler, positions + is_block(positions.shape[1]), vocab_size)

    patch.setattr(Sampler, "noise", noise)
