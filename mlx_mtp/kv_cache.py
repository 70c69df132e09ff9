"""Keys and values of a batch of rows: staged by a pass, committed by a count, never rewound.

Every row has its own length, kept on the device. A pass over L tokens *stages* their K/V beyond the committed length;
`commit` then says how many of them each row keeps. What is not kept is simply not counted: masks, which follow from
positions, hide it, and later passes write over it.

A full layer is append-only: position p lives in slot p. A sliding layer is a ring of `window + slack` slots:
position p lives in slot p mod capacity. With window 4, slack 3 and 9 committed tokens (0 to 8), a row's ring is

    slot      0  1  2  3  4  5  6
    position  7  8  2  3  4  5  6        positions 5..8 are the window of 8; 2..4 may be overwritten by drafts

The slack is what makes drafts safe: a rejected draft at position p has destroyed position p - capacity, which must be
out of every later query's reach. The drafter's reach is the widest, window + 1 before the newest token, so a round
of K drafts needs slack >= K + 1 (see tests/test_kv_cache.py, which fails with less).

MLX updates a buffer in place only if nobody else holds it: the arrays given out by a stage must not outlive the round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.config import SLIDING, AttentionKind, TextConfig
from mlx_mtp.kv_span import Span

# Full layers are read and grown in steps, so that shapes, and with them allocations, seldom change.
READ_STEP = 64
GROW_STEP = 256
MOST_AHEAD = 2048  # positions, at most, that a buffer grows beyond what is needed


@dataclass(frozen=True)
class LayerShape:
    """What the cache must know of a layer that owns its K/V."""

    kind: AttentionKind
    num_kv_heads: int
    head_dim: int

    @property
    def numbers_per_position(self) -> int:
        """How many numbers one position's K and V take together."""
        return 2 * self.num_kv_heads * self.head_dim


def layer_shapes(config: TextConfig) -> dict[int, LayerShape]:
    """Layer index -> shape, for the layers that own their K/V."""
    return {
        i: LayerShape(layer.kind, layer.num_kv_heads, layer.head_dim)
        for i, layer in enumerate(config.layers) if layer.kv_source == i
    }


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _with_room(needed: int) -> int:
    """Slots of a full layer that has to grow: somewhat more, so that it seldom has to."""
    return round_up(needed + min(needed // 4, MOST_AHEAD), GROW_STEP)


def _sized(array: mx.array, axis: int, size: int) -> mx.array:
    """Cut, or filled up with zeros, to `size` along an axis."""
    if size == array.shape[axis]:
        return array
    if size < array.shape[axis]:
        return mx.contiguous(array[tuple(slice(size if i == axis else None) for i in range(array.ndim))])
    return mx.pad(array, [(0, size - array.shape[axis] if i == axis else 0) for i in range(array.ndim)])


class KVCache:
    """K/V of `rows` rows for every layer in `shapes`.

    lengths: [rows] int32 on the device, the committed tokens of each row.
    bound: a host-side upper bound of max(lengths); `tighten` lowers it when the host has read the truth.
    """

    def __init__(
        self, shapes: Mapping[int, LayerShape], window: int, slack: int, rows: int, dtype: mx.Dtype, reserve: int = 0
    ) -> None:
        self._shapes = dict(shapes)
        self._ring = window + slack
        self._slack = slack
        self._dtype = dtype
        self._full_capacity = round_up(max(reserve, 1), GROW_STEP)
        self._buffers = {i: self._allocate(rows, shape) for i, shape in self._shapes.items()}
        self._lengths = mx.zeros((rows,), mx.int32)
        self._rows = rows
        self.bound = 0

    @property
    def rows(self) -> int:
        """Rows in use; they are the first ones of the buffers."""
        return self._rows

    @property
    def lengths(self) -> mx.array:
        return self._lengths[: self._rows]

    @property
    def arrays(self) -> list[mx.array]:
        """Everything that the next round depends on: hand it to `mx.async_eval`."""
        return [self._lengths, *self._buffers.values()]

    def stage(self, num_tokens: int, valid: mx.array | None = None) -> CacheStage:
        """Opens a pass over `num_tokens` new tokens a row.

        valid: [rows] int32, how many of them are real in each row (the rest is padding), known before the pass as in
        prefill; a pass without it may be at most `slack` tokens long, since the ring is then written before it is read.
        """
        if valid is None:
            self._check_block(num_tokens)
        self._grow(self.bound + num_tokens)
        return CacheStage(self, num_tokens, valid)

    def commit(self, counts: mx.array, most: int) -> None:
        """Keeps `counts` [rows] of the tokens staged last; no count may be above `most`."""
        if self._rows < self._lengths.shape[0]:
            counts = mx.concatenate([counts, mx.zeros((self._lengths.shape[0] - self._rows,), mx.int32)])
        self._lengths = self._lengths + counts
        self.bound += most

    def tighten(self, bound: int) -> None:
        """Lowers the upper bound of the lengths to what the host knows now (rounds in flight included)."""
        assert bound <= self.bound, "the bound can only be lowered"
        self.bound = bound

    def drop_row(self, row: int) -> None:
        """Ends a row: the last row moves into its place (one copy of one row, waited for)."""
        last = self._rows - 1
        if row != last:
            # Finished before it is put in place: an update is in place only once nothing else reads the buffer.
            copies = [mx.take(buffer, mx.array([last]), axis=1) for buffer in self._buffers.values()]
            mx.eval(copies)
            for buffer, copy in zip(self._buffers.values(), copies, strict=True):
                buffer[:, row : row + 1] = copy
        index = mx.arange(self._lengths.size)
        moved = mx.where(index == row, self._lengths[last], self._lengths)
        self._lengths = mx.where(index == last, 0, moved)  # unused rows are written too, so they must stay small
        self._rows = last

    def join(self, other: KVCache) -> None:
        """Takes all rows of `other` behind its own (one copy of them); `other` is used up by that."""
        used, rows = self._rows, self._rows + other.rows
        self.bound = max(self.bound, other.bound)
        needed = self.bound + self._slack
        if rows > self._lengths.size or needed > self._full_capacity:
            self._resize(rows, max(round_up(needed, GROW_STEP), min(self._full_capacity, _with_room(needed))))
        for i, buffer in self._buffers.items():
            slots = min(buffer.shape[3], other._buffers[i].shape[3])
            buffer[:, used:rows, :, :slots] = other._buffers[i][:, : other.rows, :, :slots]
        self._lengths[used:rows] = other.lengths
        self._rows = rows

    def cut(self, row: int, start: int, stop: int, written: int) -> Span:
        """Copies a row's committed tokens start .. stop out (waited for, so that later updates stay in place).

        written: an upper bound of the positions ever written in this row. What lies a ring's capacity before that is
        gone from the sliding layers.
        """
        sliding_from = min(max(start, written - self._ring), stop)
        slots = mx.remainder(mx.arange(sliding_from, stop, dtype=mx.int32), self._ring)
        full, sliding = {}, {}
        for i, shape in self._shapes.items():
            if shape.kind == SLIDING:
                sliding[i] = mx.take(self._buffers[i][:, row : row + 1], slots, axis=3)
            else:
                full[i] = mx.contiguous(self._buffers[i][:, row : row + 1, :, start:stop])
        mx.eval(*full.values(), *sliding.values())
        return Span(start, stop, sliding_from, full, sliding)

    def paste(self, spans: Sequence[Span], length: int) -> None:
        """Fills the only row of an empty cache with its first `length` tokens.

        spans: they follow each other from position 0 to `length` or beyond, the window before `length` whole.
        """
        assert self._rows == 1
        assert self.bound == 0
        assert spans[-1].start < length <= spans[-1].stop
        if length > self._full_capacity:
            self._resize(1, round_up(length, GROW_STEP))
        newest: list[Span] = []  # as far back as the sliding layers are whole and the ring reaches
        for span in reversed(spans):
            newest.insert(0, span)
            if span.sliding_from > span.start or span.start <= length - self._ring:
                break
        oldest = newest[0].sliding_from
        first = max(oldest, length - self._ring)
        slots = mx.remainder(mx.arange(first, length, dtype=mx.int32), self._ring)[None, None, None, :, None]
        for i, shape in self._shapes.items():
            if shape.kind == SLIDING:
                known = mx.concatenate([span.sliding[i] for span in newest], axis=3)
                known = known[:, :, :, first - oldest : length - oldest]
                self._buffers[i] = mx.put_along_axis(self._buffers[i], slots, known, axis=3)
            else:
                known = mx.concatenate([span.full[i] for span in spans], axis=3)[:, :, :, :length]
                self._buffers[i][:, :, :, :length] = known
        self._lengths = mx.array([length], mx.int32)
        self.bound = length

    def read(self, layer: int) -> tuple[mx.array, mx.array]:
        """Committed and staged K/V of a layer as a pass over no tokens sees them: [rows, kv heads, S, head_dim]."""
        return self._visible(layer)

    def key_positions(self, kind: AttentionKind) -> mx.array:
        """[rows or 1, S] int32: the position of each key given by `read`, as far as it is committed."""
        return self._positions(kind, self.lengths - 1)

    def _allocate(self, rows: int, shape: LayerShape) -> mx.array:
        """[2, rows, kv heads, capacity, head_dim]: keys and values, so that one operation writes both."""
        capacity = self._ring if shape.kind == SLIDING else self._full_capacity
        return mx.zeros((2, rows, shape.num_kv_heads, capacity, shape.head_dim), self._dtype)

    def _check_block(self, num_tokens: int) -> None:
        if num_tokens > self._slack:
            raise ValueError(f"a block of {num_tokens} tokens does not fit: the ring's slack is {self._slack}; "
                             "expected at most that many, or their valid counts")

    def _grow(self, needed: int) -> None:
        if needed > self._full_capacity:
            self._resize(self._rows, _with_room(needed))

    def _resize(self, rows: int, capacity: int) -> None:
        """Since that is a copy, it takes no row and no slot along that is not asked for: memory is planned by both."""
        for i, shape in self._shapes.items():
            slots = self._ring if shape.kind == SLIDING else capacity
            self._buffers[i] = _sized(_sized(self._buffers[i], 1, rows), 3, slots)
        self._lengths = _sized(self._lengths, 0, rows)
        self._full_capacity = capacity

    def _write(self, layer: int, slots: mx.array, new: mx.array) -> None:
        """Puts `new` [2, rows in use, kv heads, L, head_dim] at `slots` [all rows, L] of a layer, in place."""
        unused = self._lengths.size - self._rows
        if unused:
            new = mx.pad(new, [(0, 0), (0, unused), (0, 0), (0, 0), (0, 0)])
        slots = slots[None, :, None, :, None]
        self._buffers[layer] = mx.put_along_axis(self._buffers[layer], slots, new, axis=3)

    def _visible(self, layer: int, extra: int = 0) -> tuple[mx.array, mx.array]:
        buffer = self._buffers[layer]
        end = self._read_end(self._shapes[layer].kind, extra)
        return buffer[0, : self._rows, :, :end], buffer[1, : self._rows, :, :end]

    def _read_end(self, kind: AttentionKind, extra: int) -> int:
        """How many slots hold all there is, `extra` staged tokens too: a ring that has not wrapped is read in part."""
        capacity = self._ring if kind == SLIDING else self._full_capacity
        return min(round_up(max(self.bound + extra, 1), READ_STEP), capacity)

    def _positions(self, kind: AttentionKind, newest: mx.array, extra: int = 0) -> mx.array:
        slots = mx.arange(self._read_end(kind, extra), dtype=mx.int32)
        if kind != SLIDING:
            return slots[None]
        newest = newest[:, None]
        return newest - mx.remainder(newest - slots, self._ring)


class CacheStage:
    """One pass over L new tokens a row: where they stand, and where their K/V go. See `models.target.Stage`."""

    def __init__(self, cache: KVCache, num_tokens: int, valid: mx.array | None) -> None:
        self._cache, self._num_tokens = cache, num_tokens
        self._staged: dict[int, mx.array] = {}
        lengths = cache.lengths
        self._full_slots = cache._lengths[:, None] + mx.arange(num_tokens, dtype=mx.int32)
        self.positions = self._full_slots[: cache.rows]
        self._through_ring = valid is None
        if valid is None:
            self._ring_slots = mx.remainder(self._full_slots, cache._ring)
            self._ring_positions = cache._positions(SLIDING, lengths + (num_tokens - 1), num_tokens)
        else:
            # A prefill chunk may be longer than the ring: it attends to the ring as it was and to itself.
            before = cache._positions(SLIDING, lengths - 1)
            self._ring_positions = mx.concatenate([before, self.positions], axis=1)
            slots, self._old = mx.arange(cache._ring, dtype=mx.int32), cache._read_end(SLIDING, 0)
            newest = lengths[:, None] + valid[:, None] - 1
            after = newest - mx.remainder(newest - slots, cache._ring)
            # A slot beyond what is read of the old ring was empty: what it gets then has a negative position.
            old = mx.minimum(slots, self._old - 1)
            self._ring_source = mx.where(after >= lengths[:, None], self._old + after - lengths[:, None], old)

    def key_positions(self, kind: AttentionKind) -> mx.array:
        if kind == SLIDING:
            return self._ring_positions
        return self._cache._positions(kind, self.positions[:, -1], self._num_tokens)

    def put(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stages K/V [rows, kv heads, L, head_dim]; returns all that the pass may attend to."""
        cache, new = self._cache, mx.stack([keys, values])
        sliding = cache._shapes[layer].kind == SLIDING
        if not self._through_ring:
            self._staged[layer] = new
        if sliding and not self._through_ring:
            return self._put_chunk(layer, new)
        cache._write(layer, self._ring_slots if sliding else self._full_slots, new)
        return cache._visible(layer, self._num_tokens)

    def span(self, row: int, start: int, count: int) -> Span:
        """A prefill chunk's K/V of one row: `count` tokens from position `start`, where the row stood before it."""
        parts: dict[bool, dict[int, mx.array]] = {True: {}, False: {}}
        for layer, new in self._staged.items():
            piece = mx.contiguous(new[:, row : row + 1, :, :count])
            parts[self._cache._shapes[layer].kind == SLIDING][layer] = piece
        return Span(start, start + count, start, full=parts[False], sliding=parts[True])

    def _put_chunk(self, layer: int, new: mx.array) -> tuple[mx.array, mx.array]:
        """Writes the newest real tokens of a chunk into a ring; returns the old ring and the whole chunk, in a row."""
        buffer, rows = self._cache._buffers[layer], self._cache.rows
        both = mx.concatenate([buffer[:, :rows, :, : self._old], new], axis=3)
        buffer[:, :rows] = mx.take_along_axis(both, self._ring_source[None, :, None, :, None], axis=3)
        return both[0], both[1]
