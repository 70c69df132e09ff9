"""A machine whose rounds have a known cost and acceptance, for a draft-length controller to meet: the best K is known.

Used with costs made up (the tests), and with those and the disturbance of a real machine (`bench.recorded`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlx_mtp.spec_decode.draft_length import DraftLength

Cost = Callable[[int, int], float]  # of a round, by rows and K
FIRST_OF_ITS_KIND = 4  # times what it costs: it makes new buffers


@dataclass
class Machine:
    """What a round brought is heard one round late, as in the engine."""

    policy: DraftLength
    cost: Cost
    rows: int
    generator: random.Random
    noise: float = 0.05
    wandering: float = 0.0  # of the pace, log seconds: what is left of it after a round is 0.9
    late: float = 0.0  # share of a round that is in the time of the next
    pace: float = 0.0
    chosen: list[int] = field(default_factory=list)
    unread: tuple[int, list[int], float | None] | None = None

    def round(self, acceptance: float) -> int:
        """Returns the K that was used."""
        k = self.policy.choose(self.rows)
        accepted = [self._accepted(k, acceptance) for _ in range(self.rows)]
        both = self.late * self.cost(self.rows, self.chosen[-1] if self.chosen else k)
        both += (1 - self.late) * self.cost(self.rows, k)
        seconds = both * self.disturbance()
        if self.unread is not None:
            drafted, accepted_before, took = self.unread
            self.policy.observe(self.rows, drafted, accepted_before)
            self.policy.observe_seconds(self.rows, drafted, took)
        seconds *= 1 if k in self.chosen else FIRST_OF_ITS_KIND
        self.unread = k, accepted, seconds if self.chosen else None  # the very first follows a prefill
        self.chosen.append(k)
        return k

    def disturbance(self) -> float:
        """What this round takes, in what it would take if the machine were always the same."""
        self.pace = 0.9 * self.pace + (1 - 0.9**2) ** 0.5 * self.wandering * self.generator.gauss(0, 1)
        return math.exp(self.pace) * (1 + self.noise * abs(self.generator.gauss(0, 1)))

    def _accepted(self, k: int, acceptance: float) -> int:
        return next((i for i in range(k) if self.generator.random() >= acceptance), k)


@dataclass
class RecordedMachine(Machine):
    """One that is disturbed as a real one was, from somewhere in its record on. record: log factors, round by round."""

    record: Sequence[float] = ()

    def __post_init__(self) -> None:
        self._at = self.generator.randrange(len(self.record))

    def disturbance(self) -> float:
        self._at = (self._at + 1) % len(self.record)
        return math.exp(self.record[self._at])


def tokens(acceptance: float, k: int) -> float:
    """Expected tokens of a round."""
    return sum(acceptance**i for i in range(k + 1))


def best_speed(cost: Cost, rows: int, acceptance: float, longest: int) -> float:
    """Tokens a second of the best fixed K."""
    return max(tokens(acceptance, k) / cost(rows, k) for k in range(longest + 1))


def speed(chosen: Sequence[int], cost: Cost, rows: int, acceptance: float) -> float:
    """Tokens a second of rounds with these Ks."""
    return sum(tokens(acceptance, k) for k in chosen) / sum(cost(rows, k) for k in chosen)
