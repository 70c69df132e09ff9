"""Prefixes: the tree against a plain list of all that was inserted, the window's check, and what goes first."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import mlx.core as mx
import pytest

from mlx_mtp.engine.prefix_cache import MIN_REUSE, PrefixCache, _Node
from mlx_mtp.kv_span import Span

WINDOW = 40
TOKEN_BYTES = 2 * 4 * 2  # K and V, float32, a sliding and a full layer


def span_of(tokens: Sequence[int], start: int, stop: int, sliding_from: int | None = None) -> Span:
    """K/V that tell token and position: [2, 1, 1, T, 1], 1000 * token + position."""
    def keys(first: int) -> mx.array:
        numbers = [1000.0 * tokens[i] + i for i in range(first, stop)]
        return mx.array([numbers, numbers]).reshape(2, 1, 1, -1, 1)

    sliding_from = start if sliding_from is None else sliding_from
    return Span(start, stop, sliding_from, {1: keys(start)}, {0: keys(sliding_from)})


def check_keys(tokens: Sequence[int], length: int, spans: Sequence[Span]) -> None:
    assert spans[0].start == 0
    assert spans[-1].start < length <= spans[-1].stop
    for before, after in itertools.pairwise(spans):
        assert before.stop == after.start
    full = [key for span in spans for key in span.full[1][0].flatten().tolist()][:length]
    assert full == [1000.0 * token + i for i, token in enumerate(tokens[:length])]
    positions = [position for span in spans for position in range(span.sliding_from, span.stop)]
    keys = [key for span in spans for key in span.sliding[0][0].flatten().tolist()]
    sliding = dict(zip(positions, keys, strict=True))
    for position in range(max(0, length - WINDOW), length):
        assert sliding[position] == 1000.0 * tokens[position] + position


@pytest.mark.parametrize("seed", range(8))
def test_the_longest_known_beginning_is_found_and_its_keys_are_right(seed: int) -> None:
    """Random texts over two letters share beginnings at every length; whole spans make every length usable."""
    generator = random.Random(seed)
    cache = PrefixCache(WINDOW, 10**9)
    known: list[list[int]] = []
    for _ in range(25):
        begins = generator.choice(known)[: generator.randrange(200)] if known else []
        text = begins + [generator.choice([5, 6]) for _ in range(generator.randint(1, 120))]
        expected = max((common_length(text[:-1], other) for other in known), default=0)
        length, spans = cache.take(text)
        assert length == cache.match(text) == (expected if expected >= MIN_REUSE else 0)
        if length:
            check_keys(text, length, spans)
        for start in range(length, len(text), 50):
            cache.insert(text, span_of(text, start, min(start + 50, len(text))))
        known.append(text)
    nodes = list(cache._root.below())
    assert cache.nbytes == sum(node.span.nbytes for node in nodes if node.span is not None)
    assert cache.nbytes == sum(len(node.tokens) for node in nodes) * TOKEN_BYTES


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def test_a_position_whose_window_is_not_whole_is_not_gone_on_from() -> None:
    text = list(range(10, 310))
    cache = PrefixCache(WINDOW, 10**9)
    cache.insert(text, span_of(text, 0, 100))
    cache.insert(text, span_of(text, 100, 200, sliding_from=200 - WINDOW))  # an answer: what the ring still held
    assert cache.match(text) == 200
    assert cache.match([*text[:199], 1, 1]) == 100, "one token before the end, the window lacks one token"
    assert cache.match([*text[:150], 1, 1]) == 100
    cache = PrefixCache(WINDOW, 10**9)
    cache.insert(text, span_of(text, 0, 100))
    cache.insert(text, span_of(text, 100, 200, sliding_from=201 - WINDOW))
    assert cache.match(text) == 100, "the oldest token of the window is gone"
    length, spans = cache.take(text)
    check_keys(text, length, spans)


@pytest.mark.parametrize("sliding_from", [10, 25, 45, 80, 100])
def test_a_part_of_a_span_holds_what_that_had_of_its_tokens(sliding_from: int) -> None:
    text = list(range(200))
    part = span_of(text, 10, 100, sliding_from).part(30, 60)
    assert (part.start, part.stop, part.sliding_from) == (30, 60, min(max(sliding_from, 30), 60))
    for keys, first in ((part.full[1], 30), (part.sliding[0], part.sliding_from)):
        assert keys[0].flatten().tolist() == [1000.0 * text[i] + i for i in range(first, 60)]


def test_at_least_one_token_is_left_to_run() -> None:
    text = list(range(50))
    cache = PrefixCache(WINDOW, 10**9)
    cache.insert(text, span_of(text, 0, 50))
    assert cache.match(text) == 49
    assert cache.match([*text, 3]) == 50


def test_windows_inside_of_texts_go_first_then_the_ends_of_the_texts_used_longest_ago() -> None:
    cache = PrefixCache(WINDOW, 500 * TOKEN_BYTES)
    old, new = [list(range(first, first + 300)) for first in (1000, 2000)]
    for start in range(0, 300, 100):
        cache.insert(old, span_of(old, start, start + 100))
    for start in range(0, 200, 100):
        cache.insert(new, span_of(new, start, start + 100))
    assert (cache.match([*old, 1]), cache.match([*new[:200], 1])) == (300, 200)
    cache.insert(new, span_of(new, 200, 300))
    assert cache.nbytes <= 500 * TOKEN_BYTES
    assert cache.match([*old, 1]) == 300, "its end is whole, only the way to it is thin"
    assert cache.match([*old[:150], 1]) == 0, "there the window is gone"
    assert cache.match([*new[:150], 1]) == 150
    assert cache.match([*new, 1]) == 300
    other = list(range(3000, 3400))
    for start in range(0, 400, 100):
        cache.insert(other, span_of(other, start, start + 100))
        assert cache.nbytes <= 500 * TOKEN_BYTES
    assert cache.match([*other, 1]) == 400
    assert cache.match([*old, 1]) == 0, "used longest ago"


def test_a_beginning_that_many_texts_share_stays_usable_when_memory_is_short() -> None:
    cache, system = PrefixCache(WINDOW, 450 * TOKEN_BYTES), list(range(120))
    found = []
    for document in range(8):
        text = [*system, *range(1000 * (1 + document), 1000 * (1 + document) + 200)]
        length, spans = cache.take(text)
        found.append(length)
        if length:
            check_keys(text, length, spans)
        for start in range(length, len(text), 50):
            cache.insert(text, span_of(text, start, min(start + 50, len(text))))
            assert cache.nbytes <= 450 * TOKEN_BYTES
            assert cache.nbytes == sum(node.span.nbytes for node in cache._root.below() if node.span is not None)
    assert found[1] == 120, "there was room for all"
    assert found.count(0) == 2, "the first, and the one after its window was freed"
    assert found[-3:] == [120] * 3


def test_a_text_beyond_the_budget_keeps_its_end_however_often_it_is_run() -> None:
    cache, text = PrefixCache(WINDOW, 300 * TOKEN_BYTES), list(range(500))
    for _ in range(3):
        for start in range(0, 500, 50):
            cache.insert(text, span_of(text, start, start + 50))
            assert cache.nbytes <= 300 * TOKEN_BYTES
        assert cache.match([*text, 1]) == 500


def test_what_does_not_fit_or_does_not_follow_is_not_kept() -> None:
    text = list(range(300))
    cache = PrefixCache(WINDOW, 100 * TOKEN_BYTES)
    cache.insert(text, span_of(text, 0, 101))
    assert cache.nbytes == 0
    cache.insert(text, span_of(text, 50, 100))
    assert cache.nbytes == 0
    cache.insert(text, span_of(text, 0, 100))
    cache.insert(text, span_of(text, 0, 100))
    assert cache.nbytes == 100 * TOKEN_BYTES


def test_a_prompt_of_a_thousand_chunks_is_kept_without_recursion() -> None:
    node = root = _Node((), None, None)
    for token in range(3000):
        node.children[token] = node = _Node((token,), None, node)
    assert sum(1 for _ in root.below()) == 3000
