"""Is K = "auto" never slower? Replayed acceptance from 0 to 1, against every fixed K.

    python -m bench.never_slower [FOLDER] [--rows 1 4 8] [--acceptance 0 0.4 0.8 1]     FOLDER as in bench.serving
    python -m bench.never_slower --runs 15
    python -m bench.never_slower --shapes 26B-A4B --bits 4                              as in bench.real_shapes

The engine decodes with "auto", cold. Twice it is halted, and for each K some rounds of the same engine are timed, one K
after the other in any order, over the text that comes next. The Ks it chose are priced with those, and with what
choosing them took: so a machine that is disturbed now and then, or slow for a while, may mislead the controller, but
not this comparison. (A GPU works on while the host chooses, so there choosing is priced too high.) All of that is done
several times, each time by a new engine that knows nothing, with other drafts that are right and other draws of "auto";
the prices are those of all passes of all runs, and what is told is the run in the median, and the worst. The first run
prices every K; the time of the others goes to the Ks that may be the best, or that "auto" was seen to choose. Of eight
prices with some noise the best one is mostly a lucky one: so one half of the passes says which is best, and the other
half what it and the chosen ones cost, and the other way round. "luckiest" is against the best of all the prices; the
clock's own figure, of a round in the median, stands beside it. What a round of each K brings is counted in the drafts
for the text that "auto" decoded: of a few hundred, those that are right are a little more or less than was asked for.
How well a figure is known, by chance of passes and runs alone, is its standard error (bootstrap).
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

import mlx_mtp
from bench import blas
from bench.card import environment_card, print_card
from bench.model_bytes import BITS
from bench.prompts import RANDOM, random_prompts
from bench.real_shapes import ScriptedTarget, shaped_pair
from bench.recipe_sizes import FAMILY
from bench.replay import ReplayDrafter, replayed_drafts
from mlx_mtp import Pair
from mlx_mtp.check.loading import choose_fastest_dispatch
from mlx_mtp.command import guarded
from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import Request
from mlx_mtp.spec_decode.draft_length import AdaptiveLength, DraftLength, FixedLength
from mlx_mtp.spec_decode.round_costs import RoundCosts

PROMPT = 48
TOKENS = 3200  # of each text
ROUNDS = 160
PRICED_EVERY = 80  # rounds
BLOCK = 4  # rounds that are timed together
PASSES = 2  # over all K, a block of each, each time, at least
POLISHED = 10  # times; medians settle much sooner
PRICED_FOR, PRICED_OVER = 4.0, 320  # seconds and tokens, each time, for more of them
NEAR = 0.8  # of the best K's tokens a second, by the first run's prices: such a K may be the best
OFTEN = 0.05  # of a run's rounds: what was chosen so often is worth a good price
UNDISTURBED = 0.95  # of the rounds: what choosing took in the others was something else
SETTLED = 64  # rounds after which it should know
COLD = 256  # tokens of a whole request
RESAMPLED = 200  # times, for standard errors


class Prices:
    """What a round costs for K = 0, 1, ..., from passes in which every K had its turn, or every K of interest.

    The machine's pace wanders from pass to pass, and now and then it is disturbed: log seconds are taken for the sum
    of one number for each pass and one for each K, found by medians (Tukey's median polish).

    passes: of each, seconds by K; NaN where it had no turn.
    """

    def __init__(self, passes: Sequence[list[float]] = ()) -> None:
        self.passes = list(passes)

    def seconds(self) -> list[float]:
        return polished(self.passes)

    def halves(self) -> tuple[list[float], list[float]]:
        """By every other pass: two prices that share no disturbance."""
        return polished(self.passes[::2]), polished(self.passes[1::2])

    def resampled(self, draw: random.Random) -> Prices:
        """As if measured again: each pass is one of those in which the same Ks had their turn."""
        alike = defaultdict[tuple[bool, ...], list[list[float]]](list)
        turns = [tuple(map(math.isnan, each)) for each in self.passes]
        for kind, each in zip(turns, self.passes, strict=True):
            alike[kind].append(each)
        return Prices([draw.choice(alike[kind]) for kind in turns])


def polished(passes: list[list[float]]) -> list[float]:
    """Seconds by K, at the median pass's pace. passes: as in `Prices`; each K had its turn in one."""
    logs = np.log(passes)
    by_k, paces = np.zeros(logs.shape[1]), np.zeros(logs.shape[0])
    for _ in range(POLISHED):
        by_k = np.nanmedian(logs - paces[:, None], axis=0)
        paces = np.nanmedian(logs - by_k, axis=1)
    return [float(each) for each in np.exp(by_k + np.median(paces))]


def texts(pair: Pair, rows: int, count: int, seed: int = 7) -> list[list[int]]:
    """Plain decoding's, prompts and `count` tokens of each; a scripted target's are known without it. seed: of the
    prompts."""
    prompts = random_prompts(RANDOM, rows, PROMPT, seed)
    if isinstance(pair.target, ScriptedTarget):
        return [[*prompt, *pair.target.text_after(prompt, count)] for prompt in prompts]
    requests = [Request(prompt, SamplingParams(count), frozenset(), 10**6) for prompt in prompts]
    for _ in Engine(pair.target, None, EngineConfig(prefix_tokens=0, prefill_chunk=rows * PROMPT)).run(requests):
        pass
    return [[*request.prompt, *request.tokens] for request in requests]


@dataclass(frozen=True)
class Seen:
    """One cold run: its Ks in order, and seconds by the clock, of the whole round and of choosing.

    decoded: [rows, TOKENS], which tokens of the text it brought; the others came while it was halted.
    """

    lengths: list[int]
    seconds: list[float]
    choosing: list[float]
    decoded: np.ndarray

    def tokens(self, by_length: Sequence[float], start: int, stop: int) -> float:
        """Of a row in these rounds, each with what its K brings."""
        return sum(by_length[k] for k in self.lengths[start:stop])

    def price(self, round_costs: Sequence[float], start: int, stop: int) -> float:
        """Seconds of these rounds, each priced by its K; and what choosing took."""
        lengths, choosing = self.lengths[start:stop], sorted(self.choosing[start:stop])
        usual = statistics.mean(choosing[: max(int(UNDISTURBED * len(choosing)), 1)])  # what stands costs less
        return sum(round_costs[k] + usual for k in lengths)


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

    def rounds(self, requests: Sequence[Request], prices: Prices, priced: Sequence[int], seed: int) -> Seen:
        """priced: the Ks that have their turn. seed: of what "auto" draws."""
        seen = Seen([], [], [], np.zeros((len(requests), TOKENS), bool))
        clocked = Clocked(AdaptiveLength(self._draft_length.longest, RoundCosts(), seed))
        self._draft_length = cast(DraftLength, clocked)
        for request in requests:
            self.submit(request)
        while len(seen.lengths) < ROUNDS and not any(request.is_finished for request in requests):
            before, lengths = Counter(requests[0].rounds_by_length), [len(request.tokens) for request in requests]
            began, clocked.seconds = time.perf_counter(), 0.0
            self.step()
            took = time.perf_counter() - began
            new = Counter(requests[0].rounds_by_length) - before
            if not new:
                continue
            for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
                seen.decoded[row, length : len(request.tokens)] = True
            seen.lengths.extend(new.elements())
            seen.seconds.append(took)
            seen.choosing.append(clocked.seconds)
            if len(seen.lengths) % PRICED_EVERY == 0:
                self._price(prices, priced)
                self._draft_length = cast(DraftLength, clocked)
        return seen

    def _price(self, prices: Prices, priced: Sequence[int]) -> None:
        """Leaves nothing in flight, so that the controller hears of no such round, and times none by its end."""
        self._drain()
        until, over = time.perf_counter() + PRICED_FOR, max(row.length for row in self.decoding) + PRICED_OVER
        longest, count, rows = self._draft_length.longest, 0, self.active_rows
        while count < PASSES or (time.perf_counter() < until and max(row.length for row in self.decoding) < over):
            seconds = [math.nan] * (longest + 1)
            for k in random.sample(priced, len(priced)):
                self._draft_length = FixedLength(k)
                self.step()
                self.step()  # one such round is in flight when the clock starts, and when it stops
                start = time.perf_counter()
                for _ in range(BLOCK):
                    self.step()
                took = time.perf_counter() - start
                if self.active_rows < rows or any(request.is_finished for request in self.decoding):
                    return  # the text is at its end
                seconds[k] = took / BLOCK
            prices.passes.append(seconds)
            count += 1
        self._drain()

    def _drain(self) -> None:
        while self._flights:
            self._land(self._flights.popleft())
        self._is_disturbed = True


def as_known(tokens: Sequence[Sequence[int]], known: Sequence[Sequence[int]]) -> np.ndarray:
    """[rows, TOKENS] bool: where a draft from the known text may be right. Where two tokens or two experts are nearly
    tied, a pass of another width may take the other one, and from there on the text is another."""
    found = np.ones((len(known), TOKENS), bool)
    for row, (own, text) in enumerate(zip(tokens, known, strict=True)):
        same = [a == b for a, b in zip(own, text[PROMPT:], strict=False)]
        if not all(same):
            found[row, same.index(False) :] = False
    return found


def brought(right: np.ndarray, decoded: np.ndarray, longest: int) -> list[float]:
    """Tokens of a round of K = 0, 1, ..., longest drafts, on average over where it may begin: where `decoded` is true.

    right, decoded: [rows, drafts].
    """
    tokens, run = [1.0], np.ones_like(right)
    for k in range(longest):
        run = run[:, : right.shape[1] - k] & right[:, k:]
        tokens.append(tokens[-1] + float(run[decoded[:, : run.shape[1]]].mean()))
    return tokens


def best_length(tokens: Sequence[float], round_costs: Sequence[float]) -> int:
    return max(range(len(round_costs)), key=lambda k: tokens[k] / round_costs[k])


def worth_pricing(every: Sequence[Seen], brings: Sequence[Sequence[float]], prices: Prices) -> list[int]:
    """The Ks that may be the best, and those that "auto" chose often in one of the runs so far."""
    costs, tokens = prices.seconds(), [statistics.mean(each) for each in zip(*brings, strict=True)]
    best = best_length(tokens, costs)
    chosen = [Counter(seen.lengths) for seen in every]
    return [k for k in range(len(costs)) if tokens[k] / costs[k] >= NEAR * tokens[best] / costs[best]
            or any(counts[k] >= OFTEN * counts.total() for counts in chosen)]


@dataclass(frozen=True)
class Shares:
    """What auto has of the best fixed K's speed: after SETTLED rounds, and over COLD tokens."""

    late: float
    cold: float


def shares(seen: Seen, tokens: Sequence[float], chosen_by: Sequence[float], round_costs: Sequence[float]) -> Shares:
    """Against the K that is best by one list of prices, both at the other's. tokens: what a round of each K brings."""
    best = best_length(tokens, chosen_by)
    cold = 1 + next((i for i in range(len(seen.lengths)) if seen.tokens(tokens, 0, i + 1) >= COLD), len(seen.lengths))
    return Shares(*(seen.tokens(tokens, *part) / seen.price(round_costs, *part) * round_costs[best] / tokens[best]
                    for part in ((SETTLED, ROUNDS), (0, cold))))


def crossed(every: Sequence[Seen], brings: Sequence[Sequence[float]], prices: Prices) -> list[Shares]:
    """Of each run: one half of the prices says which K is best, the other what it costs, and the other way round."""
    halves = prices.halves()
    found = []
    for seen, tokens in zip(every, brings, strict=True):
        both = [shares(seen, tokens, *by) for by in (halves, halves[::-1])]
        found.append(Shares(*map(statistics.mean, zip(*((each.late, each.cold) for each in both), strict=True))))
    return found


def standard_errors(every: Sequence[Seen], brings: Sequence[Sequence[float]], prices: Prices) -> Shares:
    """Of the medians of `crossed`: how much they vary if passes and runs are drawn again from those there were."""
    draw, late, cold = random.Random(0), list[float](), list[float]()
    for _ in range(RESAMPLED):
        runs = draw.choices(range(len(every)), k=len(every))
        found = crossed([every[run] for run in runs], [brings[run] for run in runs], prices.resampled(draw))
        late.append(statistics.median(each.late for each in found))
        cold.append(statistics.median(each.cold for each in found))
    return Shares(statistics.stdev(late), statistics.stdev(cold))


def compare(pair: Pair, rows: int, acceptance: float, known: list[list[int]], runs: int) -> None:
    assert pair.drafter is not None
    vocab_size, longest = pair.target.config.text.vocab_size, EngineConfig().max_draft_tokens
    config = EngineConfig(prefix_tokens=0, prefill_chunk=rows * PROMPT)
    prices, every, brings = Prices(), list[Seen](), list[list[float]]()
    for run in range(runs):
        drafts, wrong = (replayed_drafts(known, share, vocab_size, seed=run) for share in (acceptance, 0.0))
        engine = _Noted(pair.target, ReplayDrafter(pair.drafter, drafts), config)
        requests = [Request(text[:PROMPT], SamplingParams(TOKENS), frozenset(), 10**6) for text in known]
        priced = worth_pricing(every, brings, prices) if every else range(longest + 1)
        every.append(engine.rounds(requests, prices, priced, seed=run))
        right = (drafts != wrong)[:, PROMPT : PROMPT + TOKENS]
        brings.append(brought(right & as_known([request.tokens for request in requests], known), every[-1].decoded,
                              longest))

    costs = prices.seconds()
    luckiest = [shares(seen, tokens, costs, costs) for seen, tokens in zip(every, brings, strict=True)]
    found, errors = crossed(every, brings, prices), standard_errors(every, brings, prices)
    tokens = [statistics.mean(each) for each in zip(*brings, strict=True)]
    best = best_length(tokens, costs)
    speed = rows * tokens[best] / costs[best]
    rounds = [each for seen in every for each in zip(seen.lengths, seen.seconds, seen.choosing, strict=True)]
    clock = statistics.median(took / (costs[k] + choosing) for k, took, choosing in rounds)
    late = _told([each.late for each in found], errors.late, [each.late for each in luckiest])
    cold = _told([each.cold for each in found], errors.cold, [each.cold for each in luckiest])
    print(f"rows {rows}  acceptance {acceptance:.1f}  best fixed K = {best} ({speed:.1f} tok/s)  "
          f"auto after {SETTLED} rounds {late}, first {COLD} tokens {cold}; "
          f"rounds took {clock:.2f} of their price; "
          f"Ks {dict(sorted(Counter(k for seen in every for k in seen.lengths[SETTLED:]).items()))}; choosing "
          f"{1e3 * statistics.mean(choosing for *_, choosing in rounds):.2f} ms, "
          f"ms by K {' '.join(f'{1e3 * seconds:.1f}' for seconds in costs)}", flush=True)


def _told(by_run: Sequence[float], error: float, luckiest: Sequence[float]) -> str:
    return (f"{statistics.median(by_run):.3f} ± {error:.3f} (worst {min(by_run):.3f}, "
            f"luckiest {statistics.median(luckiest):.3f})")


def add_cells(cli: argparse.ArgumentParser) -> None:
    """Flags for the pair, and for the cells of the grid."""
    cli.add_argument("folder", nargs="?", default="demo")
    cli.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    cli.add_argument("--acceptance", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.6, 0.8, 1.0])


def main() -> int:
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_cells(cli)
    cli.add_argument("--runs", type=int, default=7, help="cold runs of each (default: %(default)s)")
    cli.add_argument("--shapes", metavar="NAME", help=f"random weights of the shapes of one of {', '.join(FAMILY)}")
    cli.add_argument("--bits", type=int, choices=BITS, default=4, help="of those shapes (default: %(default)s)")
    blas.add_flag(cli)
    args = cli.parse_args()
    if args.runs < 1:
        cli.error(f"--runs {args.runs}: expected 1 or more")
    if args.shapes is not None:
        pair = shaped_pair(args.shapes, args.bits, draft_bits=4)
        choose_fastest_dispatch(pair)
    else:
        pair = mlx_mtp.load(None if args.folder == "demo" else args.folder)
    print_card(environment_card())
    known = texts(pair, max(args.rows), TOKENS)
    for rows in args.rows:
        for acceptance in args.acceptance:
            compare(pair, rows, acceptance, known[:rows], args.runs)
    return 0


if __name__ == "__main__":
    blas.prefer_openblas()
    sys.exit(guarded(main))
