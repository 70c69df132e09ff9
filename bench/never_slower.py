"""Is K = "auto" never slower? Replayed acceptance from 0 to 1, against every fixed K.

    python -m bench.never_slower [FOLDER] [--rows 1 4 8] [--acceptance 0 0.4 0.8 1]     FOLDER as in bench.serving

The engine decodes with "auto", cold. Every 32 rounds it is halted, and for each K some rounds over the same texts are
timed, by engines that began with it. The Ks it chose are priced with the medians of those, and with what choosing them
took: so a machine that is disturbed now and then, or slow for a while, may mislead the controller, but not this
comparison. (A GPU works on while the host chooses, so there choosing is priced too high.) Of eight prices with some
noise the best one is mostly a lucky one: so one half of the rounds says which K is best, and the other half what it and
the chosen ones cost, and the other way round. "luckiest" is against the best of all the prices, and the clock's own
figure stands beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import mlx_mtp
from bench import blas
from bench.card import environment_card, print_card
from bench.prompts import RANDOM, random_prompts
from bench.replay import ReplayDrafter, replayed_drafts
from bench.rounds import round_timer
from mlx_mtp import Pair
from mlx_mtp.command import guarded
from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import Request
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.spec_decode.draft_length import DraftLength

PROMPT = 48
TOKENS = 1000  # of each text
ROUNDS = 160
PRICED_EVERY = 32  # rounds
BLOCKS, PRICED_FOR = 2, 3.0  # of each K, each time, at least; and seconds for all of them
SETTLED = 64  # rounds after which it should know
COLD = 256  # tokens of a whole request


def replaying(pair: Pair, known: list[list[int]], acceptance: float) -> Pair:
    """The pair with a drafter that drafts the known texts, right with this probability."""
    assert pair.drafter is not None
    drafts = replayed_drafts(known, acceptance, pair.target.config.text.vocab_size)
    return dataclasses.replace(pair, drafter=cast(Drafter, ReplayDrafter(pair.drafter, drafts)))


class Prices:
    """What a round costs for K = 0, 1, ..., the longest, in engines that decode the same texts with that K only."""

    def __init__(self, pair: Pair, rows: int) -> None:
        lengths = range(EngineConfig().max_draft_tokens + 1)
        self._timers = [round_timer(pair, rows, PROMPT, k) for k in lengths]
        self._blocks: list[list[float]] = [[] for _ in lengths]
        for timer in self._timers:
            timer()  # warms up

    def measure(self) -> None:
        began, count = time.perf_counter(), 0
        while count < BLOCKS or time.perf_counter() - began < PRICED_FOR:
            for blocks, timer in zip(self._blocks, self._timers, strict=True):
                blocks.append(timer())
            count += 1

    def seconds(self) -> list[float]:
        return [statistics.median(blocks) for blocks in self._blocks]

    def halves(self) -> tuple[list[float], list[float]]:
        """By every other block: two prices that share no disturbance."""
        first, second = ([statistics.median(blocks[i::2]) for blocks in self._blocks] for i in (0, 1))
        return first, second


def texts(pair: Pair, rows: int) -> list[list[int]]:
    """Plain decoding's, prompts included."""
    requests = [Request(prompt, SamplingParams(TOKENS), frozenset(), 10**6)
                for prompt in random_prompts(RANDOM, rows, PROMPT)]
    for _ in Engine(pair.target, None, EngineConfig(prefix_tokens=0, prefill_chunk=rows * PROMPT)).run(requests):
        pass
    return [[*request.prompt, *request.tokens] for request in requests]


@dataclass(frozen=True)
class Seen:
    """One cold run: its Ks in order, tokens a row, and seconds by the clock, of the whole round and of choosing."""

    lengths: list[int]
    tokens: list[float]
    seconds: list[float]
    choosing: list[float]

    def speed(self, round_costs: Sequence[float], start: int, stop: int) -> float:
        """Tokens a second of a row in these rounds, each priced by its K and by what choosing took in the median."""
        chosen, choosing = range(start, min(stop, len(self.lengths))), statistics.median(self.choosing)
        return sum(self.tokens[i] for i in chosen) / sum(round_costs[self.lengths[i]] + choosing for i in chosen)


@dataclass
class Clocked:
    """A controller that counts the seconds that are spent in it."""

    policy: DraftLength
    seconds: float = 0.0

    @property
    def longest(self) -> int:
        return self.policy.longest

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            began = time.perf_counter()
            try:
                return getattr(self.policy, name)(*arguments)
            finally:
                self.seconds += time.perf_counter() - began

        return call


class _Noted(Engine):
    """An engine that tells which K each round had, and halts for prices."""

    def rounds(self, requests: Sequence[Request], prices: Prices) -> Seen:
        lengths: list[int] = []
        tokens: list[float] = []
        seconds: list[float] = []
        choosing: list[float] = []
        clocked = Clocked(self._draft_length)
        self._draft_length = cast(DraftLength, clocked)
        for request in requests:
            self.submit(request)
        while len(lengths) < ROUNDS and not any(request.is_finished for request in requests):
            before = [Counter(request.rounds_by_length) for request in requests]
            began, clocked.seconds = time.perf_counter(), 0.0
            events = self.step()
            took = time.perf_counter() - began
            new = Counter(requests[0].rounds_by_length) - before[0]
            if new and not any(request.is_finished for request in requests):
                lengths += new.elements()
                tokens.append(sum(len(event.tokens) for event in events) / len(requests))
                seconds.append(took)
                choosing.append(clocked.seconds)
                if len(lengths) % PRICED_EVERY == 0:
                    prices.measure()
                    self._landed_at, self._is_disturbed = time.perf_counter(), True  # the halt is no round's time
        return Seen(lengths, tokens, seconds, choosing)


def expected(acceptance: float, k: int) -> float:
    return sum(acceptance**i for i in range(k + 1))


def best_length(acceptance: float, round_costs: Sequence[float]) -> int:
    return max(range(len(round_costs)), key=lambda k: expected(acceptance, k) / round_costs[k])


def compare(pair: Pair, rows: int, acceptance: float, known: list[list[int]]) -> None:
    pair = replaying(pair, known, acceptance)
    engine = _Noted(pair.target, pair.drafter, EngineConfig(prefix_tokens=0, prefill_chunk=rows * PROMPT))
    prices = Prices(pair, rows)
    requests = [Request(text[:PROMPT], SamplingParams(TOKENS), frozenset(), 10**6) for text in known]
    seen = engine.rounds(requests, prices)
    # The text's own share of right drafts differs a little from the one asked for; tokens are therefore expected ones.
    priced = dataclasses.replace(seen, tokens=[expected(acceptance, k) for k in seen.lengths])
    cold = next((i for i in range(len(priced.tokens)) if sum(priced.tokens[: i + 1]) >= COLD), len(priced.tokens))
    parts = ((SETTLED, ROUNDS), (0, cold + 1))

    def shares(chosen_by: Sequence[float], round_costs: Sequence[float]) -> list[float]:
        """What auto has of the K that is best by one list of prices, both at the other's: late, and cold."""
        best = best_length(acceptance, chosen_by)
        fixed = expected(acceptance, best) / round_costs[best]
        return [priced.speed(round_costs, *part) / fixed for part in parts]

    first, second = prices.halves()
    late, begun = map(statistics.mean, zip(shares(first, second), shares(second, first), strict=True))
    costs = prices.seconds()
    luckiest = shares(costs, costs)
    best = best_length(acceptance, costs)
    speed = expected(acceptance, best) / costs[best]
    clock = sum(seen.tokens[SETTLED:]) / sum(seen.seconds[SETTLED:]) if seen.seconds[SETTLED:] else float("nan")
    print(f"rows {rows}  acceptance {acceptance:.1f}  best fixed K = {best} ({rows * speed:.1f} tok/s)  "
          f"auto after {SETTLED} rounds {late:.3f} (luckiest {luckiest[0]:.3f}), "
          f"first {COLD} tokens {begun:.3f} ({luckiest[1]:.3f}); by the clock {clock / speed:.2f}; "
          f"Ks {dict(sorted(Counter(seen.lengths[SETTLED:]).items()))}; "
          f"choosing {1e3 * statistics.median(seen.choosing):.2f} ms, "
          f"ms by K {' '.join(f'{1e3 * seconds:.1f}' for seconds in costs)}", flush=True)


def main() -> int:
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("folder", nargs="?", default="demo")
    cli.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    cli.add_argument("--acceptance", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    blas.add_flag(cli)
    args = cli.parse_args()
    pair = mlx_mtp.load(None if args.folder == "demo" else args.folder)
    print_card(environment_card())
    known = texts(pair, max(args.rows))
    for rows in args.rows:
        for acceptance in args.acceptance:
            compare(pair, rows, acceptance, known[:rows])
    return 0


if __name__ == "__main__":
    blas.prefer_openblas()
    sys.exit(guarded(main))
