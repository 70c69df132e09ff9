"""The cache against an oracle that keeps the whole history and attends to it with plain masks."""

import random

import mlx.core as mx
import pytest

from mlx_mtp import kv_cache
from mlx_mtp.config import FULL, SLIDING, AttentionKind
from mlx_mtp.kv_cache import KVCache, LayerShape
from mlx_mtp.models.masks import drafter_mask, target_mask

WINDOW = 6
HEAD_DIM = 4
SHAPES = {0: LayerShape(SLIDING, 2, HEAD_DIM), 1: LayerShape(FULL, 1, HEAD_DIM)}


def key_of(row_name: int, position: int, version: int, heads: int) -> mx.array:
    """A key that tells its row, position and the pass that wrote it: [heads, 1, HEAD_DIM]."""
    return mx.broadcast_to(mx.array([row_name, position, version, 1.0]), (heads, 1, HEAD_DIM))


def seen_keys(keys: mx.array, mask: mx.array, row: int, query: int) -> list[tuple[int, int, int]]:
    """(row name, position, version) of the keys that a row's query sees, by position; the first head stands for all."""
    chosen = [k for k, seen in zip(keys[row, 0].tolist(), mask[row % mask.shape[0], 0, query].tolist(), strict=True)
              if seen]
    return sorted((int(k[0]), int(k[1]), int(k[2])) for k in chosen)


class History:
    """The oracle: for each row the (row name, position, version) of every committed token."""

    def __init__(self, names: list[int]) -> None:
        self.names = names
        self.rows: list[list[tuple[int, int, int]]] = [[] for _ in names]
        self.version = 0

    def stage(self, cache: KVCache, num_tokens: int, valid: list[int] | None):
        """Runs a pass over num_tokens and returns its stage, masks and what `put` gave out, by layer."""
        self.version += 1
        stage = cache.stage(num_tokens, None if valid is None else mx.array(valid))
        outputs = {}
        for layer, shape in SHAPES.items():
            new = mx.stack([
                mx.concatenate([key_of(name, len(self.rows[r]) + i, self.version, shape.num_kv_heads)
                                for i in range(num_tokens)], axis=1)
                for r, name in enumerate(self.names)
            ])
            keys, values = stage.put(layer, new, -new)
            window = WINDOW if shape.kind == SLIDING else None
            outputs[shape.kind] = keys, values, target_mask(stage.positions, stage.key_positions(shape.kind), window)
        return stage, outputs

    def expected(self, row: int, query: int, kind: AttentionKind) -> list[tuple[int, int, int]]:
        staged = [(self.names[row], len(self.rows[row]) + i, self.version) for i in range(query + 1)]
        everything = self.rows[row] + staged
        return everything[-WINDOW:] if kind == SLIDING else everything

    def commit(self, cache: KVCache, counts: list[int], most: int) -> None:
        for row, count in enumerate(counts):
            start = len(self.rows[row])
            self.rows[row] += [(self.names[row], start + i, self.version) for i in range(count)]
        cache.commit(mx.array(counts), most)


def check_pass(history: History, outputs, valid: list[int], context: str) -> None:
    for kind, (keys, values, mask) in outputs.items():
        for row, count in enumerate(valid):
            for query in range(count):
                got = seen_keys(keys, mask, row, query)
                assert got == history.expected(row, query, kind), f"{context}: {kind}, row {row}, query {query}"
        assert mx.array_equal(values, -keys)


def check_drafter(history: History, cache: KVCache, context: str) -> None:
    for layer, shape in SHAPES.items():
        window = WINDOW if shape.kind == SLIDING else None
        mask = drafter_mask(cache.lengths, cache.key_positions(shape.kind), window)
        keys, _ = cache.read(layer)
        for row in range(cache.rows):
            committed = history.rows[row]
            expected = committed[-(WINDOW + 1):] if shape.kind == SLIDING else committed
            assert seen_keys(keys, mask, row, 0) == expected, f"{context}: drafter, {shape.kind}, row {row}"


def walk(seed: int, slack: int, max_draft: int, rounds: int = 25) -> None:
    """Random prefill chunks, rounds of random length with random acceptance, rows ending; checks every key seen."""
    generator = random.Random(seed)
    rows = generator.randint(1, 4)
    cache, history = KVCache(SHAPES, WINDOW, slack, rows, mx.float32), History(list(range(rows)))
    for step in range(generator.randint(1, 3)):
        width = generator.randint(1, 20)
        valid = [generator.randint(0 if step else 1, width) for _ in range(rows)]
        _, outputs = history.stage(cache, width, valid)
        check_pass(history, outputs, valid, f"prefill chunk {step}")
        history.commit(cache, valid, width)
    for step in range(rounds):
        check_drafter(history, cache, f"round {step}")
        block = generator.randint(0, max_draft) + 1
        _, outputs = history.stage(cache, block, None)
        check_pass(history, outputs, [block] * len(history.names), f"round {step}")
        history.commit(cache, [generator.randint(1, block) for _ in history.names], block)
        if len(history.names) > 1 and generator.random() < 0.1:
            gone = generator.randrange(len(history.names))
            cache.drop_row(gone)
            for names in (history.names, history.rows):
                names[gone] = names[-1]  # type: ignore[index]
                names.pop()
        if generator.random() < 0.5:
            cache.tighten(max(map(len, history.rows)))
        if len(history.names) < 5 and generator.random() < 0.2:
            join_a_row(generator, cache, history, slack, max_draft)


def join_a_row(generator: random.Random, cache: KVCache, history: History, slack: int, max_draft: int) -> None:
    """A new row joins: prefilled in a cache of its own, or begun with what is cut out of a row that decodes."""
    joining, its = KVCache(SHAPES, WINDOW, slack, 1, mx.float32), History([10 + len(history.rows) + history.version])
    its.version = history.version
    if generator.random() < 0.5:
        width = generator.randint(1, 20)
        its.stage(joining, width, [width])
        its.commit(joining, [width], width)
    else:
        row = generator.randrange(len(history.rows))
        known = history.rows[row]
        at = generator.randint(1, len(known))
        spans = [cache.cut(row, start, stop, len(known) + max_draft) for start, stop in ((0, at), (at, len(known)))
                 if start < stop]
        joining.paste(spans, len(known))
        its.rows[0] = list(known)
        # The drafter looks one key further than a pass goes on from: the newest token is run, never reused.
        its.stage(joining, 1, [1])
        its.commit(joining, [1], 1)
    cache.join(joining)
    history.names += its.names
    history.rows += its.rows
    history.version = its.version


def walk_many(seeds: int, slack: int, max_draft: int) -> None:
    for seed in range(seeds):
        walk(seed, slack, max_draft)


@pytest.mark.parametrize("seed", range(12))
def test_every_pass_and_every_draft_sees_exactly_the_committed_keys_in_reach(seed: int) -> None:
    walk(seed, slack=8, max_draft=7)


@pytest.mark.parametrize("seed", range(6))
def test_a_ring_that_is_read_in_part_shows_the_same_keys(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps of 4 instead of 64 the small ring here goes through all of its states, before and after it wraps."""
    monkeypatch.setattr(kv_cache, "READ_STEP", 4)
    walk(seed, slack=8, max_draft=7)


def test_slack_of_one_more_than_the_longest_draft_is_enough() -> None:
    walk_many(6, slack=4, max_draft=3)


@pytest.mark.parametrize("slack", [0, 3])
def test_with_less_slack_rejected_drafts_destroy_keys_that_are_still_in_reach(
    slack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the slack is there. The guard against it is taken away; 3 is one too few for 3 drafts and the drafter."""
    monkeypatch.setattr(KVCache, "_check_block", lambda self, num_tokens: None)
    with pytest.raises(AssertionError, match="round"):
        walk_many(6, slack, max_draft=3)


def test_a_block_longer_than_the_slack_is_refused() -> None:
    cache = KVCache(SHAPES, WINDOW, 4, 1, mx.float32)
    with pytest.raises(ValueError, match="slack"):
        cache.stage(5)


def test_full_layers_grow_and_keep_what_they_hold() -> None:
    cache, history = KVCache(SHAPES, WINDOW, 8, 2, mx.float32), History([0, 1])
    for _ in range(60):
        _, outputs = history.stage(cache, 8, None)
        history.commit(cache, [8, 5], 8)
    _, outputs = history.stage(cache, 1, None)
    check_pass(history, outputs, [1, 1], "after growth")


def test_an_update_is_in_place_whatever_the_capacity() -> None:
    """A view or a snapshot kept across an update would copy the whole cache: here 64 MB, allowed is 1."""
    shapes = {0: LayerShape(FULL, 4, 64), 1: LayerShape(SLIDING, 4, 64)}
    cache = KVCache(shapes, 16_384, 8, 2, mx.float32, reserve=32_768)
    new = mx.ones((2, 4, 4, 64))
    mx.eval(cache.arrays, new)
    for _ in range(3):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        stage = cache.stage(4)
        sums = [mx.stack(stage.put(layer, new, new)).sum() for layer in shapes]
        cache.commit(mx.array([4, 1]), 4)
        mx.eval(sums, cache.arrays)
        assert mx.get_peak_memory() - before < 70_000_000  # the sums read ring and prefix once
        del stage, sums
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    cache.drop_row(0)
    mx.eval(cache.arrays)
    row = sum(array.nbytes for array in cache.arrays[1:]) / 2
    assert mx.get_peak_memory() - before <= 1.1 * row, "ending a row copies one row"


def ran(rows: int, tokens: int) -> KVCache:
    """Rows after a prompt of so many tokens, as the engine runs it."""
    cache = KVCache(SHAPES, WINDOW, 3, rows, mx.float32, tokens + 3)
    stage = cache.stage(tokens, mx.array([tokens] * rows))
    for layer, shape in SHAPES.items():
        new = mx.ones((rows, shape.num_kv_heads, tokens, HEAD_DIM))
        stage.put(layer, new, new)
    cache.commit(mx.array([tokens] * rows), tokens)
    return cache


def test_rows_that_ended_and_room_that_nobody_needs_are_left_behind_when_others_join() -> None:
    """What is held is what the scheduler plans with: rows times the longest."""
    many = ran(8, 10)
    for _ in range(7):
        many.drop_row(0)
    many.join(ran(1, 3000))
    assert [array.shape[1] for array in many.arrays[1:]] == [2, 2]
    assert many.arrays[2].shape[3] == kv_cache.round_up(3000 + 3, kv_cache.GROW_STEP)
    assert many.lengths.tolist() == [10, 3000]
    many.drop_row(1)
    many.tighten(10)
    many.join(ran(6, 10))
    assert [array.shape[1] for array in many.arrays[1:]] == [7, 7]
    assert many.arrays[2].shape[3] == kv_cache.GROW_STEP
    assert many.lengths.tolist() == [10] * 7


def test_a_long_row_grows_by_no_more_than_an_answer() -> None:
    cache = ran(1, 20_000)
    cache.stage(300, mx.array([300]))
    assert 20_300 < cache.arrays[2].shape[3] <= 20_300 + kv_cache.MOST_AHEAD + kv_cache.GROW_STEP
