"""A piece of one row's keys and values, cut out of a cache so that another row with the same tokens can begin with it.

Full layers hold every token of the piece. Sliding layers may hold only its last ones, for a ring forgets: a row can
go on from a position only if the window before it is whole (`PrefixCache.match` checks that).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx


@dataclass(frozen=True)
class Span:
    """K/V of the tokens at positions start .. stop of a row, for every layer that owns its K/V.

    full: layer -> [2, 1, kv heads, stop - start, head_dim]; sliding: likewise from `sliding_from` (>= start) on.
    """

    start: int
    stop: int
    sliding_from: int
    full: Mapping[int, mx.array]
    sliding: Mapping[int, mx.array]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for part in (self.full, self.sliding) for array in part.values())

    def split(self, at: int) -> tuple[Span, Span]:
        """The same tokens as two spans, start .. at and at .. stop: copies, so that either can be dropped alone."""
        assert self.start < at < self.stop
        return self.part(self.start, at), self.part(at, self.stop)

    def part(self, start: int, stop: int) -> Span:
        """A copy of the tokens start .. stop of it."""
        assert self.start <= start < stop <= self.stop
        sliding_from = min(max(self.sliding_from, start), stop)
        return Span(start, stop, sliding_from, _cut(self.full, start - self.start, stop - self.start),
                    _cut(self.sliding, max(sliding_from - self.sliding_from, 0), max(stop - self.sliding_from, 0)))

    def thinned(self) -> Span:
        """Without the sliding layers: a way to longer prefixes, but no place to go on from."""
        return replace(self, sliding_from=self.stop, sliding=_cut(self.sliding, self.stop - self.sliding_from, None))

    def finish(self) -> None:
        """Hands the copies to the device, so that they do not hold on to what they were cut from."""
        mx.async_eval(*self.full.values(), *self.sliding.values())


def _cut(arrays: Mapping[int, mx.array], start: int, stop: int | None) -> dict[int, mx.array]:
    return {layer: mx.contiguous(array[:, :, :, start:stop]) for layer, array in arrays.items()}
