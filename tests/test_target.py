"""The target against transformers, on the golden checkpoints, in every way a prompt can be fed."""

from collections.abc import Sequence

import mlx.core as mx
import pytest
from support import KINDS, golden, golden_pair, new_cache, random_prompts, relative_error

TOLERANCE = 2e-5
WINDOW = 16
LENGTHS = (1, 5, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW, 6 * WINDOW)


def logits_in_pieces(kind: str, tokens: mx.array, piece: int, through_ring: bool) -> mx.array:
    """[L, V]: the prompt fed in pieces, as prefill chunks or as decode blocks (which write the ring before reading)."""
    target, _ = golden_pair(kind)
    cache = new_cache(target)
    rows = []
    for start in range(0, tokens.size, piece):
        block = tokens[None, start : start + piece]
        count = mx.array([block.shape[1]])
        hidden = target(block, cache.stage(block.shape[1], None if through_ring else count))
        cache.commit(count, block.shape[1])
        rows.append(target.logits(hidden)[0])
    return mx.concatenate(rows)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers_however_the_prompt_is_fed(kind: str, length: int) -> None:
    tokens, expected = golden(kind)[f"target.{length}.tokens"], golden(kind)[f"target.{length}.logits"]
    for piece, through_ring in ((length, False), (7, False), (1, True), (4, True)):
        got = logits_in_pieces(kind, tokens, piece, through_ring)
        assert relative_error(got, expected) <= TOLERANCE, f"fed in pieces of {piece}"


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_after_the_final_norm(kind: str) -> None:
    target, _ = golden_pair(kind)
    tokens = golden(kind)["target.48.tokens"]
    hidden = target(tokens[None], new_cache(target).stage(48, mx.array([48])))
    assert relative_error(hidden[0], golden(kind)["target.48.hidden"]) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_ragged_rows_gives_each_row_its_own_logits(kind: str) -> None:
    target, _ = golden_pair(kind)
    texts = [golden(kind)[f"target.{length}.tokens"].tolist() for length in LENGTHS]
    cache = new_cache(target, rows=len(texts))
    got: list[list[mx.array]] = [[] for _ in texts]
    for start in range(0, max(LENGTHS), 10):
        hidden, valid = feed_padded(kind, texts, start, 10, cache)
        for row, count in enumerate(valid):
            if count:
                got[row].append(target.logits(hidden[row, :count]))
    for length, rows in zip(LENGTHS, got, strict=True):
        assert relative_error(mx.concatenate(rows), golden(kind)[f"target.{length}.logits"]) <= TOLERANCE


def feed_padded(kind: str, texts: Sequence[list[int]], start: int, width: int, cache) -> tuple[mx.array, list[int]]:
    target, _ = golden_pair(kind)
    pieces = [text[start : start + width] for text in texts]
    valid = [len(piece) for piece in pieces]
    tokens = mx.array([piece + [0] * (width - len(piece)) for piece in pieces])
    hidden = target(tokens, cache.stage(width, mx.array(valid)))
    cache.commit(mx.array(valid), width)
    return hidden, valid


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_one_position_changes_neither_it_nor_the_cache(kind: str) -> None:
    target, _ = golden_pair(kind)
    vocab_size = target.config.text.vocab_size
    texts = [prompt + [5] * (40 - len(prompt)) for prompt in random_prompts(0, 3, 40, vocab_size)]
    tokens, keep, valid = mx.array(texts), mx.array([39, 0, 17]), mx.array([40, 40, 40])
    whole_cache, kept_cache = new_cache(target, 3), new_cache(target, 3)
    whole = target(tokens, whole_cache.stage(40, valid))
    kept = target(tokens, kept_cache.stage(40, valid), keep=keep)
    expected = mx.take_along_axis(whole, keep[:, None, None], axis=1)
    assert kept.shape == (3, 1, target.config.text.hidden_size)
    assert relative_error(kept, expected) <= TOLERANCE
    for layer in set(target.config.text.donors.values()):
        for got, wanted in zip(kept_cache.read(layer), whole_cache.read(layer), strict=True):
            assert mx.array_equal(got, wanted)
