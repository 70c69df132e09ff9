"""Who sees whom, as functions of positions.

Positions are integers counted from the start of a row; a key slot that holds nothing has a negative position.
A target's query at position q sees the keys q-W+1 .. q on a sliding layer (here W = 3), and 0 .. q on a full one:

    sliding   k 0 1 2 3 4      full   k 0 1 2 3 4
          q 0   x . . . .         q 0   x . . . .
          q 1   x x . . .         q 1   x x . . .
          q 2   x x x . .         q 2   x x x . .
          q 3   . x x x .         q 3   x x x x .
          q 4   . . x x x         q 4   x x x x x

The drafter's query stands at P, where the newest token is, whose own K/V nobody has computed: it sees 0 .. P-1 on a
full layer and the newest W+1 of them, P-1-W .. P-1, on a sliding one (transformers' inclusive rule).
"""

from __future__ import annotations

import mlx.core as mx


def visible(newest: mx.array, key_positions: mx.array, reach: int | None) -> mx.array:
    """Boolean mask [B, 1, L, S]: key k is seen by a query iff newest - reach < k <= newest and k >= 0.

    newest: [B, L], the newest position each query may see; key_positions: [B or 1, S];
    reach: how many positions it sees at most, or None for all.
    """
    newest, keys = newest[:, None, :, None], key_positions[:, None, None, :]
    mask = (keys <= newest) & (keys >= 0)
    return mask if reach is None else mask & (keys > newest - reach)


def target_mask(query_positions: mx.array, key_positions: mx.array, window: int | None) -> mx.array:
    """[B, 1, L, S] for the target: causal, and within `window` (the query's own position counted) if there is one."""
    return visible(query_positions, key_positions, window)


def drafter_mask(newest_positions: mx.array, key_positions: mx.array, window: int | None) -> mx.array:
    """[B, 1, 1, S] for the drafter: everything before the newest token [B], the last window + 1 of it if windowed."""
    return visible(newest_positions[:, None] - 1, key_positions, None if window is None else window + 1)
