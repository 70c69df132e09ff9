"""How many tokens to draft: the K with the most expected tokens a second, by what was measured so far.

    expected tokens of a round     T(K) = 1 + a1 + a1 a2 + ... + a1 a2 ... aK      ai: acceptance at position i, given
    choice                         the K with the largest T(K) / seconds(K)            that all before it were accepted

Both are measured while decoding: acceptance from what the host reads anyway, seconds from the time between its reads.
Nothing here touches the device, and nothing here can change a text: only how fast it comes.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any, Protocol

MEMORY = 40  # rounds after which an observation counts for 1/e
SURPRISE = 3.0  # standard deviations from what was expected, lately, that make the past count for little
LATELY = 6  # rounds
FIRM = 3.0  # observations that the acceptance one position earlier counts for
LEAST_WEIGHT = 1.0  # observations of the first position that are never forgotten: the mean stays, less firmly
LOOSE = 1.0  # observations that are kept when the task changes
USUAL_ACCEPTANCE = 0.6
LIFETIME = 200  # drafts after which the acceptance that a new engine begins with has mostly been learnt anew
SAMPLES = 15  # of the cost of a round, the newest ones
PACE_MEMORY = 4  # rounds after which the machine's pace has mostly been learnt anew
MOST_OFF = 1.3  # times what was expected, or as much less: what a round is off by more is a disturbance, not the pace
USUAL_STEP = 0.15
CLIFF = 0.3
HOPE = 0.7  # how far an unmeasured K may undercut what is thought of it: 1 is down to the K below it that is measured
DOUBT = 0.05  # of a timing, where there is but one
WORTH_TRYING = 1.04  # times the best speed that is hoped for
MOST_TRIES = 3  # of one K, in hope
RISK = 3.0  # rounds of the best K that a round which is tried may be thought to take
FIRST_K = 3
WELL_TIMED = 3  # samples
LONG_LOOK = 2  # rounds in a row, of which the second is timed even where K is new
FIRST_WAIT, SOONEST_LOOK, LATEST_LOOK = 2, 16, 48  # rounds between two looks at another K; the first at a new width
LOOKING = 0.01  # the share of the speed that looking may cost in the long run


class DraftLength(Protocol):
    """Chooses each round's K, and hears what came of it."""

    @property
    def longest(self) -> int:
        """The largest K that it will ever choose."""

    def choose(self, rows: int) -> int:
        """The K of the next round over so many rows."""

    def observe(self, rows: int, num_draft_tokens: int, accepted: Sequence[int]) -> None:
        """accepted: of each live row."""

    def observe_seconds(self, rows: int, num_draft_tokens: int, seconds: float | None) -> None:
        """seconds: what such a round took, from one read to the next; None if that had other work in it."""

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

    def observe(self, rows: int, num_draft_tokens: int, accepted: Sequence[int]) -> None:
        pass

    def observe_seconds(self, rows: int, num_draft_tokens: int, seconds: float | None) -> None:
        pass

    def new_task(self) -> None:
        pass

    def plain_seconds(self, tokens_by_rows: Mapping[int, int]) -> float | None:
        return None


class Acceptance:
    """Running acceptance at each position, given that all drafts before it were accepted.

    A position is believed to do as well as the one before it until it is measured, and again when that is long ago;
    the first one as `usual` until then.
    """

    def __init__(self, longest: int, usual: float = USUAL_ACCEPTANCE) -> None:
        self._tried = [LEAST_WEIGHT, *[0.0] * (longest - 1)][:longest]
        self._kept = [LEAST_WEIGHT * usual, *[0.0] * (longest - 1)][:longest]
        self._surplus = self._variance = 0.0  # of accepted drafts, lately, over what was expected

    def observe(self, num_draft_tokens: int, accepted: Sequence[int]) -> bool:
        """Learns from a round; whether it was too surprising for what was known before."""
        tried = [sum(count >= i for count in accepted) for i in range(num_draft_tokens)]
        kept = [sum(count > i for count in accepted) for i in range(num_draft_tokens)]
        is_surprising = self._is_surprised(tried, kept)
        if is_surprising:
            self.loosen()
        self._fade(1 - 1 / MEMORY)
        for i in range(num_draft_tokens):
            self._tried[i] += tried[i]
            self._kept[i] += kept[i]
        return is_surprising

    def _is_surprised(self, tried: Sequence[int], kept: Sequence[int]) -> bool:
        """Counted by drafts that were reached: how many a row accepts in all varies far too much."""
        fade = 1 - 1 / LATELY
        self._surplus *= fade
        self._variance *= fade**2
        for rate, reached, right in zip(self._rates(), tried, kept, strict=False):
            self._surplus += right - rate * reached
            self._variance += rate * (1 - rate) * reached
        return abs(self._surplus) > SURPRISE * self._variance**0.5 + 0.5

    def loosen(self) -> None:
        """Keeps the means, but lets what comes now decide."""
        self._surplus = self._variance = 0.0
        self._fade(min(1.0, LOOSE / max(self._tried, default=LOOSE)))

    @property
    def is_firm(self) -> bool:
        """Whether enough drafts were seen lately to rely on."""
        return bool(self._tried) and self._tried[0] >= FIRM

    def expected_tokens(self) -> list[float]:
        """T(K) for K = 0, 1, ..., longest."""
        return [1.0, *(1.0 + reached for reached in accumulate(accumulate(self._rates(), mul)))]

    def _rates(self) -> list[float]:
        """Acceptance at each position, given that all before it were accepted."""
        rates: list[float] = []
        for tried, kept in zip(self._tried, self._kept, strict=True):
            rates.append((kept + FIRM * rates[-1]) / (tried + FIRM) if rates else kept / tried)
        return rates

    def _fade(self, factor: float) -> None:
        for i, tried in enumerate(self._tried):
            least = LEAST_WEIGHT if i == 0 else 0.0
            kept = max(factor, least / tried) if tried else factor
            self._tried[i] *= kept
            self._kept[i] *= kept


class RoundCosts:
    """Seconds of a round by rows and K, as measured; they outlive requests and engines, and so does `usual_acceptance`,
    the share of first drafts that were right, which a new engine begins with.

    A machine's pace changes, by heat, by other programs, and with the context for all K alike. Samples are therefore
    kept in units of the pace at their time: a K is not dear because it ran when the machine was slow.

    Where nothing is known, one more draft is thought to cost USUAL_STEP plain rounds. widest_block: positions of a row,
    K + 1, beyond which a round is feared to cost CLIFF plain rounds more, until it is measured.
    """

    def __init__(self, widest_block: int | None = None) -> None:
        self.usual_acceptance = USUAL_ACCEPTANCE
        self._widest_block = widest_block
        self._pace = 1.0
        self._begun: set[tuple[int, int]] = set()
        self._samples: dict[int, dict[int, deque[float]]] = {}
        self._curves: dict[tuple[int, int], list[float]] = {}

    @property
    def is_known(self) -> bool:
        return bool(self._samples)

    @property
    def knows_plain(self) -> bool:
        """Whether K = 0 was measured, at any width."""
        return any(0 in by_k for by_k in self._samples.values())

    def observe(self, rows: int, num_draft_tokens: int, seconds: float | None) -> None:
        """seconds: None if it could not be timed. The first round of its kind never counts: it makes new buffers."""
        is_first = (rows, num_draft_tokens) not in self._begun
        self._begun.add((rows, num_draft_tokens))
        if seconds is None or is_first:
            return
        samples = self._samples.setdefault(rows, {}).setdefault(num_draft_tokens, deque(maxlen=SAMPLES))
        if len(samples) >= WELL_TIMED:
            off = seconds / (self._pace * _typical(samples))
            self._pace *= min(max(off, 1 / MOST_OFF), MOST_OFF) ** (1 / PACE_MEMORY)
        samples.append(seconds / self._pace)
        self._curves.clear()

    def accept(self, accepted: Sequence[int]) -> None:
        """accepted: of each row of a round that drafted."""
        for count in accepted:
            self.usual_acceptance += ((count > 0) - self.usual_acceptance) / LIFETIME

    def count(self, rows: int, num_draft_tokens: int) -> int:
        return len(self._samples.get(rows, {}).get(num_draft_tokens, ()))

    def seconds(self, rows: int, longest: int) -> list[float]:
        """Of K = 0, 1, ..., longest: measured, or drawn through what is, at the nearest width. Something `is_known`."""
        if (rows, longest) not in self._curves:
            known = self._known(min(self._samples, key=lambda width: (abs(width - rows), width)))
            self._curves[rows, longest] = [self._pace * self._between(known, k) for k in range(longest + 1)]
        return self._curves[rows, longest]

    def hoped(self, rows: int, longest: int) -> list[float]:
        """As `seconds`, but as low as may be hoped of a K that was hardly measured at this width, or not at all.

        No K takes less than one with fewer drafts, nor a position less than one of a longer block.
        """
        known = self._known(rows) if rows in self._samples else {}
        hoped = self.seconds(rows, longest).copy()
        for k in range(longest + 1):
            if k in known:
                hoped[k] *= 1 - DOUBT / self.count(rows, k)
            elif known:
                fewer = [seconds for other, seconds in known.items() if other < k]
                least = max(fewer or [seconds * (k + 1) / (other + 1) for other, seconds in known.items()])
                hoped[k] += HOPE * min(0.0, self._pace * least - hoped[k])
        return hoped

    def to_json(self) -> dict[str, dict[str, float]]:
        """Rows -> K -> seconds, of what is well timed."""
        return {
            str(rows): {str(k): self._pace * _typical(samples) for k, samples in by_k.items()
                        if len(samples) >= WELL_TIMED}
            for rows, by_k in self._samples.items()
        }

    def restore(self, raw: Mapping[str, Any]) -> None:
        """Takes what `to_json` gave as one timing each. Whatever else `raw` holds is left aside: it was a cache."""
        for rows, by_k in raw.items():
            for k, seconds in by_k.items() if isinstance(by_k, Mapping) else ():
                if rows.isdecimal() and k.isdecimal() and isinstance(seconds, float) and 0 < seconds < math.inf:
                    self.observe(int(rows), int(k), None)
                    self.observe(int(rows), int(k), seconds)

    def _known(self, width: int) -> dict[int, float]:
        """K -> seconds. No round is dearer than one with more drafts: what says otherwise was disturbed."""
        known = {k: _typical(samples) for k, samples in self._samples[width].items()}
        return {k: min(seconds for other, seconds in known.items() if other >= k) for k in known}

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
    """Never slower than the best fixed K for long: it climbs on measured costs, and looks again at what it has left.

    The best K runs, as far as is known, and now and then, the more seldom the more it costs, another one: the K that
    might be better by most, so little is known of it, or else a neighbour. So it jumps where a step would not pay, and
    one bad timing rules no K out. Plain decoding is such a K too: where drafting loses, 0 is best.
    """

    def __init__(self, longest: int, costs: RoundCosts) -> None:
        self.longest = longest
        self._costs = costs
        self._acceptance = Acceptance(longest, costs.usual_acceptance)
        self._planned: deque[int] = deque()
        self._widths: set[int] = set()
        self._tries: Counter[tuple[int, int]] = Counter()  # by rows and K
        self._best, self._rows = -1, 0
        self._wait = self._countdown = SOONEST_LOOK
        self._looks = 0

    def choose(self, rows: int) -> int:
        if rows != self._rows:
            self._planned.clear()
            self._rows, self._best = rows, -1
            self._wait = self._countdown = SOONEST_LOOK if rows in self._widths else FIRST_WAIT
            self._widths.add(rows)
        if not self._planned:
            self._plan(rows)
        return self._planned.popleft()

    def observe(self, rows: int, num_draft_tokens: int, accepted: Sequence[int]) -> None:
        if self._acceptance.observe(num_draft_tokens, accepted):
            self._wait, self._countdown = SOONEST_LOOK, 1
        if num_draft_tokens:
            self._costs.accept(accepted)

    def observe_seconds(self, rows: int, num_draft_tokens: int, seconds: float | None) -> None:
        self._costs.observe(rows, num_draft_tokens, seconds)

    def new_task(self) -> None:
        self._acceptance.loosen()
        self._wait = self._countdown = SOONEST_LOOK

    def plain_seconds(self, tokens_by_rows: Mapping[int, int]) -> float | None:
        if not self._costs.knows_plain:
            return None
        return sum(tokens * self._costs.seconds(rows, 0)[0] for rows, tokens in tokens_by_rows.items())

    def _speeds(self, rows: int) -> list[float]:
        """Expected tokens a second of K = 0, 1, ..., longest, by what is known now."""
        tokens = self._acceptance.expected_tokens()
        return [count / seconds for count, seconds in zip(tokens, self._costs.seconds(rows, self.longest), strict=True)]

    def _plan(self, rows: int) -> None:
        """Decides on the next round, or the next few."""
        speeds = self._speeds(rows) if self._costs.is_known else []
        best = max(range(len(speeds)), key=speeds.__getitem__) if speeds else min(FIRST_K, self.longest)
        if best != self._best:
            self._best = best
            self._wait = min(self._wait, SOONEST_LOOK)
            self._countdown = min(self._countdown, self._wait)
        if best == 0 or self._acceptance.is_firm:
            self._countdown -= 1
        if self._countdown > 0 or not speeds:
            self._planned.append(best)
            return
        look = self._look(rows, best, speeds)
        loss = 1 - speeds[look] / speeds[best]
        is_dear = LONG_LOOK * loss > LOOKING * LATEST_LOOK
        rounds = 1 if is_dear and self._costs.count(rows, look) >= WELL_TIMED else LONG_LOOK
        self._planned.extend([look] * rounds)
        later = max(2 * self._wait, SOONEST_LOOK if best == 0 else 0)
        self._wait = min(later, max(SOONEST_LOOK, int(rounds * loss / LOOKING)), LATEST_LOOK)
        self._countdown = self._wait

    def _look(self, rows: int, best: int, speeds: Sequence[float]) -> int:
        """The K to look at: the one that might beat the best by most, if it was hardly tried; else a neighbour."""
        tokens, seconds = self._acceptance.expected_tokens(), self._costs.hoped(rows, self.longest)
        thought = self._costs.seconds(rows, self.longest)
        hopes = {k: tokens[k] / seconds[k] for k in range(self.longest + 1)
                 if k != best and self._tries[rows, k] < MOST_TRIES and thought[k] <= RISK * thought[best]}
        look = max(hopes, key=hopes.__getitem__, default=best)
        if self._acceptance.is_firm and hopes.get(look, 0.0) >= WORTH_TRYING * speeds[best]:
            self._tries[rows, look] += 1
            return look
        neighbours = [k for k in (best - 1, best + 1) if 0 <= k <= self.longest]
        if 0 not in (best, *neighbours) and not self._costs.count(rows, 0):
            neighbours.append(0)
        self._looks += 1
        return neighbours[self._looks % len(neighbours)]


def _typical(samples: Sequence[float]) -> float:
    """Delays only ever add: of few samples the least, of more the median."""
    return min(samples) if len(samples) < 3 else statistics.median(samples)
