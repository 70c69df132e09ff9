"""The bench of "auto" in recorded rounds: how a record is taken apart, how it is met again, and one small run."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import mlx_mtp
from bench import never_slower, recorded
from bench.never_slower import Shares
from bench.recorded import AtRandom, CountedCosts, Heard, Live, Record, Texts
from bench.simulated import RecordedMachine
from mlx_mtp.spec_decode.draft_length import AdaptiveLength, FixedLength
from mlx_mtp.spec_decode.round_costs import RoundCosts

COSTS = [1.0, 1.4, 1.7, 1.9, 2.1, 2.2, 2.4, 2.5]


@dataclass(frozen=True)
class Telling(FixedLength):
    """Writes down what it is told."""

    told: list[tuple[object, ...]] = field(default_factory=list)

    def observe(self, rows: int, num_draft_tokens: int, accepted: Sequence[int]) -> None:
        self.told.append((rows, num_draft_tokens, accepted))

    def observe_seconds(self, rows: int, num_draft_tokens: int, seconds: float | None) -> None:
        self.told.append((rows, num_draft_tokens, seconds))


@pytest.mark.parametrize("late", [0.0, 0.2])
def test_costs_late_and_disturbance_are_found_again(late: float) -> None:
    generator, pace, true, heard = np.random.default_rng(0), 0.0, [], [Heard(0, 0, 1.0)]
    for _ in range(3000):
        k = int(generator.integers(8)) if generator.random() < 0.6 else heard[-1].k
        pace = 0.95 * pace + 0.03 * float(generator.normal())
        true.append(pace + 0.02 * float(generator.normal()) + 0.7 * (generator.random() < 0.02))
        undisturbed = (1 - late) * COSTS[k] + late * COSTS[heard[-1].k]
        heard.append(Heard(k, heard[-1].k, undisturbed * math.exp(true[-1])))
    found = recorded.taken_apart(heard[1:], 7, 0.0)
    assert found.late == pytest.approx(late, abs=0.051)
    assert np.allclose(np.array(found.costs) / found.costs[0], COSTS, rtol=0.01)
    assert np.median(found.disturbance) == pytest.approx(0.0, abs=1e-9)
    assert np.corrcoef(found.disturbance, true)[0, 1] > 0.98


def test_a_recorded_machine_is_disturbed_in_the_order_of_its_record() -> None:
    record, begun = [0.0, 0.1, 0.2], set()
    for seed in range(20):
        machine = RecordedMachine(AdaptiveLength(7, RoundCosts()), lambda rows, k: 1.0, 1, random.Random(seed),
                                  record=record)
        found = [round(math.log(machine.disturbance()), 6) for _ in range(7)]
        first = record.index(found[0])
        assert found == [record[(first + i) % 3] for i in range(7)]
        begun.add(first)
    assert begun == {0, 1, 2}


def test_the_end_of_a_round_is_in_the_time_of_the_next() -> None:
    class Alternating(Telling):
        def choose(self, rows: int) -> int:
            return len(self.told) // 2 % 2

    policy = Alternating(1)
    machine = RecordedMachine(policy, lambda rows, k: COSTS[k], 1, random.Random(0), late=0.25, record=[0.0])
    for _ in range(12):
        machine.round(1.0)
    ks, heard = machine.chosen[:-1], [told[2] for told in policy.told[1::2]]
    expected = [0.75 * COSTS[k] + 0.25 * COSTS[before] for before, k in pairwise(ks)]
    assert heard[3:] == pytest.approx(expected[2:]), "the first of each kind take longer"
    assert {(0, 1), (1, 0)} <= {*pairwise(ks[3:])}


def test_rounds_have_a_k_at_random_and_who_is_asked_hears_of_them_all_the_same() -> None:
    asked = Telling(7)
    policy = AtRandom(asked, seed=0)
    chosen = [policy.choose(2) for _ in range(400)]
    assert set(chosen) == set(range(8))
    assert 0.1 < np.mean(np.diff(chosen) != 0) < 0.5, "both runs of one K and changes"
    policy.observe(2, 3, [1, 0])
    policy.observe_seconds(2, 3, 0.5)
    assert asked.told == [(2, 3, [1, 0]), (2, 3, 0.5)]
    assert policy.weighing > 0


def test_of_the_beginning_and_of_what_could_not_be_timed_nothing_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "BEGINNING", 2)
    policy = AtRandom(FixedLength(7), seed=0)
    for k, seconds in ((0, 9.0), (1, 9.0), (2, 0.2), (3, None), (4, 0.4)):
        policy.observe_seconds(1, k, seconds)
    assert policy.heard() == [Heard(2, 1, 0.2), Heard(4, 3, 0.4)]


def test_a_share_is_of_the_best_fixed_length_and_weighing_is_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that keeps to K = 2, of whose rounds every fourth weighs Ks."""

    @dataclass
    class Stubborn:
        longest: int
        costs: CountedCosts
        seed: int
        rounds: int = 0

        def choose(self, rows: int) -> int:
            self.rounds += 1
            self.costs.weighed += self.rounds % 4 == 0
            return 2

        def observe(self, *_: object) -> None:
            pass

        observe_seconds = observe

    monkeypatch.setattr(recorded, "AdaptiveLength", Stubborn)
    record = Record(COSTS, 0.1, [0.0, 0.3], 0.0)
    best = sum(0.9**i for i in range(8)) / 2.5  # K = 7
    found = recorded.cold_start(record, 1, 0.9, 0)
    assert found.late == pytest.approx((1 + 0.9 + 0.81) / 1.7 / best)
    assert found.cold == pytest.approx(found.late)
    paid = recorded.cold_start(replace(record, weighing=0.4), 1, 0.9, 0)
    assert paid.late == pytest.approx(found.late * 1.7 / 1.8)


def test_controllers_that_start_cold_reach_what_is_promised_on_a_machine_like_a_recorded_one() -> None:
    """Its pace wandered by 0.13 of log seconds, with 0.09 from one round to the next."""
    generator, pace, disturbance = random.Random(0), 0.0, list[float]()
    for _ in range(2000):
        pace = 0.95 * pace + 0.035 * generator.gauss(0, 1)
        disturbance.append(pace + 0.05 * generator.gauss(0, 1))
    for acceptance in (0.0, 0.4, 0.8):
        found = [recorded.cold_start(Record(COSTS, 0.1, disturbance, 0.0), 1, acceptance, seed) for seed in range(25)]
        assert np.mean([each.late for each in found]) >= 0.97
        assert np.mean([each.cold for each in found]) >= 0.93


def test_the_mean_is_told_with_its_error_and_what_nine_in_ten_reach() -> None:
    assert recorded.told([Shares(0.9, 0.8), Shares(1.0, 0.8)] * 50) == (
        "auto after 64 rounds 0.950 ± 0.005 (nine in ten 0.900), first 256 tokens 0.800 ± 0.000 (nine in ten 0.800)")


def test_what_prices_are_in_doubt_by_is_told_from_the_record_without_each_part() -> None:
    costs = CountedCosts()
    policy = recorded.Followed(FixedLength(7), costs)
    for _ in range(300):
        policy.choose(1)
    record, dearer = (Record([*COSTS[:7], last], 0.1, [0.0], 0.0) for last in (2.5, 4.0))
    others = [record, dearer]
    shares = [policy.shares(each, 1, 0.9).late for each in others]
    assert shares[0] == pytest.approx(1.0)
    assert shares[1] < 0.8
    told = recorded.live_cell(Live([policy] * 2, 1, 3), record, others, 1, 0.9)
    assert told.startswith("live, 2 runs, 1 cut short and 3 replaced by a text's other turn: auto after 64 rounds "
                           "1.000 ± 0.000")
    assert told.endswith(f"prices ± {(shares[0] - shares[1]) / 2:.3f} Ks {{7: {2 * (300 - never_slower.SETTLED)}}}")


@pytest.mark.parametrize(("turned", "asked", "cut", "replaced"), [
    ({0: 0, 2: 95}, 5, 0, 2), ({0: 95, 2: 96}, 4, 1, 1), (dict.fromkeys(range(5), 70), 6, 0, 5),
])
def test_controllers_are_cut_short_where_a_text_took_another_turn_or_replaced(
    turned: dict[int, int], asked: int, cut: int, replaced: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """turned: rounds until then, by seed."""
    def decode(*arguments: Any) -> bool:
        (known, _, policy, seed, rounds) = arguments[1:]
        seeds.append(seed)
        used.append(known)
        for _ in range(turned.get(seed, rounds)):
            policy.choose(1)
        return seed not in turned

    seeds, used = list[int](), list[list[list[int]]]()
    monkeypatch.setattr(recorded, "decode", decode)
    monkeypatch.setattr(recorded, "texts", lambda pair, rows, count, seed: [[seed] * count] * rows)
    pair = mlx_mtp.load()
    found = recorded.live_starts(pair, Texts(pair, 2), 0.8, 3)
    assert seeds == [*range(asked)]
    short = [seed for seed in turned if turned[seed] < 96]
    assert [len(each) for each in used] == [2] * asked
    assert [each[1][0] for each in used] == [sum(one < seed for one in short) for seed in seeds]
    assert (len(found.kept), found.cut, found.replaced) == (asked - replaced, cut, replaced)


@pytest.mark.parametrize("kept", [0, 1])
def test_of_a_cell_where_too_few_runs_were_kept_just_that_is_told(kept: int) -> None:
    policy = recorded.Followed(FixedLength(7), CountedCosts())
    told = recorded.live_cell(Live([policy] * kept, kept, 4), Record(COSTS, 0.1, [0.0], 0.0), [], 1, 0.9)
    assert told.startswith(f"live, {kept} runs, ")
    assert told.endswith(": too few to say anything")


def test_other_texts_are_others_and_the_same_ones_again() -> None:
    pair = mlx_mtp.load()
    prompts = [never_slower.texts(pair, 1, 3, seed)[0][: never_slower.PROMPT] for seed in (0, 1, 0)]
    assert prompts[0] == prompts[2] != prompts[1]


@pytest.mark.parametrize("turn", [False, True])
def test_a_text_that_takes_another_turn_is_noticed(turn: bool) -> None:
    pair = mlx_mtp.load()
    (known,) = never_slower.texts(pair, 1, 40)
    known = known[: never_slower.PROMPT + 30]
    if turn:
        known[never_slower.PROMPT + 6 :] = [token + 1 for token in known[never_slower.PROMPT + 6 :]]
    told = Telling(2)
    assert recorded.decode(pair, [known], 0.8, told, 0) is not turn
    assert (len(told.told) // 2 <= 6) is turn  # rounds


def test_a_real_engine_is_recorded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(recorded, "TEXT", 300)
    monkeypatch.setattr(recorded.blas, "prefer_openblas", lambda: None)
    monkeypatch.setattr(sys, "argv", ["recorded", "--rows", "2", "--acceptance", "0.5", "--rounds", "120",
                                      "--runs", "2", "--live", "2"])
    assert recorded.main() == 0
    machine, cell, live = capsys.readouterr().out.splitlines()[-3:]
    assert int(machine.split()[2]) >= 120
    costs = [float(each) for each in machine.split("ms by K ")[1].split()]
    assert len(costs) == 8
    assert 0 < costs[0] < costs[7]
    assert cell.startswith(f"rows 2  acceptance 0.5  auto after {never_slower.SETTLED} rounds ")
    assert 0.3 < float(cell.split("rounds ")[1].split()[0]) <= 1
    assert live.startswith("rows 2  acceptance 0.5  live, 2 runs, ")
    assert 0.3 < float(live.split("tokens ")[1].split()[0]) <= 1
    assert 0 < float(live.split("prices ± ")[1].split()[0]) < 0.3


@pytest.mark.parametrize("wrong", [["--runs", "1"], ["--rounds", "0"], ["--live", "1"]])
def test_too_few_runs_or_rounds_are_refused(wrong: list[str], monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["recorded", *wrong])
    with pytest.raises(SystemExit) as stopped:
        recorded.main()
    assert stopped.value.code == 2
    assert "expected 2, 1 and 2 or more" in capsys.readouterr().err


