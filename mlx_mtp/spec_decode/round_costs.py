"""What a round takes for each K, from few and noisy timings: a Kalman filter over log seconds, one for each width.

    log seconds(K) = pace + c(K) + noise        pace  the machine's: it wanders from round to round, by heat, by other
                                                      programs, and with the context for all K alike
                                                c(K)  what K drafts cost more than none; c(0) = 0

What is timed is not quite that. The host may read a round late, when much of the next one is done (MLX's CPU backend
lets it no sooner), so the end of a round is in the time of the next: (1 - late) c(K) + late c(K of the round before).

All three are estimated together, so a K is not thought dear because it ran while the machine was slow or after a longer
round, and what one timing cannot tell apart stays in doubt until another K is timed. The doubt is worth as much as the
estimate: `drawn` gives costs as they may well be, and who goes by them tries a K as often as it may be the best
(Thompson sampling).

What is believed before any timing is a line, one more draft for USUAL_STEP plain rounds, of uncertain slope and with a
bump at every K. So neighbours speak for each other, and the more so the nearer they are. And a draft is never free: a
timing that says so says that the pace has jumped.

The matrices are 10 x 10 and met once a round or less: for that, lists take a third of the time that arrays take.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from random import Random
from typing import Any

USUAL_STEP, SLOPE_DOUBT = 0.2, 0.3  # plain rounds a draft
BUMP_DOUBT, FIRST_BUMP_DOUBT = 0.1, 0.16  # of log seconds, at each K; at the first, where the drafter comes in
LEAST_STEP, LEAST_ROOM = 0.05, 0.01  # of log seconds: what the first draft costs at least, and how near to it one gets
CLIFF, CLIFF_DOUBT = 0.25, 0.2  # of log seconds, at the first K of a verify block that is feared to be too wide
PACE_DOUBT = 10.0  # before the first timing
NOISE = 0.05  # of log seconds
LATE, LATE_DOUBT = 0.1, 0.1  # share of a round
WALK = 0.12  # of the pace, from round to round
MOST_OFF = 1.0  # standard deviations; a timing that is off by more shows that the pace has jumped
OTHER_WIDTH_DOUBT = 0.1  # of log seconds, where nothing is known but the costs of another width
LIFETIME = 5000  # rounds after which costs, untimed, are as much in doubt as before any timing
SHORT_RUN, LEARN_EVERY = 2, 16  # timings of one K in a row; of those beyond the first, a few say as much as all
GROW_EVERY = 16  # timed rounds after which that doubt is brought up to date
DARING = 0.6  # of the doubt counts where costs are drawn: less than 1, since the next round draws again
WELL_TIMED = 3  # timings
SHORTEST_ROUND, LONGEST_ROUND = 1e-7, 1e5  # seconds; what was kept of a round and is beyond is nonsense
USUAL_ACCEPTANCE = 0.6
ACCEPTANCE_LIFETIME = 60  # drafts after which the acceptance that a new engine begins with has mostly been learnt anew

_PACE, _LATE, _FIRST = 0, 1, 2  # in a filter's state, where c(0) is the first of the costs


class RoundCosts:
    """Seconds of a round by rows and K, as measured; they outlive requests and engines, and so does `usual_acceptance`,
    the share of first drafts that were right, which a new engine begins with.

    widest_block: positions of a row, K + 1, beyond which a round is feared to cost more, until it is measured.
    """

    def __init__(self, widest_block: int | None = None) -> None:
        self.usual_acceptance = USUAL_ACCEPTANCE
        self._widest_block = widest_block
        self._restored: dict[int, dict[int, float]] = {}
        self._widths: dict[int, _Width] = {}
        self._begun: set[tuple[int, int]] = set()
        self._last, self._run = (0, 0), 0  # rows and K, and how many timings of them there were in a row
        self._seconds, self._unlearnt = 0.0, 0  # the last of those, and how many there were since one was learnt from

    @property
    def is_known(self) -> bool:
        return bool(self._widths or self._restored)

    @property
    def knows_plain(self) -> bool:
        """Whether K = 0 was measured, at any width."""
        restored, timed = self._restored.values(), (width.times for width in self._widths.values())
        return any(0 in by_k for by_k in restored) or any(0 in times for times in timed)

    def observe(self, rows: int, num_draft_tokens: int, seconds: float | None, longest: int) -> None:
        """Of each round, in order. seconds: None if it could not be timed. The first of its kind never counts: it makes
        new buffers.

        longest: the largest K that anyone will ask for at these rows.
        """
        kind = rows, num_draft_tokens
        before = self._last[1] if self._last[0] == rows else num_draft_tokens
        if kind != self._last:
            self._learn(self._last[1])  # the end of a run is what the next one is compared with
            self._last, self._run = kind, 0
        if seconds is not None and kind in self._begun:
            self._seconds, self._run, self._unlearnt = seconds, self._run + 1, self._unlearnt + 1
            self._width(rows, longest)
            if self._run <= SHORT_RUN or self._unlearnt == LEARN_EVERY:
                self._learn(before)
        self._begun.add(kind)

    def _learn(self, before: int) -> None:
        """From the last timing, if that is new. before: the K of the round before it."""
        if self._unlearnt:
            rows, k = self._last
            self._widths[rows].observe(k, before, self._seconds, self._unlearnt)
            self._unlearnt = 0

    def accept(self, accepted: Sequence[int]) -> None:
        """accepted: of each row of a round that drafted."""
        for count in accepted:
            self.usual_acceptance += ((count > 0) - self.usual_acceptance) / ACCEPTANCE_LIFETIME

    def has_begun(self, rows: int, num_draft_tokens: int) -> bool:
        """Whether such a round has run in this process, so that the next one can be timed."""
        return (rows, num_draft_tokens) in self._begun

    def timings(self, rows: int) -> int:
        """How many rounds of this width were timed, as far as was learned from them."""
        return self._widths[rows].times.total() if rows in self._widths else 0

    def seconds(self, rows: int, longest: int) -> list[float]:
        """Of K = 0, 1, ..., longest, as far as is known. Something `is_known`."""
        self._learn(self._last[1])
        return self._width(rows, longest).seconds[: longest + 1]

    def drawn(self, rows: int, longest: int, wanted: int, random: Random) -> list[float]:
        """As `seconds`, up to K = wanted, but as they may well be. No K takes less than one with fewer drafts."""
        return self._width(rows, longest).drawn(wanted, random)

    def to_json(self) -> dict[str, dict[str, float]]:
        """Rows -> K -> seconds, of what is well timed."""
        self._learn(self._last[1])
        return {str(rows): {str(k): seconds for k, seconds in width.known.items() if width.times[k] >= WELL_TIMED}
                for rows, width in self._widths.items()}

    def restore(self, raw: Mapping[str, Any]) -> None:
        """Takes what `to_json` gave as one timing each, as far as it is readable."""
        for rows, by_k in readable(raw).items():
            self._restored.setdefault(int(rows), {}).update({int(k): seconds for k, seconds in by_k.items()})

    def _width(self, rows: int, longest: int) -> _Width:
        """The filter for these rows; a new one begins with what is known of them, or of the nearest width."""
        width = self._widths.get(rows)
        if width is None or width.longest < longest:
            known = {other: width.known for other, width in self._widths.items()}
            known = {other: self._restored.get(other, {}) | known.get(other, {}) for other in {*self._restored, *known}}
            nearest = min(known, key=lambda other: (abs(other - rows), other), default=rows)
            width = self._widths[rows] = _Width(longest, self._widest_block)
            width.begin(known.get(nearest, {}), NOISE if nearest == rows else OTHER_WIDTH_DOUBT)
        return width


def readable(raw: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What `RoundCosts.to_json` gave. Whatever else `raw` holds is left aside: it was a cache."""
    found = {
        rows: {k: seconds for k, seconds in by_k.items()
               if k.isdecimal() and isinstance(seconds, float) and SHORTEST_ROUND < seconds < LONGEST_ROUND}
        for rows, by_k in raw.items() if rows.isdecimal() and isinstance(by_k, Mapping)
    }
    return {rows: by_k for rows, by_k in found.items() if by_k}


class _Width:
    """The filter for one number of rows. Its state: pace, late, c(0), c(1), ..., c(longest); of covariances the lower
    triangle is kept."""

    def __init__(self, longest: int, widest_block: int | None) -> None:
        self.longest = longest
        self.times: Counter[int] = Counter()  # timed rounds by K
        drafts = range(longest + 1)
        line = [1 + USUAL_STEP * k for k in drafts]
        extra = list(map(math.log, line))
        bumps = [0.0, FIRST_BUMP_DOUBT, *[BUMP_DOUBT] * (longest - 1)]
        if widest_block is not None and widest_block <= longest:
            extra[widest_block:] = [each + CLIFF for each in extra[widest_block:]]
            bumps[widest_block] = CLIFF_DOUBT
        slopes = [SLOPE_DOUBT * k / total for k, total in zip(drafts, line, strict=True)]
        bumped = list(accumulate(bump**2 for bump in bumps))  # those up to min(i, j) are in c(i) and in c(j)
        prior = [[slopes[i] * slopes[j] + bumped[min(i, j)] for j in drafts] for i in drafts]
        self.mean = [0.0, LATE, *extra]
        self.covariance = _joined(PACE_DOUBT**2, LATE_DOUBT**2, prior)
        self._growing, self._stale = _joined(0.0, 0.0, prior), 0  # and timed rounds since it last grew
        self._factor: list[list[float]] = []  # of the covariance of c(1), c(2), ..., as far as it was needed

    @property
    def seconds(self) -> list[float]:
        """Of a round, for K = 0, 1, ..., longest."""
        return [math.exp(self.mean[_PACE] + extra) for extra in self.mean[_FIRST:]]

    @property
    def known(self) -> dict[int, float]:
        """K -> seconds, of those that were timed."""
        return {k: seconds for k, seconds in enumerate(self.seconds) if k in self.times}

    def drawn(self, wanted: int, random: Random) -> list[float]:
        """Seconds for K = 0, 1, ..., wanted as they may be, by mean + factor @ normals; none below one before."""
        factor, first = self._factor, _FIRST + 1  # c(0) is certain
        for row in self.covariance[first + len(factor) : first + wanted]:
            factor.append(_next_of_cholesky(factor, row[first:]))
        pace, normals = self.mean[_PACE], [random.gauss(0.0, DARING) for _ in range(wanted)]
        logs = [pace + mean + sum(map(mul, row, normals))
                for mean, row in zip(self.mean[first : first + wanted], factor, strict=False)]
        return list(map(math.exp, accumulate([pace, *logs], max)))

    def begin(self, known: Mapping[int, float], doubt: float) -> None:
        """Takes costs from elsewhere as one timing each; their pace was another one."""
        for k, seconds in known.items():
            if k <= self.longest:
                self._learn(k, k, math.log(seconds), doubt)
        for row in self.covariance:
            row[_PACE] = 0.0
        self.covariance[_PACE][_PACE] = PACE_DOUBT**2

    def observe(self, k: int, before: int, seconds: float, rounds: int) -> None:
        """before: the K of the round before. rounds: since the last that was observed."""
        self.covariance[_PACE][_PACE] += rounds * WALK**2
        self._learn(k, min(before, self.longest), math.log(seconds), NOISE, may_jump=True)
        self.times[k] += rounds
        self._stale += rounds
        if self._stale >= GROW_EVERY:
            growth, self._stale = self._stale / LIFETIME, 0
            self.covariance = [[each + growth * first for each, first in zip(row, firsts, strict=True)]
                               for row, firsts in zip(self.covariance, self._growing, strict=True)]

    def _learn(self, k: int, before: int, log_seconds: float, noise: float, *, may_jump: bool = False) -> None:
        """A Kalman update, extended: late is a factor. If the pace may jump, then the farther off a timing is, the less
        of it is learnt of costs: other programs come and go, and costs stay."""
        mean, late, this, last = self.mean, self.mean[_LATE], _FIRST + k, _FIRST + before
        own, more = 1 - late, mean[last] - mean[this]  # what was timed, as far as it is linear in late
        columns = [self._column(i) for i in (_PACE, this, last, _LATE)]
        shared = [each + own * now + late * then + more * so for each, now, then, so in zip(*columns, strict=True)]
        variance = noise**2 + shared[_PACE] + own * shared[this] + late * shared[last] + more * shared[_LATE]
        off = log_seconds - mean[_PACE] - own * mean[this] - late * mean[last]
        jump = 0.0  # the variance of the pace that explains it
        if may_jump:
            room = max(mean[_FIRST + 1] - LEAST_STEP, LEAST_ROOM)  # that c(1) has below it
            jump = max((off / MOST_OFF) ** 2, -shared[_FIRST + 1] * off / room, variance) - variance
        self.covariance[_PACE][_PACE] += jump
        shared[_PACE] += jump
        gains = [each / (variance + jump) for each in shared]
        self.mean = [each + gain * off for each, gain in zip(mean, gains, strict=True)]
        self.covariance = [[each - gain * other for each, other in zip(row, shared, strict=False)]
                           for row, gain in zip(self.covariance, gains, strict=True)]
        self._factor = []  # nobody asks before the next draw

    def _column(self, i: int) -> list[float]:
        """Of the covariance, the upper triangle's part with it."""
        return [*self.covariance[i], *(row[i] for row in self.covariance[i + 1 :])]


def _joined(pace: float, late: float, extra: Sequence[Sequence[float]]) -> list[list[float]]:
    """The covariance of a state whose pace and late are independent of the rest, from that of the rest."""
    return [[pace], [0.0, late], *([0.0, 0.0, *row[: i + 1]] for i, row in enumerate(extra))]


def _next_of_cholesky(factor: Sequence[Sequence[float]], row: Sequence[float]) -> list[float]:
    """One more row of the lower triangle whose product with its transpose is a positive matrix, from a row of that."""
    new: list[float] = []
    for each, above in zip(row, factor, strict=False):
        new.append((each - sum(map(mul, new, above))) / above[-1])
    return [*new, math.sqrt(row[len(new)] - sum(map(mul, new, new)))]
