"""How many tokens to draft: the K with the most expected tokens a second, by what was measured so far.

    expected tokens of a round     T(K) = 1 + a1 + a1 a2 + ... + a1 a2 ... aK      ai: acceptance at position i, given
    choice                         the K with the largest T(K) / seconds(K)            that all before it were accepted

Both are measured while decoding: acceptance from what the host reads anyway, seconds from the time between its reads.
Nothing here touches the device, and nothing here can change a text: only how fast it comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul, truediv
from random import Random
from typing import Protocol

from mlx_mtp.config import AUTO, EngineConfig
from mlx_mtp.spec_decode.round_costs import USUAL_ACCEPTANCE, RoundCosts

MEMORY = 120  # rounds after which an observation counts for 1/e
SURPRISE = 3.5  # standard deviations from what was expected, lately, that make the past count for little
LATELY = 6  # rounds
FIRM = 8.0  # observations that the acceptance one position earlier counts for
LEAST_WEIGHT = 1.0  # observations of the first position that are never forgotten: the mean stays, less firmly
LOOSE = 1.0  # observations that are kept when the task changes
LEAST_GAIN = 0.01  # tokens a round that the last draft must be expected to bring
FIRST_K = 1  # before any round was timed
PLAIN_LOOK = 48  # timed rounds after which plain decoding is timed too, so that a request can be told what it saved
PLAIN_RUN = 4  # choices of no draft, one after the other, of which the last stands until a draft is due
WORTH_CHANGING = 0.02  # share of tokens a second that another K must promise beyond the one in use: changing takes time
DRAFTED_RUN, STANDING = 8, 3  # choices of one K, one after the other, of which the last stands for more rounds
# Where rounds are short a K that was chosen twice stands: none until the look, others until choosing takes so little.
CHOOSING, CHOOSING_SHARE = 1.2e-4, 0.008  # seconds, on a slow and busy core; of the time
# Where plain decoding is best: rounds from one look, with a draft, to the next. They double from the first on, until
# looks take so much of the time, but at least and at most to so many.
SOONEST_LOOK, LOOKS_SHARE, LATEST_LOOK = 4, 0.016, (26, 48)


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


def draft_length(config: EngineConfig, has_drafter: bool, costs: RoundCosts) -> DraftLength:
    """What `config` asks for. costs: what "auto" knows of rounds, and adds to."""
    if not has_drafter:
        return FixedLength(0)
    if config.num_draft_tokens != AUTO:
        return FixedLength(config.num_draft_tokens)
    return AdaptiveLength(config.max_draft_tokens, costs) if config.max_draft_tokens else FixedLength(0)


class Acceptance:
    """Running acceptance at each position, given that all drafts before it were accepted.

    A position is believed to do as well as the one before it until it is measured, and again when that is long ago;
    the first one as `usual` until then.
    """

    def __init__(self, longest: int, usual: float = USUAL_ACCEPTANCE) -> None:
        self._tried = [LEAST_WEIGHT, *[0.0] * (longest - 1)][:longest]
        self._kept = [LEAST_WEIGHT * usual, *[0.0] * (longest - 1)][:longest]
        self._surplus = self._variance = 0.0  # of accepted drafts, lately, over what was expected
        self._plain = 0  # rounds since the last with drafts
        self._rates: list[float] = []  # by position, once they were asked for and until something is learnt

    def observe(self, num_draft_tokens: int, accepted: Sequence[int]) -> None:
        """Learns from a round; what is too surprising for what was known before lets that count for little."""
        if num_draft_tokens == 0:
            self._plain += 1  # time passes, which counts when there is something to learn
            return
        reached = [len(accepted), *(sum(count >= i for count in accepted) for i in range(1, num_draft_tokens + 1))]
        if self._is_surprised(reached):
            self.loosen()
        self._fade((1 - 1 / MEMORY) ** (1 + self._plain))
        self._plain = 0
        for i, (tried, kept) in enumerate(pairwise(reached)):
            self._tried[i] += tried
            self._kept[i] += kept

    def _is_surprised(self, reached: Sequence[int]) -> bool:
        """Counted by drafts that were reached: how many a row accepts in all varies far too much."""
        fade = (1 - 1 / LATELY) ** (1 + self._plain)
        self._surplus *= fade
        self._variance *= fade**2
        for rate, (tried, kept) in zip(self.rates(), pairwise(reached), strict=False):
            self._surplus += kept - rate * tried
            self._variance += rate * (1 - rate) * tried
        return abs(self._surplus) > SURPRISE * self._variance**0.5

    def loosen(self) -> None:
        """Keeps the means, but lets what comes now decide."""
        self._surplus = self._variance = 0.0
        self._fade(min(1.0, LOOSE / max(self._tried, default=LOOSE)))

    def expected_tokens(self) -> list[float]:
        """T(K) for K = 0, 1, ..., longest."""
        return list(accumulate(accumulate(self.rates(), mul), initial=1.0))

    def rates(self) -> list[float]:
        """Acceptance at each position, given that all before it were accepted."""
        if not self._rates:
            for tried, kept in zip(self._tried, self._kept, strict=True):
                before = self._rates[-1] if self._rates else kept / tried
                self._rates.append((kept + FIRM * before) / (tried + FIRM))
        return self._rates

    def _fade(self, factor: float) -> None:
        factors = [factor] * len(self._tried)
        factors[:1] = [max(factor, LEAST_WEIGHT / tried) for tried in self._tried[:1]]
        self._tried = list(map(mul, self._tried, factors))
        self._kept = list(map(mul, self._kept, factors))
        self._rates = []


class AdaptiveLength:
    """Never slower than the best fixed K for long: each K runs as often as it may be the best one.

    It goes by costs that are drawn from what they may be (Thompson sampling): what is well timed and best runs nearly
    always, what is as good nearly as often, what is sure to be dear never, and what is hardly known now and then.
    Choosing takes time: so the K in use is kept where another promises little more, and what was chosen often in a row
    stands for some rounds. Where plain decoding is best nobody hears whether drafts would be right by now. So one is
    tried, at falling frequency, and in between plain decoding stands.
    """

    def __init__(self, longest: int, costs: RoundCosts, seed: int = 0) -> None:
        self.longest = longest
        self._costs = costs
        self._acceptance = Acceptance(longest, costs.usual_acceptance)
        self._random = Random(seed)
        self._chosen, self._run = (0, 0), 0  # rows and K, and how often in a row
        self._stands = 0  # more rounds for which that was chosen
        self._rest = 0  # more rounds for which it should stand, since choosing takes time
        self._accepted = list[tuple[int, int, Sequence[int]]]()  # as observed, and not yet learnt from
        self._timed = list[tuple[int, int, float | None]]()  # likewise
        self._wait = self._countdown = SOONEST_LOOK  # plain rounds before the next draft is tried

    def choose(self, rows: int) -> int:
        if self._stands and rows == self._chosen[0]:
            self._stands -= 1
            self._countdown -= self._chosen[1] == 0
            return self._chosen[1]
        self._learn()
        chosen = rows, self._choose(rows)
        self._run = self._run + 1 if chosen == self._chosen else 1
        self._chosen = chosen
        self._stands = rest = self._rest if self._run > 1 else 0
        if not self._costs.has_begun(*chosen):
            self._stands = 1  # the first round of its kind is not timed
        elif chosen[1] == 0 and (rest or self._run > PLAIN_RUN):
            self._stands = max(self._countdown - 1, 0)  # until the look, nothing is learnt of drafts
        elif chosen[1] and self._run > DRAFTED_RUN:
            self._stands = STANDING
        return chosen[1]

    def observe(self, rows: int, num_draft_tokens: int, accepted: Sequence[int]) -> None:
        self._accepted.append((rows, num_draft_tokens, accepted))

    def observe_seconds(self, rows: int, num_draft_tokens: int, seconds: float | None) -> None:
        self._timed.append((rows, num_draft_tokens, seconds))

    def new_task(self) -> None:
        self._learn()
        self._acceptance.loosen()
        self._wait = self._countdown = SOONEST_LOOK
        self._stands = 0

    def plain_seconds(self, tokens_by_rows: Mapping[int, int]) -> float | None:
        self._learn()
        if not self._costs.knows_plain:
            return None
        return sum(tokens * self._costs.seconds(rows, self.longest)[0]
                   for rows, tokens in tokens_by_rows.items())

    def _learn(self) -> None:
        """From all rounds since the last choice. At once, since a device's work has emptied a CPU's caches: the second
        round takes a tenth of the time of the first."""
        for rows, num_draft_tokens, seconds in self._timed:
            self._costs.observe(rows, num_draft_tokens, seconds, self.longest)
        for rows, num_draft_tokens, accepted in self._accepted:
            self._acceptance.observe(num_draft_tokens, accepted)
            if num_draft_tokens:
                self._costs.accept(accepted)
            is_right = 2 * sum(count > 0 for count in accepted) > len(accepted)
            if is_right and self._wait > SOONEST_LOOK:  # a look after many plain rounds: see whether that lasts
                self._wait = min(self._wait, self._affordable_wait(rows))
                self._countdown = min(self._countdown, self._wait)
        self._timed.clear()
        self._accepted.clear()

    def _choose(self, rows: int) -> int:
        self._rest = 0
        if not self._costs.is_known:
            return FIRST_K
        is_settled = self._costs.timings(rows) >= PLAIN_LOOK
        if is_settled and not self._costs.knows_plain:
            return 0
        tokens = self._acceptance.expected_tokens()
        wanted = sum(more - before >= LEAST_GAIN for before, more in pairwise(tokens))
        in_use = self._chosen[1] if rows == self._chosen[0] else None
        seconds = self._costs.drawn(rows, self.longest, wanted, self._random)
        k = _best(tokens[: wanted + 1], seconds, in_use)
        self._rest = min(int(CHOOSING / (CHOOSING_SHARE * seconds[k])), STANDING)
        if k:
            self._wait = self._countdown = SOONEST_LOOK
            return k
        self._countdown -= 1
        if self._countdown > 0:
            return 0
        latest = min(max(self._affordable_wait(rows), LATEST_LOOK[0]), LATEST_LOOK[-1])
        self._wait = self._countdown = min(2 * self._wait, latest)
        return 1

    def _affordable_wait(self, rows: int) -> int:
        """Plain rounds between two with a draft that cost LOOKS_SHARE of the time, as far as is believed by now."""
        plain, drafted, *_ = self._costs.seconds(rows, self.longest)
        lost = drafted / plain - self._acceptance.expected_tokens()[1]  # plain rounds
        return max(int(lost / LOOKS_SHARE), SOONEST_LOOK)


def _best(tokens: Sequence[float], seconds: Sequence[float], in_use: int | None) -> int:
    speeds = list(map(truediv, tokens, seconds))
    if in_use is not None and in_use < len(speeds):
        speeds[in_use] *= 1 + WORTH_CHANGING
    return speeds.index(max(speeds))
