"""What a round takes for each K, from few and noisy timings: a Kalman filter over log seconds, one for each width.

    log seconds(K) = pace + c(K) + noise        pace  the machine's: it wanders from round to round, by heat, by other
                                                      programs, and with the context for all K alike
                                                c(K)  what K drafts cost more than none; c(0) = 0

Both are estimated together, so a K is not thought dear because it ran while the machine was slow, and what one timing
cannot tell apart stays in doubt until another K is timed. The doubt is worth as much as the estimate: `drawn` gives
costs as they may well be, and who goes by them tries a K as often as it may be the best (Thompson sampling).

What is believed before any timing is a line, one more draft for USUAL_STEP plain rounds, of uncertain slope and with a
bump at every K. So neighbours speak for each other, and the more so the nearer they are.

The matrices are 8 x 8, and one of each is met in a round: lists take a third of the time that arrays take for that.
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
CLIFF, CLIFF_DOUBT = 0.25, 0.2  # of log seconds, at the first K of a verify block that is feared to be too wide
PACE_DOUBT = 10.0  # before the first timing
NOISE = 0.04  # of log seconds
WALK = 0.04  # of the pace, from round to round
MOST_OFF = 2.5  # standard deviations; what a timing is off by more is a disturbance, unless it lasts
OTHER_WIDTH_DOUBT = 0.1  # of log seconds, where nothing is known but the costs of another width
LIFETIME = 5000  # rounds after which costs, untimed, are as much in doubt as before any timing
DARING = 0.7  # of the doubt counts where costs are drawn: less than 1, since the next round draws again
WELL_TIMED = 3  # timings
USUAL_ACCEPTANCE = 0.6
ACCEPTANCE_LIFETIME = 60  # drafts after which the acceptance that a new engine begins with has mostly been learnt anew


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

    @property
    def is_known(self) -> bool:
        return bool(self._widths or self._restored)

    @property
    def knows_plain(self) -> bool:
        """Whether K = 0 was measured, at any width."""
        restored, timed = self._restored.values(), (width.times for width in self._widths.values())
        return any(0 in by_k for by_k in restored) or any(0 in times for times in timed)

    def observe(self, rows: int, num_draft_tokens: int, seconds: float | None, longest: int) -> None:
        """seconds: None if it could not be timed. The first round of its kind never counts: it makes new buffers.

        longest: the largest K that anyone will ask for at these rows.
        """
        is_first = (rows, num_draft_tokens) not in self._begun
        self._begun.add((rows, num_draft_tokens))
        if seconds is not None and not is_first:
            self._width(rows, longest).observe(num_draft_tokens, seconds)

    def accept(self, accepted: Sequence[int]) -> None:
        """accepted: of each row of a round that drafted."""
        for count in accepted:
            self.usual_acceptance += ((count > 0) - self.usual_acceptance) / ACCEPTANCE_LIFETIME

    def has_begun(self, rows: int, num_draft_tokens: int) -> bool:
        """Whether such a round has run in this process, so that the next one can be timed."""
        return (rows, num_draft_tokens) in self._begun

    def timings(self, rows: int) -> int:
        """How many rounds of this width were timed."""
        return self._widths[rows].times.total() if rows in self._widths else 0

    def seconds(self, rows: int, longest: int) -> list[float]:
        """Of K = 0, 1, ..., longest, as far as is known. Something `is_known`."""
        width = self._width(rows, longest)
        return [math.exp(width.pace + extra) for extra in width.extra[: longest + 1]]

    def drawn(self, rows: int, longest: int, wanted: int, random: Random) -> list[float]:
        """As `seconds`, up to K = wanted, but as they may well be. No K takes less than one with fewer drafts."""
        width = self._width(rows, longest)
        return [math.exp(width.pace + most) for most in accumulate([0.0, *width.drawn(wanted, random)], max)]

    def to_json(self) -> dict[str, dict[str, float]]:
        """Rows -> K -> seconds, of what is well timed."""
        return {str(rows): {str(k): math.exp(width.pace + width.extra[k]) for k, count in width.times.items()
                            if count >= WELL_TIMED}
                for rows, width in self._widths.items()}

    def restore(self, raw: Mapping[str, Any]) -> None:
        """Takes what `to_json` gave as one timing each. Whatever else `raw` holds is left aside: it was a cache."""
        for rows, by_k in raw.items():
            for k, seconds in by_k.items() if isinstance(by_k, Mapping) else ():
                if rows.isdecimal() and k.isdecimal() and isinstance(seconds, float) and 0 < seconds < math.inf:
                    self._restored.setdefault(int(rows), {})[int(k)] = seconds

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


class _Width:
    """The filter for one number of rows. Its state: pace, c(1), c(2), ..., c(longest)."""

    def __init__(self, longest: int, widest_block: int | None) -> None:
        self.longest = longest
        self.times: Counter[int] = Counter()  # by K
        drafts = range(1, longest + 1)
        line = [1 + USUAL_STEP * k for k in drafts]
        self.mean = [0.0, *map(math.log, line)]
        bumps = [BUMP_DOUBT if k > 1 else FIRST_BUMP_DOUBT for k in drafts]
        if widest_block is not None and widest_block <= longest:
            self.mean[widest_block:] = [mean + CLIFF for mean in self.mean[widest_block:]]
            bumps[widest_block - 1] = CLIFF_DOUBT
        slopes = [SLOPE_DOUBT * k / total for k, total in zip(drafts, line, strict=True)]
        bumped = list(accumulate(bump**2 for bump in bumps))  # those up to min(i, j) are in c(i) and in c(j)
        prior = [[slopes[i] * slopes[j] + bumped[min(i, j)] for j in range(longest)] for i in range(longest)]
        self.covariance = [[PACE_DOUBT**2, *[0.0] * longest], *([0.0, *row] for row in prior)]
        self._drift = [[WALK**2, *[0.0] * longest], *([0.0, *(each / LIFETIME for each in row)] for row in prior)]

    @property
    def pace(self) -> float:
        return self.mean[0]

    @property
    def extra(self) -> list[float]:
        """c(K) for K = 0, 1, ..., longest."""
        return [0.0, *self.mean[1:]]

    @property
    def known(self) -> dict[int, float]:
        """K -> seconds, of those that were timed."""
        return {k: math.exp(self.pace + self.extra[k]) for k in self.times}

    def drawn(self, wanted: int, random: Random) -> list[float]:
        """c(1), ..., c(wanted) as they may be, with a part of the doubt: mean + DARING * factor @ normals."""
        factor = _cholesky([row[1:] for row in self.covariance[1 : wanted + 1]])
        normals = [random.gauss(0.0, DARING) for _ in factor]
        return [mean + sum(map(mul, row, normals)) for mean, row in zip(self.mean[1:], factor, strict=False)]

    def begin(self, known: Mapping[int, float], doubt: float) -> None:
        """Takes costs from elsewhere as one timing each; their pace was another one."""
        for k, seconds in known.items():
            if k <= self.longest:
                self._learn(k, math.log(seconds), doubt)
        for row in self.covariance:
            row[0] = 0.0
        self.covariance[0] = [PACE_DOUBT**2, *[0.0] * self.longest]

    def observe(self, k: int, seconds: float) -> None:
        self._learn(k, math.log(seconds), NOISE)
        self.times[k] += 1

    def _learn(self, k: int, log_seconds: float, noise: float) -> None:
        """A Kalman update. What is off by far counts in part, and makes the pace doubtful: so it counts if it lasts."""
        shared = [row[0] + row[k] for row in self.covariance] if k else [row[0] for row in self.covariance]
        variance = noise**2 + shared[0] + (shared[k] if k else 0.0)
        off = log_seconds - self.mean[0] - (self.mean[k] if k else 0.0)
        most = MOST_OFF * math.sqrt(variance)
        believed = min(max(off, -most), most)
        gains = [each / variance for each in shared]
        self.mean = [mean + gain * believed for mean, gain in zip(self.mean, gains, strict=True)]
        self.covariance = [[each - gain * other + drift for each, other, drift in zip(row, shared, drifts, strict=True)]
                           for row, gain, drifts in zip(self.covariance, gains, self._drift, strict=True)]
        self.covariance[0][0] += (off - believed) ** 2


def _cholesky(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """The lower triangle whose product with its transpose is this positive matrix, row by row."""
    factor: list[list[float]] = []
    for row in matrix:
        new: list[float] = []
        for each, above in zip(row, factor, strict=False):
            new.append((each - sum(map(mul, new, above))) / above[-1])
        new.append(math.sqrt(row[len(new)] - sum(map(mul, new, new))))
        factor.append(new)
    return factor
