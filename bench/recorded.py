"""Is K = "auto" never slower, on average over many cold starts? With the rounds of a real engine, recorded once.

    python -m bench.recorded [FOLDER] [--rows 1 4 8] [--acceptance 0 0.4 0.8 1]     FOLDER as in bench.serving
    python -m bench.recorded --rounds 6000 --runs 500 --live 20

`bench.never_slower` is the real thing, but takes minutes a cell, and is sure to a few percent only: on a shared machine
the pace wanders by a tenth, and K and K + 1 often differ by less. Here an engine decodes with a K at random, for one
round or for a few, and what the controller would hear of each is written down. That is taken apart:

    seconds(round) = ((1 - late) cost(K) + late cost(K of the round before)) * disturbance(round)

Then controllers that know nothing meet a machine with those costs, and with that disturbance from any of its rounds on,
a hundred times for each acceptance. Their Ks are priced with the costs, and each time that they weigh Ks with what that
took beside the engine: a controller was asked there too, and not followed. The pace's wandering, the bursts of other
programs and the host's late reads are thus the machine's own; what is made up are the drafts that are right, and that a
round costs the same wherever it is in a text. After 64 rounds and over a request of 256 tokens, as there; means and
their standard errors, and what nine in ten cold starts reach. --live: so many controllers meet the engine itself, too,
and what they choose there is priced likewise. What prices are in doubt by is told beside it; the best fixed K is the
best by those same prices, so their errors make the shares smaller than they are.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

import mlx_mtp
from bench import blas
from bench.card import environment_card, print_card
from bench.never_slower import COLD, PROMPT, ROUNDS, SETTLED, Shares, add_cells, texts
from bench.replay import ReplayDrafter, replayed_drafts
from bench.simulated import RecordedMachine, best_speed, tokens
from mlx_mtp import Pair
from mlx_mtp.command import guarded
from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import Request
from mlx_mtp.spec_decode.draft_length import AdaptiveLength, DraftLength
from mlx_mtp.spec_decode.round_costs import RoundCosts

LONGEST = EngineConfig().max_draft_tokens
TEXT = 800  # tokens of each text
RIGHT = (0.2, 0.5, 0.8)  # acceptance, one text after the other
RUNS_OF_ONE_K = (1, 1, 2, 4, 8, 16)  # rounds, one of these at random
LEAST_SETTLED = 32  # rounds after SETTLED of a run that was cut short, at least
BEGINNING = 20  # rounds of each text that are not counted: prefill, first of their kind
LATE = tuple(each / 20 for each in range(11))  # what is tried for it
FITTED, USUAL_OFF = 15, 0.1  # times; log seconds: what is off by more counts for less


@dataclass(frozen=True)
class Heard:
    """A round as the controller hears of it. before: the K of the one before it."""

    k: int
    before: int
    seconds: float


class CountedCosts(RoundCosts):
    """Counts how often Ks are weighed; in most rounds what was chosen stands."""

    weighed = 0

    def drawn(self, rows: int, longest: int, wanted: int, random: random.Random) -> list[float]:
        self.weighed += 1
        return super().drawn(rows, longest, wanted, random)


class Asked:
    """Asks `policy` and tells it all."""

    def __init__(self, policy: DraftLength) -> None:
        self.policy = policy

    @property
    def longest(self) -> int:
        return self.policy.longest

    def choose(self, rows: int) -> int:
        return self.policy.choose(rows)

    def observe(self, rows: int, num_draft_tokens: int, accepted: Sequence[int]) -> None:
        self.policy.observe(rows, num_draft_tokens, accepted)

    def observe_seconds(self, rows: int, num_draft_tokens: int, seconds: float | None) -> None:
        self.policy.observe_seconds(rows, num_draft_tokens, seconds)

    def new_task(self) -> None:
        self.policy.new_task()

    def plain_seconds(self, tokens_by_rows: Mapping[int, int]) -> float | None:
        return self.policy.plain_seconds(tokens_by_rows)


class AtRandom(Asked):
    """A K at random, whatever `policy` says. weighing: seconds that its answers took."""

    def __init__(self, policy: DraftLength, seed: int) -> None:
        super().__init__(policy)
        self.weighing = 0.0
        self._rounds = list[tuple[int, float | None]]()  # K and seconds, as heard
        self._random = random.Random(seed)
        self._k = self._left = 0

    def choose(self, rows: int) -> int:
        began = time.perf_counter()
        super().choose(rows)
        self.weighing += time.perf_counter() - began
        if self._left == 0:
            self._k, self._left = self._random.randrange(self.longest + 1), self._random.choice(RUNS_OF_ONE_K)
        self._left -= 1
        return self._k

    def observe_seconds(self, rows: int, num_draft_tokens: int, seconds: float | None) -> None:
        self._rounds.append((num_draft_tokens, seconds))
        super().observe_seconds(rows, num_draft_tokens, seconds)

    def heard(self) -> list[Heard]:
        pairs = zip(self._rounds[BEGINNING - 1 :], self._rounds[BEGINNING:], strict=False)
        return [Heard(k, before, seconds) for (before, _), (k, seconds) in pairs if seconds is not None]


class Followed(Asked):
    """Does as `policy` says. costs: that it goes by."""

    def __init__(self, policy: DraftLength, costs: CountedCosts) -> None:
        super().__init__(policy)
        self._costs = costs
        self.chosen, self._weighed = list[int](), list[int]()  # the latter: how often until then

    def choose(self, rows: int) -> int:
        self.chosen.append(super().choose(rows))
        self._weighed.append(self._costs.weighed)
        return self.chosen[-1]

    def shares(self, record: Record, rows: int, acceptance: float) -> Shares:
        """What this has of the best fixed K's speed, by the record's prices."""
        brought = np.array([tokens(acceptance, k) for k in self.chosen])
        took = np.array([record.costs[k] for k in self.chosen]) + record.weighing * np.diff(self._weighed, prepend=0)
        cold = int(np.searchsorted(brought.cumsum(), COLD)) + 1
        best = best_speed(lambda rows, k: record.costs[k], rows, acceptance, self.longest)
        return Shares(*(brought[part].sum() / took[part].sum() / best for part in (slice(SETTLED, None), slice(cold))))


@dataclass(frozen=True)
class Record:
    """costs: seconds by K. disturbance: log factors, in order. weighing: seconds, each time that Ks are weighed."""

    costs: list[float]
    late: float
    disturbance: list[float]
    weighing: float


class Texts:
    """Known texts, one a row, and as many other such texts as are asked for."""

    def __init__(self, pair: Pair, rows: int) -> None:
        self._pair, self._rows = pair, rows
        self._known = list[list[list[int]]]()

    def __getitem__(self, i: int) -> list[list[int]]:
        while len(self._known) <= i:
            self._known.append(texts(self._pair, self._rows, TEXT, seed=len(self._known)))
        return self._known[i]


class Recorder:
    """Decodes texts with Ks at random: part by part, since a shared machine is another one in half an hour.

    known: the texts, one a row.
    """

    def __init__(self, pair: Pair, known: list[list[int]]) -> None:
        self._pair, self._known = pair, known
        self._parts, self._weighing = list[list[Heard]](), list[float]()

    def hear(self, rounds: int) -> None:
        """Another part, of so many rounds or more."""
        part = list[Heard]()
        while len(part) < rounds:
            seed, costs = len(self._weighing), CountedCosts()
            policy = AtRandom(AdaptiveLength(LONGEST, costs, seed), seed)
            decode(self._pair, self._known, RIGHT[seed % len(RIGHT)], policy, seed)
            part += policy.heard()
            self._weighing.append(policy.weighing / costs.weighed)
        self._parts.append(part)

    def record(self) -> Record:
        return self._taken_apart(self._parts)

    def without_each(self) -> list[Record]:
        """The record but for one part, for each of them."""
        return [self._taken_apart([*self._parts[:i], *self._parts[i + 1 :]]) for i in range(len(self._parts))]

    def _taken_apart(self, parts: list[list[Heard]]) -> Record:
        return taken_apart([*chain.from_iterable(parts)], LONGEST, statistics.median(self._weighing))


def decode(pair: Pair, known: list[list[int]], acceptance: float, policy: DraftLength, seed: int,
           rounds: float = math.inf) -> bool:
    """With a new engine, until a text or so many rounds are over, or a text is no longer the known one: where two
    tokens or two experts are nearly tied, a pass of another width may take the other one, and then no replayed draft is
    right. Returns whether that was not so."""
    assert pair.drafter is not None
    drafts = replayed_drafts(known, acceptance, pair.target.config.text.vocab_size, seed=seed)
    config = EngineConfig(prefix_tokens=0, prefill_chunk=len(known) * PROMPT)
    engine = Engine(pair.target, ReplayDrafter(pair.drafter, drafts), config)
    engine._draft_length = policy
    requests = [Request(text[:PROMPT], SamplingParams(len(text) - PROMPT), frozenset(), 10**6) for text in known]
    for request in requests:
        engine.submit(request)
    while not any(request.is_finished for request in requests) and requests[0].rounds < rounds:
        engine.step()
        if any(request.tokens and request.tokens[-1] != text[PROMPT + len(request.tokens) - 1]
               for request, text in zip(requests, known, strict=True)):
            return False
    return True


def taken_apart(heard: Sequence[Heard], longest: int, weighing: float) -> Record:
    """late is what explains best how the time changes from round to round."""
    found = [(late, *_costs(heard, longest, late)) for late in LATE]
    late, costs, disturbance = min(found, key=lambda each: float(np.abs(np.diff(each[2])).mean()))
    return Record(costs.tolist(), late, disturbance.tolist(), weighing)


def _costs(heard: Sequence[Heard], longest: int, late: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds by K, and what each round was disturbed by.

    From how log seconds change from one round to the next, which the pace has hardly a part in: it wanders slowly.
    Gauss-Newton, with weights for what is disturbed.
    """
    logs = np.log([each.seconds for each in heard])
    own, before = (np.eye(longest + 1)[ks] for ks in ([each.k for each in heard], [each.before for each in heard]))
    costs, weights = 1.0 + np.arange(longest + 1) / 5, np.ones(len(logs) - 1)
    for _ in range(FITTED):
        shares = (1 - late) * own * costs + late * before * costs
        total = shares.sum(axis=1)
        off = np.diff(logs - np.log(total))
        weights = 1 / np.hypot(1.0, off / USUAL_OFF) ** 0.5
        slopes = np.diff(shares / total[:, None], axis=0)[:, 1:]  # all in units of K = 0
        steps, *_ = np.linalg.lstsq(slopes * weights[:, None], off * weights, rcond=None)
        costs[1:] *= np.exp(steps)
    disturbance = logs - np.log(((1 - late) * own + late * before) @ costs)
    pace = float(np.median(disturbance))
    return costs * math.exp(pace), disturbance - pace


def cold_start(record: Record, rows: int, acceptance: float, seed: int) -> Shares:
    """Of a controller that knows nothing, in the record."""
    costs = CountedCosts()
    policy = Followed(AdaptiveLength(len(record.costs) - 1, costs, seed), costs)
    machine = RecordedMachine(policy, lambda rows, k: record.costs[k], rows, random.Random(seed), late=record.late,
                              record=record.disturbance)
    for _ in range(ROUNDS):
        machine.round(acceptance)
    return policy.shares(record, rows, acceptance)


@dataclass(frozen=True)
class Live:
    """Controllers that met an engine. cut: of these, how many only until their text took another turn. replaced:
    others, of whom so little was left that it says nothing."""

    kept: list[Followed]
    cut: int
    replaced: int


def live_starts(pair: Pair, known: Texts, acceptance: float, count: int) -> Live:
    """Controllers that knew nothing, each in a new engine. From where a text took another turn, drafts were not right
    as often as `acceptance` says; whether it does depends on the K there, so leaving such runs out altogether would
    favour the controllers that keep to others.

    known: texts, and others that take their place when a run with them said nothing."""
    kept, cut, replaced = list[Followed](), 0, 0
    while len(kept) < count and len(kept) + replaced < 2 * count:
        seed, costs = len(kept) + replaced, CountedCosts()
        policy = Followed(AdaptiveLength(LONGEST, costs, seed), costs)
        is_whole = decode(pair, known[replaced], acceptance, policy, seed, ROUNDS)
        if is_whole or len(policy.chosen) >= SETTLED + LEAST_SETTLED:
            kept.append(policy)
            cut += not is_whole
        else:
            replaced += 1
    return Live(kept, cut, replaced)


def live_cell(found: Live, record: Record, others: Sequence[Record], rows: int, acceptance: float) -> str:
    """others: the record without each of its parts, from which the jackknife tells what prices are in doubt by."""
    live = found.kept
    runs = f"live, {len(live)} runs, {found.cut} cut short and {found.replaced} replaced by a text's other turn:"
    if len(live) < 2:
        return f"{runs} too few to say anything"
    ks = dict(sorted(Counter(k for each in live for k in each.chosen[SETTLED:]).items()))
    late = [statistics.mean(each.shares(other, rows, acceptance).late for each in live) for other in others]
    doubt = (len(late) - 1) * statistics.pvariance(late)
    shares = told([each.shares(record, rows, acceptance) for each in live])
    return f"{runs} {shares} prices ± {doubt**0.5:.3f} Ks {ks}"


def told(found: Sequence[Shares]) -> str:
    late, cold = (f"{statistics.mean(shares):.3f} ± {statistics.stdev(shares) / len(shares) ** 0.5:.3f} "
                  f"(nine in ten {np.quantile(shares, 0.1):.3f})"
                  for shares in ([each.late for each in found], [each.cold for each in found]))
    return f"auto after {SETTLED} rounds {late}, first {COLD} tokens {cold}"


def width(pair: Pair, rows: int, args: argparse.Namespace) -> None:
    """All cells of so many rows. A part is recorded before each acceptance's live controllers, and
    one after all."""
    known, live = Texts(pair, rows), list[Live]()
    recorder = Recorder(pair, known[0])
    part = math.ceil(args.rounds / (len(args.acceptance) + 1))
    for acceptance in args.acceptance:
        recorder.hear(part)
        live.append(live_starts(pair, known, acceptance, args.live))
    recorder.hear(part)
    record = recorder.record()
    disturbed = np.std(record.disturbance), np.std(np.diff(record.disturbance))
    print(f"rows {rows}  {len(record.disturbance)} rounds, disturbed by {disturbed[0]:.3f} of log seconds, "
          f"{disturbed[1]:.3f} from one to the next; late {record.late:.2f}; weighing {1e3 * record.weighing:.2f} ms; "
          f"ms by K {' '.join(f'{1e3 * cost:.1f}' for cost in record.costs)}")
    others = recorder.without_each() if args.live else []
    for acceptance, found in zip(args.acceptance, live, strict=True):
        cell = f"rows {rows}  acceptance {acceptance:.1f} "
        print(cell, told([cold_start(record, rows, acceptance, seed) for seed in range(args.runs)]), flush=True)
        if args.live:
            print(cell, live_cell(found, record, others, rows, acceptance), flush=True)


def main() -> int:
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_cells(cli)
    cli.add_argument("--rounds", type=int, default=2000, help="to be recorded, at least (default: %(default)s)")
    cli.add_argument("--runs", type=int, default=100, help="cold starts of each (default: %(default)s)")
    cli.add_argument("--live", type=int, default=0, help="of the engine itself, too, at least 2 (default: none)")
    blas.add_flag(cli)
    args = cli.parse_args()
    if args.runs < 2 or args.rounds < 1 or args.live == 1:
        cli.error(f"--runs {args.runs} --rounds {args.rounds} --live {args.live}: expected 2, 1 and 2 or more")
    pair = mlx_mtp.load(None if args.folder == "demo" else args.folder)
    print_card(environment_card())
    for rows in args.rows:
        width(pair, rows, args)
    return 0


if __name__ == "__main__":
    blas.prefer_openblas()
    sys.exit(guarded(main))
