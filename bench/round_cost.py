"""What a round of drafting costs on a chip, and what it gains: a roofline, and an estimate of what is reached of it.

A round is one target pass over rows * (K + 1) tokens and K drafter steps. Each takes the time of its bytes and of its
multiplications. In the roofline both go at the chip's full rate and side by side, so the longer counts: a bound.
In the estimate they go at a share of it and one after the other, and what the kernels read twice is counted twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.chips import Chip
from bench.model_bytes import Dispatch, DrafterModel, TargetModel

NARROW_ROWS = 12  # about where MLX's tiled kernel takes over, which reads the weights once
BISECTIONS = 40


@dataclass(frozen=True)
class Efficiency:
    """What is reached of a chip. The defaults are the roofline itself.

    bandwidth, compute: share of the chip's bytes/s and FLOP/s. overlaps: whether they go side by side.
    reread: on chips without wide kernels, the share of a reading that each row after the first costs again.
    """

    bandwidth: float = 1.0
    compute: float = 1.0
    overlaps: bool = True
    reread: float = 0.0


BOUND = Efficiency()
# One set for all chips, models and widths, rounded; nothing is fitted to a single case. From public measurements of
# Gemma 4 on MLX (bench/published.py): plain decoding at one row reaches 0.55 to 0.86 of the bandwidth on M3 Ultra, M5
# and M5 Max (and 0.4 to 0.5 on M1 Ultra, where tok/s are therefore estimated too high, ratios not); on an M3 Ultra the
# 31B's round grows by about 0.1 plain steps with each row from the first on, which is 0.7 of its FLOP/s and no overlap;
# on an M1 Ultra a further row cost 0.35 (12B) to 0.7 (31B) of a step.
MEASURED = Efficiency(bandwidth=0.8, compute=0.7, overlaps=False, reread=0.5)


def mean_acceptance_length(acceptance: Sequence[float], num_draft_tokens: int) -> float:
    """Tokens of a round: 1 + a1 + a1*a2 + ...

    acceptance: for each position the share accepted of the drafts whose predecessors were; the last one goes on.
    """
    length, accepted = 1.0, 1.0
    for position in range(num_draft_tokens):
        accepted *= acceptance[min(position, len(acceptance) - 1)]
        length += accepted
    return length


@dataclass(frozen=True)
class Decoding:
    """A pair decoding `rows` rows at `context` tokens each."""

    chip: Chip
    target: TargetModel
    drafter: DrafterModel
    rows: int = 1
    context: int = 1024
    dispatch: Dispatch = "sorted"
    efficiency: Efficiency = BOUND

    def pass_bytes(self, num_draft_tokens: int) -> float:
        """Weights and K/V of one target pass, each read once; experts as the dispatch has it."""
        tokens = self.rows * (num_draft_tokens + 1)
        return self.target.weight_bytes(tokens, self.dispatch) + self.rows * self.target.kv_bytes(self.context)

    def pass_seconds(self, num_draft_tokens: int) -> float:
        tokens = self.rows * (num_draft_tokens + 1)
        again = 0.0
        if self.target.is_affine and not self.chip.has_wide_kernels:
            again = self.efficiency.reread * (min(tokens, NARROW_ROWS) - 1) * self.target.dense.bytes
        return self._seconds(self.pass_bytes(num_draft_tokens) + again, tokens * self.target.flop(self.context))

    def step_seconds(self) -> float:
        """One drafter step of all rows."""
        step, rows = self.drafter.step(self.rows), self.rows
        return self._seconds(step.bytes + rows * self.drafter.kv_bytes(self.context),
                             rows * self.drafter.flop(self.context))

    def round_seconds(self, num_draft_tokens: int) -> float:
        return self.pass_seconds(num_draft_tokens) + num_draft_tokens * self.step_seconds()

    def round_cost(self, num_draft_tokens: int) -> float:
        """In plain steps of the same rows: the mean acceptance length that breaks even."""
        return self.round_seconds(num_draft_tokens) / self.pass_seconds(0)

    def is_compute_bound(self, num_draft_tokens: int) -> bool:
        """Whether the target pass of the roofline waits for multiplications."""
        flop = self.rows * (num_draft_tokens + 1) * self.target.flop(self.context)
        return flop / self.chip.flop_per_second > self.pass_bytes(num_draft_tokens) / self.chip.bytes_per_second

    def tokens_per_second(self, num_draft_tokens: int, acceptance: Sequence[float]) -> float:
        """Of all rows together."""
        length = mean_acceptance_length(acceptance, num_draft_tokens)
        return self.rows * length / self.round_seconds(num_draft_tokens)

    def speedup(self, num_draft_tokens: int, acceptance: Sequence[float], plain: Decoding | None = None) -> float:
        """Over plain decoding of the same rows: with the same dispatch, unless `plain` says with what."""
        return self.tokens_per_second(num_draft_tokens, acceptance) / (plain or self).tokens_per_second(0, acceptance)

    def break_even(self, num_draft_tokens: int) -> float | None:
        """The acceptance, equal at all positions, at which K > 0 drafts gain what they cost; None if none is enough."""
        assert num_draft_tokens > 0, "plain decoding breaks even with itself"
        cost = self.round_cost(num_draft_tokens)
        if cost > num_draft_tokens + 1:
            return None
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if mean_acceptance_length([middle], num_draft_tokens) < cost:
                low = middle
            else:
                high = middle
        return high

    def _seconds(self, nbytes: float, flop: float) -> float:
        loading = nbytes / (self.chip.bytes_per_second * self.efficiency.bandwidth)
        computing = flop / (self.chip.flop_per_second * self.efficiency.compute)
        return max(loading, computing) if self.efficiency.overlaps else loading + computing
