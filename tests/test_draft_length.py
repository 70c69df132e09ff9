"""The draft-length controller in a simulated machine: costs and acceptance are known, so the best K is known too."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest

from bench.simulated import Cost, Machine, best_speed, speed, tokens
from mlx_mtp.spec_decode.draft_length import SOONEST_LOOK, STANDING, AdaptiveLength, FixedLength, _best
from mlx_mtp.spec_decode.round_costs import RoundCosts

LONGEST = 7

COSTS: dict[str, Cost] = {
    "memory-bound": lambda rows, k: 1 + 0.11 * k + 0.01 * rows * k,
    "cheaper than any published": lambda rows, k: 1 + 0.08 * k,
    "every row costs": lambda rows, k: 0.15 + 0.85 * (k + 1) + 0.1 * k,
    "cliff above K = 3": lambda rows, k: 1 + 0.1 * k + 0.6 * (k > 3),
    "experts read again": lambda rows, k: 1 + 0.45 * k,
    "experts read again up to K = 3": lambda rows, k: 1 + 0.45 * min(k, 3) + 0.05 * k,
    "the first draft costs most": lambda rows, k: 1 + 0.35 * (k > 0) + 0.08 * k,
}


SHORT_ROUND = 0.004  # seconds without drafts


def machine(cost: str, rows: int, seed: int, noise: float = 0.05, plain: float = 1.0) -> Machine:
    """plain: seconds of a round without drafts."""
    policy = AdaptiveLength(LONGEST, RoundCosts())
    return Machine(policy, lambda rows, k: plain * COSTS[cost](rows, k), rows, random.Random(seed), noise)


def share_after_64(simulated: Machine, acceptance: float, rounds: int) -> float:
    """Of the best fixed K's speed, in the rounds after the first 64."""
    for _ in range(rounds):
        simulated.round(acceptance)
    found = speed(simulated.chosen[64:], simulated.cost, simulated.rows, acceptance)
    return found / best_speed(simulated.cost, simulated.rows, acceptance, LONGEST)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("cost", COSTS)
def test_after_64_rounds_it_is_hardly_slower_than_the_best_fixed_k(cost: str, rows: int, acceptance: float) -> None:
    shares = [share_after_64(machine(cost, rows, seed), acceptance, 364) for seed in range(6)]
    assert statistics.mean(shares) >= 0.97


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("cost", COSTS)
def test_a_request_of_256_tokens_that_starts_cold_loses_little(cost: str, acceptance: float) -> None:
    shares = []
    for seed in range(100):
        simulated = machine(cost, 1, seed)
        while sum(tokens(acceptance, k) for k in simulated.chosen) < 256:
            simulated.round(acceptance)
        found = speed(simulated.chosen, COSTS[cost], 1, acceptance)
        shares.append(found / best_speed(COSTS[cost], 1, acceptance, LONGEST))
    assert statistics.mean(shares) >= 0.93


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("cost", ["memory-bound", "experts read again"])
@pytest.mark.parametrize("plain", [1.0, SHORT_ROUND])
def test_it_gives_up_within_24_rounds_of_a_turn_and_comes_back_within_64(cost: str, rows: int, plain: float) -> None:
    late_up = late_back = 0
    for seed in range(24):
        simulated = machine(cost, rows, seed, plain=plain)
        for _ in range(100):
            simulated.round(0.95)
        assert statistics.mean(simulated.chosen[-20:]) >= 1
        for _ in range(200):
            simulated.round(0.0)
        given_up = simulated.chosen[100:]
        late_up += not any(given_up[i : i + 3] == [0, 0, 0] for i in range(24))
        assert statistics.mean(given_up[64:]) <= 0.15  # it looks again now and then
        for _ in range(80):
            simulated.round(0.95)
        back = simulated.chosen[300:]
        late_back += not any(min(back[i : i + 3]) >= 1 for i in range(62))
    assert late_up <= 3 * (rows == 1)  # one row: 11 of 300
    assert late_back <= 1  # 2 of 1800


def test_it_comes_back_in_time_wherever_between_two_looks_the_task_turns() -> None:
    late = 0
    for seed in range(450):
        simulated, plain = machine("experts read again", 1, seed), 150 + seed % 60
        for acceptance, rounds in ((0.95, 100), (0.0, plain), (0.95, 64)):
            for _ in range(rounds):
                simulated.round(acceptance)
        back = simulated.chosen[100 + plain :]
        late += not any(min(back[i : i + 3]) >= 1 for i in range(62))
    assert late <= 3


def test_a_look_that_was_right_is_followed_up_soon() -> None:
    # Where one right draft is not enough to draft again: after it a look costs less, as far as is believed.
    for seed in range(5):
        simulated = Machine(AdaptiveLength(LONGEST, RoundCosts()), lambda rows, k: 1 + 0.65 * k, 1, random.Random(seed))
        for _ in range(300):
            simulated.round(0.0)

        def rounds_to_a_look(acceptance: float, simulated: Machine = simulated) -> int:
            return next(i for i in range(1, 100) if simulated.round(acceptance))

        rounds_to_a_look(0.0)
        assert 26 <= rounds_to_a_look(1.0) <= 48  # this one's draft is right
        assert rounds_to_a_look(0.0) <= 20


def test_one_row_is_mostly_back_soon_though_a_look_hears_of_one_draft_only() -> None:
    rounds = []
    for seed in range(60):
        simulated = machine("experts read again", 1, seed)
        for acceptance, count in ((0.8, 100), (0.0, 200), (0.8, 100)):
            for _ in range(count):
                simulated.round(acceptance)
        back = simulated.chosen[300:]
        rounds.append(next((i for i in range(97) if min(back[i : i + 3]) >= 1), 100))
    assert statistics.median(rounds) <= 30
    assert sum(each > 61 for each in rounds) <= 9


def test_disturbed_timings_do_not_park_it_at_a_bad_k() -> None:
    simulated = machine("memory-bound", 1, 0, noise=0.3)
    for _ in range(400):
        simulated.round(0.8)
    best = best_speed(COSTS["memory-bound"], 1, 0.8, LONGEST)
    assert speed(simulated.chosen[64:], COSTS["memory-bound"], 1, 0.8) >= 0.93 * best


@pytest.mark.parametrize("cost", ["every row costs", "experts read again", "experts read again up to K = 3"])
def test_a_host_that_reads_late_misleads_it_little(cost: str) -> None:
    shares = [share_after_64(replace(machine(cost, 1, seed), late=0.25), acceptance, 264)
              for acceptance in (0.4, 0.5, 0.6) for seed in range(8)]
    assert statistics.mean(shares) >= 0.98


@pytest.mark.parametrize("acceptance", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("cost", COSTS)
def test_a_machine_whose_pace_wanders_misleads_it_little(cost: str, acceptance: float) -> None:
    shares = [share_after_64(replace(machine(cost, 4, seed), wandering=0.15), acceptance, 164) for seed in range(8)]
    assert statistics.mean(shares) >= 0.97


@pytest.mark.parametrize("cost", ["memory-bound", "cheaper than any published", "experts read again"])
def test_a_machine_that_others_use_now_and_then_misleads_it_little(cost: str) -> None:
    shares = []
    for seed, acceptance in product(range(10), (0.4, 0.6, 0.8)):
        simulated, is_shared = machine(cost, 4, seed), False
        others = random.Random(seed + 1000)
        for _ in range(164):
            is_shared ^= others.random() < 0.25
            simulated.pace = math.log(1.7) / 0.9 if is_shared else 0.0
            simulated.round(acceptance)
        found = speed(simulated.chosen[64:], simulated.cost, 4, acceptance)
        shares.append(found / best_speed(simulated.cost, 4, acceptance, LONGEST))
    assert statistics.mean(shares) >= 0.985


def test_of_ks_that_promise_the_same_the_one_in_use_is_kept() -> None:
    tokens, seconds = [1.0, 1.9], [1.0, 1.89]
    assert [_best(tokens, seconds, in_use) for in_use in (None, 0, 1, 5)] == [1, 0, 1, 1]
    assert _best(tokens, [1.0, 1.85], 0) == 1
    changes = [0, 0]
    for seed in range(10):
        simulated = machine("memory-bound", 4, seed)
        for _ in range(300):
            simulated.round(0.8)
        late = simulated.chosen[100:]
        changes[0] += sum(k != before for before, k in pairwise(late))
        changes[1] += len(late)
    assert changes[0] <= 0.3 * changes[1]  # else every other round


def test_what_was_heard_before_a_new_task_counts_for_as_little_as_what_was_learnt() -> None:
    rates = []
    for is_learnt in (False, True):
        policy = AdaptiveLength(LONGEST, RoundCosts())
        for _ in range(20):
            policy.observe(4, LONGEST, [0, 0, 0, 0])
        if is_learnt:
            policy.choose(4)
        policy.new_task()
        policy.observe(4, LONGEST, [1, 0, 0, 0])  # no surprise, which would loosen it again
        policy._stands = 0
        policy.choose(4)
        rates.append(policy._acceptance.rates())
    assert rates[0] == rates[1]


def test_a_choice_that_was_made_often_stands_for_some_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = machine("memory-bound", 4, 0)
    policy, draws, drawn = simulated.policy, 0, simulated.policy._costs.drawn

    def counted(rows: int, longest: int, wanted: int, generator: random.Random) -> list[float]:
        nonlocal draws
        draws += 1
        return drawn(rows, longest, wanted, generator)

    for _ in range(100):
        simulated.round(1.0)
    monkeypatch.setattr(policy._costs, "drawn", counted)
    for _ in range(100):
        simulated.round(1.0)
    assert draws <= 40
    while policy._stands < 2:
        simulated.round(1.0)
    draws, rates = 0, policy._acceptance.rates()
    policy.observe(4, LONGEST, [0, 0, 0, 0])
    for _ in range(policy._stands):
        policy.choose(4)
    assert draws == 0
    assert policy._acceptance.rates() == rates  # heard, and learnt from when it makes a difference
    assert policy._countdown == SOONEST_LOOK  # to a look, while plain decoding stands
    policy.choose(4)
    assert draws == 1
    assert policy._acceptance.rates() < rates


def test_costs_outlive_a_request_so_that_the_next_need_not_try_plain_decoding() -> None:
    costs = RoundCosts()
    first = Machine(AdaptiveLength(LONGEST, costs), COSTS["memory-bound"], 1, random.Random(0))
    for _ in range(100):
        first.round(1.0)
    assert first.chosen.count(0) >= 2
    second = Machine(AdaptiveLength(LONGEST, costs), COSTS["memory-bound"], 1, random.Random(1))
    for _ in range(20):
        second.round(1.0)
    assert 0 not in second.chosen
    assert min(second.chosen[3:6]) >= 5


def test_what_was_accepted_before_is_what_a_new_engine_begins_with() -> None:
    begun: dict[float, list[int]] = {0.1: [], 0.9: []}
    for acceptance, first in begun.items():
        for seed in range(6):
            costs = RoundCosts()
            machine = Machine(AdaptiveLength(LONGEST, costs), COSTS["memory-bound"], 4, random.Random(seed))
            for _ in range(400):
                machine.round(acceptance)
            assert abs(costs.usual_acceptance - acceptance) < 0.15
            policy = AdaptiveLength(LONGEST, costs)
            first += [policy.choose(4) for _ in range(20)]
    assert statistics.mean(begun[0.1]) <= 1 < 5 <= statistics.mean(begun[0.9])


def test_what_plain_decoding_would_take_is_not_told_before_it_was_timed() -> None:
    costs = RoundCosts()
    policy = AdaptiveLength(LONGEST, costs)
    for k, seconds in ((3, None), (3, 1.5), (0, None)):
        policy.observe_seconds(1, k, seconds)
    assert policy.plain_seconds({1: 10}) is None
    policy.observe_seconds(1, 0, 1.0)
    assert policy.plain_seconds({1: 10}) == pytest.approx(10.0, rel=0.01)


def test_a_first_round_of_its_kind_cannot_be_timed_so_it_is_run_again() -> None:
    simulated = machine("cliff above K = 3", 4, 0)
    for _ in range(200):
        simulated.round(0.8)
    firsts = {k: simulated.chosen.index(k) for k in simulated.chosen}
    assert len(firsts) > 3
    assert all(simulated.chosen[i + 1] == k for k, i in firsts.items())


def test_a_round_is_run_again_only_at_its_own_width() -> None:
    policy = AdaptiveLength(LONGEST, RoundCosts())
    assert policy.choose(4) == 1  # nothing is known
    policy.observe(4, 1, [0] * 4)
    policy.observe_seconds(4, 1, None)
    policy._chosen, policy._stands = (4, 5), 1  # as if five drafts had just been tried
    assert policy.choose(3) == 1
    policy._chosen, policy._stands = (4, 5), 1
    assert policy.choose(4) == 5


def test_where_plain_decoding_is_best_a_new_task_is_tried_with_a_draft_soon() -> None:
    tried = {False: 0, True: 0}
    for seed, is_new in product(range(4), tried):
        simulated = machine("experts read again", 4, seed)
        for _ in range(40):
            for _ in range(50):
                simulated.round(0.0)
            if is_new:
                simulated.policy.new_task()
            begun = len(simulated.chosen)
            for _ in range(6):
                simulated.round(0.0)
            tried[is_new] += any(simulated.chosen[begun:])
    assert tried[True] >= 150 > 50 >= tried[False]  # of 160


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 0.8])
def test_where_rounds_are_short_ks_are_weighed_less_often_and_as_well(acceptance: float) -> None:
    weighed, shares = {1.0: 0, SHORT_ROUND: 0}, []
    for plain, seed in product(weighed, range(6)):
        simulated = machine("memory-bound", 4, seed, plain=plain)
        drawn = simulated.policy._costs.drawn

        def counted(*given: Any, plain: float = plain, drawn: Callable[..., list[float]] = drawn) -> list[float]:
            weighed[plain] += 1
            return drawn(*given)

        simulated.policy._costs.drawn = counted  # type: ignore[method-assign]
        shares.append(share_after_64(simulated, acceptance, 364))
    assert weighed[SHORT_ROUND] <= 0.8 * weighed[1.0]
    assert statistics.mean(shares[6:]) >= 0.97


def test_a_k_never_stands_for_long_however_short_rounds_seem() -> None:
    simulated = machine("memory-bound", 4, 0, plain=1e-6)
    stood = []
    for _ in range(100):
        simulated.round(1.0)
        stood.append(simulated.policy._stands)
    assert max(stood) == STANDING


def test_where_plain_decoding_is_best_nothing_is_weighed_until_the_next_look() -> None:
    for seed in range(5):
        simulated = machine("experts read again", 4, seed)
        for _ in range(300):
            simulated.round(0.0)
        costs, asked = simulated.policy._costs, []
        drawn = costs.drawn
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(costs, "drawn", lambda *given, drawn=drawn, asked=asked: asked.append(1) or drawn(*given))
            looks = sum(simulated.round(0.0) > 0 for _ in range(300))
        assert 5 <= looks <= 12
        assert len(asked) <= 8 * looks


def test_rows_that_leave_while_plain_decoding_is_best_cost_no_look_each() -> None:
    for seed in range(3):
        simulated = machine("experts read again", 8, seed)
        for rows in [*range(1, 9), *range(8, 0, -1)] * 6:  # every width is known, and joins make no new task here
            simulated.rows = rows
            for _ in range(10):
                simulated.round(0.0)
        looks = 0
        for rows in [8, 7, 6, 5, 4, 3, 2, 1] * 4:
            simulated.rows = rows
            looks += sum(simulated.round(0.0) > 0 for _ in range(10))
        assert looks <= 16  # 320 rounds


def test_plain_decoding_is_tried_until_it_was_timed() -> None:
    costs = RoundCosts()
    policy = AdaptiveLength(LONGEST, costs)
    for _ in range(100):
        k = policy.choose(1)
        policy.observe(1, k, [k])
        policy.observe_seconds(1, k, 1 + 0.1 * k if k else None)  # the rounds without drafts are disturbed
    assert not costs.knows_plain
    policy._countdown = 0  # as after other rows
    assert [policy.choose(1) for _ in range(10)] == [0] * 10
    policy.observe_seconds(1, 0, 1.0)
    assert max(policy.choose(1) for _ in range(10)) > 0


def test_a_fixed_length_stays_what_it_is() -> None:
    fixed = FixedLength(3)
    fixed.observe(1, 3, [0])
    fixed.observe_seconds(1, 3, 1.0)
    fixed.new_task()
    assert (fixed.choose(1), fixed.choose(8), fixed.longest) == (3, 3, 3)
    assert fixed.plain_seconds({1: 10}) is None
