"""How many tokens to draft: the K with the most expected tokens a second, by what was measured so far.

    expected tokens of a round     T(K) = 1 + a1 + a1 a2 + ... + a1 a2 ... aK      ai: acceptance at position i, given
    choice                         the K with the largest T(K) / seconds(K)            that all before it were accepted

Both are measured while decoding: acceptance from what the host reads anyway, seconds from the time between its reads.
Nothing here touches the device, and nothing here can change a text: only how fast it comes.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

MEMORY = 40  # rounds after which an observation counts for 1/e
SURPRISE = 3.0  # standard deviations from what was expected, lately, that make the past count for little
LATELY = 6  # rounds
FIRM = 2.0  # observations that the acceptance one position earlier counts for
LEAST_WEIGHT = 1.0  # observations of the first position that are never forgotten: the mean stays, less firmly
LOOSE = 1.0  # observations that are kept when the task changes
USUAL_ACCEPTANCE = 0.6
SAMPLES = 15  # of the cost of a round, the newest ones
USUAL_STEP = 0.15
CLIFF = 0.3
FIRST_K = 3
FIRST_LAUNCHES = 3  # rounds of K = 0 and of K = FIRST_K, at most, until both are timed at a new width
SOONEST_LOOK, LATEST_LOOK = 8, 48  # rounds between two looks at a neighbouring K
LOOKING = 0.01  # the share of the speed that looking may cost in the long run


class DraftLength(Protocol):
    """Chooses each round's K, and hears what came of it."""

    @property
    def longest(self) -> int:
        """The largest K that it will ever choose."""

    def choose(self, rows: int) -> int:
        """The K of the next round over so many rows."""

    def observe(self, rows: int, num_draft_tokens: int, accepted: Sequence[int], seconds: float | None) -> None:
        """accepted: of each live row; seconds: between the reads of this round and the last, None if not only its."""

    def new_task(self) -> None:
        """A request joined: what was accepted before says less."""

    def plain_seconds(self, tokens_by_rows: Mapping[int, int]) -> float | None:
        """What so many tokens of a row would take without drafts, by the rows beside it; None if nobody knows."""


@dataclass(frozen=True)
class FixedLength:
    """The same K in every round."""

    longest: int

    def choose(self, rows: int) -> int:
        return self.longest

    def observe(self, rows: int, num_draft_tokens: int, accepted: Sequence[int], seconds: float | None) -> None:
        pass

    def new_task(self) -> None:
        pass

    def plain_seconds(self, tokens_by_rows: Mapping[int, int]) -> float | None:
        return None


class Acceptance:
    """Running acceptance at each position, given that all drafts before it were accepted.

    A position is believed to do as well as the one before it until it is measured, and again when that is long ago.
    """

    def __init__(self, longest: int) -> None:
        self._tried = [LEAST_WEIGHT, *[0.0] * (longest - 1)][:longest]
        self._kept = [LEAST_WEIGHT * USUAL_ACCEPTANCE, *[0.0] * (longest - 1)][:longest]
        self._surplus = self._variance = 0.0  # of accepted drafts, lately, over what was expected

    def observe(self, num_draft_tokens: int, accepted: Sequence[int]) -> bool:
        """Learns from a round; whether it was too surprising for what was known before."""
        is_surprising = self._is_surprised(num_draft_tokens, accepted)
        if is_surprising:
            self.loosen()
        self._fade(1 - 1 / MEMORY)
        for i in range(num_draft_tokens):
            self._tried[i] += sum(count >= i for count in accepted)
            self._kept[i] += sum(count > i for count in accepted)
        return is_surprising

    def _is_surprised(self, num_draft_tokens: int, accepted: Sequence[int]) -> bool:
        tokens = self.expected_tokens()[: num_draft_tokens + 1]
        reached = [after - before for before, after in pairwise(tokens)]
        mean = sum(reached)
        variance = sum((2 * i + 1) * share for i, share in enumerate(reached)) - mean**2
        fade = 1 - 1 / LATELY
        self._surplus = fade * self._surplus + sum(accepted) - mean * len(accepted)
        self._variance = fade**2 * self._variance + variance * len(accepted)
        return abs(self._surplus) > SURPRISE * self._variance**0.5 + 0.5

    def loosen(self) -> None:
        """Keeps the means, but lets what comes now decide."""
        self._surplus = self._variance = 0.0
        self._fade(min(1.0, LOOSE / max(self._tried, default=LOOSE)))

    def expected_tokens(self) -> list[float]:
        """T(K) for K = 0, 1, ..., longest."""
        tokens, reached, before = [1.0], 1.0, USUAL_ACCEPTANCE
        for tried, kept in zip(self._tried, self._kept, strict=True):
            before = (kept + FIRM * before) / (tried + FIRM) if tokens[1:] else kept / tried
            reached *= before
            tokens.append(tokens[-1] + reached)
        return tokens

    def _fade(self, factor: float) -> None:
        for i, tried in enumerate(self._tried):
            least = LEAST_WEIGHT if i == 0 else 0.0
            kept = max(factor, least / tried) if tried else factor
            self._tried[i] *= kept
            self._kept[i] *= kept


class RoundCosts:
    """Seconds of a round by rows and K, as measured; they outlive requests and engines.

    Where nothing is known, one more draft is thought to cost USUAL_STEP plain rounds. widest_block: positions of a row,
    K + 1, beyond which a round is feared to cost CLIFF plain rounds more, until it is measured.
    """

    def __init__(self, widest_block: int | None = None) -> None:
        self._widest_block = widest_block
        self._samples: dict[int, dict[int, deque[float]]] = {}
        self._curves: dict[tuple[int, int], list[float]] = {}

    @property
    def is_known(self) -> bool:
        return bool(self._samples)

    def observe(self, rows: int, num_draft_tokens: int, seconds: float) -> None:
        self._samples.setdefault(rows, {}).setdefault(num_draft_tokens, deque(maxlen=SAMPLES)).append(seconds)
        self._curves.clear()

    def count(self, rows: int, num_draft_tokens: int) -> int:
        return len(self._samples.get(rows, {}).get(num_draft_tokens, ()))

    def seconds(self, rows: int, longest: int) -> list[float]:
        """Of K = 0, 1, ..., longest: measured, or drawn through what is, at the nearest width. Something `is_known`."""
        if (rows, longest) not in self._curves:
            width = min(self._samples, key=lambda known: (abs(known - rows), known))
            known = {k: _typical(samples) for k, samples in self._samples[width].items()}
            # No round is dearer than one with more drafts: what says otherwise was disturbed.
            known = {k: min(seconds for other, seconds in known.items() if other >= k) for k in known}
            self._curves[rows, longest] = [self._between(known, k) for k in range(longest + 1)]
        return self._curves[rows, longest]

    def _between(self, known: Mapping[int, float], k: int) -> float:
        """Along straight lines through what is known; beyond it, on along the last one."""
        least, most = min(known), max(known)
        if least <= k <= most:
            left, right = max(j for j in known if j <= k), min(j for j in known if j >= k)
            share = (k - left) / max(right - left, 1)
            return known[left] + share * (known[right] - known[left])
        if len(known) == 1:
            return known[least] * (1 + USUAL_STEP * k) / (1 + USUAL_STEP * least)
        end, other = (least, sorted(known)[1]) if k < least else (most, sorted(known)[-2])
        seconds = known[end] + (known[end] - known[other]) / (end - other) * (k - end)
        if self._widest_block is not None and end + 1 <= self._widest_block < k + 1:
            seconds += CLIFF * known[least]
        return max(seconds, 0.5 * known[end])


class AdaptiveLength:
    """Never slower than the best fixed K for long: it hill-climbs on measured costs, and looks again when it has left.

    A new width begins with a few rounds of K = 0 and of FIRST_K, so that both costs are known. After that the best K
    runs, and now and then, ever more seldom, one of its neighbours. Where drafting loses, that best is 0.
    """

    def __init__(self, longest: int, costs: RoundCosts) -> None:
        self.longest = longest
        self._costs = costs
        self._acceptance = Acceptance(longest)
        self._launched: Counter[tuple[int, int]] = Counter()  # first looks, by (rows, K)
        self._underway: Counter[tuple[int, int]] = Counter()  # of those, they that were not read yet
        self._best, self._rows = -1, 0
        self._wait = self._countdown = SOONEST_LOOK
        self._looks = 0

    def choose(self, rows: int) -> int:
        if (first := self._first_look(rows)) is not None:
            return first
        if not self._costs.is_known:
            return min(FIRST_K, self.longest)
        speeds = self._speeds(rows)
        best = max(range(len(speeds)), key=speeds.__getitem__)
        if (best, rows) != (self._best, self._rows):
            self._best, self._rows = best, rows
            self._wait = self._countdown = SOONEST_LOOK
        self._countdown -= 1
        if self._countdown > 0:
            return best
        neighbours = [k for k in (best + 1, best - 1) if 0 <= k <= self.longest]
        self._looks += 1
        chosen = neighbours[self._looks % len(neighbours)]
        loss = 1 - speeds[chosen] / speeds[best]
        self._wait = min(2 * self._wait, max(SOONEST_LOOK, int(loss / LOOKING)), LATEST_LOOK)
        self._countdown = self._wait
        return chosen

    def observe(self, rows: int, num_draft_tokens: int, accepted: Sequence[int], seconds: float | None) -> None:
        self._underway.pop((rows, num_draft_tokens), None)
        if self._acceptance.observe(num_draft_tokens, accepted):
            self._wait, self._countdown = SOONEST_LOOK, 1
        if seconds is not None:
            self._costs.observe(rows, num_draft_tokens, seconds)

    def new_task(self) -> None:
        self._acceptance.loosen()
        self._wait = self._countdown = SOONEST_LOOK

    def plain_seconds(self, tokens_by_rows: Mapping[int, int]) -> float | None:
        if not self._costs.is_known:
            return None
        return sum(tokens * self._costs.seconds(rows, 0)[0] for rows, tokens in tokens_by_rows.items())

    def _speeds(self, rows: int) -> list[float]:
        """Expected tokens a second of K = 0, 1, ..., longest, by what is known now."""
        tokens = self._acceptance.expected_tokens()
        return [count / seconds for count, seconds in zip(tokens, self._costs.seconds(rows, self.longest), strict=True)]

    def _first_look(self, rows: int) -> int | None:
        for k in (min(FIRST_K, self.longest), 0):
            look = rows, k
            is_due = not self._costs.count(rows, k) and not self._underway[look]
            if is_due and self._launched[look] < FIRST_LAUNCHES:
                self._launched[look] += 1
                self._underway[look] += 1
                return k
        return None


def _typical(samples: Sequence[float]) -> float:
    """Delays only ever add: of few samples the least, of more the median."""
    return min(samples) if len(samples) < 3 else statistics.median(samples)
