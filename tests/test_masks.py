"""Masks are the matrices of the module's docstring, and agree with a double loop over positions wherever they fall."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.models.masks import drafter_mask, target_mask, visible

WINDOW = 3


def drawing(mask: mx.array) -> str:
    """A mask [1, 1, L, S] as rows of x and dots."""
    assert mask.dtype == mx.bool_
    return "\n".join(" ".join("x" if seen else "." for seen in row) for row in np.array(mask)[0, 0])


def drawn(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def row(*positions: int) -> mx.array:
    return mx.array([positions], mx.int32)


def looped(newest: np.ndarray, keys: np.ndarray, reach: int | None) -> np.ndarray:
    """The definition: newest [B, L], keys [B, S], one comparison at a time -> [B, 1, L, S]."""
    batch, length, size = *newest.shape, keys.shape[1]
    seen = np.zeros((batch, 1, length, size), bool)
    for b in range(batch):
        for i in range(length):
            for j in range(size):
                key, limit = int(keys[b, j]), int(newest[b, i])
                oldest = 0 if reach is None else max(0, limit - reach + 1)
                seen[b, 0, i, j] = oldest <= key <= limit
    return seen


def ring_positions(rng: np.random.Generator, lengths: np.ndarray, capacity: int) -> np.ndarray:
    """What a ring holds after `lengths` tokens: slot s has the newest position with p mod capacity = s, or none."""
    keys = np.full((len(lengths), capacity), -1)
    for b, length in enumerate(lengths):
        for position in range(length):
            keys[b, position % capacity] = position
        empty = keys[b] < 0
        keys[b, empty] = -rng.integers(1, 50, empty.sum())  # any negative number means empty
    return keys


def test_a_sliding_layer_sees_the_last_window_of_tokens_itself_included() -> None:
    assert drawing(target_mask(row(0, 1, 2, 3, 4), row(0, 1, 2, 3, 4), WINDOW)) == drawn("""
        x . . . .
        x x . . .
        x x x . .
        . x x x .
        . . x x x
    """)


def test_a_full_layer_sees_everything_up_to_itself() -> None:
    assert drawing(target_mask(row(0, 1, 2, 3, 4), row(0, 1, 2, 3, 4), None)) == drawn("""
        x . . . .
        x x . . .
        x x x . .
        x x x x .
        x x x x x
    """)


def test_a_ring_needs_no_order_since_masks_come_from_positions() -> None:
    # Five slots that hold positions 5 6 2 3 4 and two more that hold nothing.
    assert drawing(target_mask(row(4, 5, 6), row(5, 6, 2, 3, 4, -1, -7), WINDOW)) == drawn("""
        . . x x x . .
        x . . x x . .
        x x . . x . .
    """)


def test_the_drafter_sees_one_position_more_than_the_window_and_never_the_newest_token() -> None:
    # P = 6: on a sliding layer P-1-W .. P-1 = 2 .. 5, on a full one 0 .. 5; a stale key at 6 is a rejected draft's.
    newest, keys = mx.array([6], mx.int32), row(0, 1, 2, 3, 4, 5, 6, 7, -1)
    assert drawing(drafter_mask(newest, keys, WINDOW)) == ". . x x x x . . ."
    assert drawing(drafter_mask(newest, keys, None)) == "x x x x x x . . ."


def test_a_drafter_at_the_start_of_a_row_sees_what_there_is() -> None:
    keys = row(0, 1, 2, -1)
    assert drawing(drafter_mask(mx.array([2], mx.int32), keys, WINDOW)) == "x x . ."
    assert drawing(drafter_mask(mx.array([0], mx.int32), keys, None)) == ". . . ."


@pytest.mark.parametrize("window", [1, 3, 8, None])
def test_masks_of_ragged_rows_agree_with_a_double_loop(window: int | None) -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        lengths = rng.integers(1, 40, 3)
        keys = ring_positions(rng, lengths, 13)
        queries = (lengths - 4)[:, None] + np.arange(4)  # the tokens just staged; a short row's padding is negative
        got = target_mask(mx.array(queries, mx.int32), mx.array(keys, mx.int32), window)
        assert np.array_equal(np.array(got), looped(queries, keys, window))
        drafted = drafter_mask(mx.array(lengths - 1, mx.int32), mx.array(keys, mx.int32), window)
        expected = looped((lengths - 2)[:, None], keys, None if window is None else window + 1)
        assert np.array_equal(np.array(drafted), expected)


def test_masks_of_random_positions_agree_with_a_double_loop() -> None:
    rng = np.random.default_rng(1)
    for reach in (1, 2, 5, 100, None):
        newest, keys = rng.integers(-2, 30, (3, 5)), rng.integers(-5, 32, (3, 20))
        got = visible(mx.array(newest, mx.int32), mx.array(keys, mx.int32), reach)
        assert np.array_equal(np.array(got), looped(newest, keys, reach))


def test_key_positions_that_all_rows_share_need_be_given_once() -> None:
    queries, keys = mx.array([[2, 3], [5, 6]], mx.int32), mx.array([[0, 1, 2, 3, 4, 5, 6]], mx.int32)
    shared, repeated = target_mask(queries, keys, WINDOW), target_mask(queries, mx.tile(keys, (2, 1)), WINDOW)
    assert shared.shape == (2, 1, 2, 7)
    assert mx.array_equal(shared, repeated).item()
    assert drafter_mask(mx.array([2, 5], mx.int32), keys, WINDOW).shape == (2, 1, 1, 7)
