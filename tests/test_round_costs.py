"""Costs of rounds from noisy timings: what is estimated, in how much doubt, and that disturbances pass."""

from __future__ import annotations

import json
from random import Random

import numpy as np
import pytest

from mlx_mtp.spec_decode import round_costs
from mlx_mtp.spec_decode.round_costs import LEARN_EVERY, NOISE, PACE_DOUBT, WALK, RoundCosts

LONGEST = 7


def timed(costs: RoundCosts, k: int, *seconds: float, rows: int = 1) -> None:
    costs.observe(rows, k, None, LONGEST)  # the first of its kind is never believed
    for each in seconds:
        costs.observe(rows, k, each, LONGEST)


def seconds_of(costs: RoundCosts, rows: int, longest: int) -> np.ndarray:
    return np.array(costs.seconds(rows, longest))


def doubt(costs: RoundCosts, k: int, rows: int = 1) -> float:
    """Of log seconds beyond those of K = 0, as drawn."""
    random = Random(0)
    drawn = np.log([costs.drawn(rows, LONGEST, LONGEST, random) for _ in range(400)])
    return float(np.std(drawn[:, k] - drawn[:, 0]))


def test_estimates_are_those_of_a_gaussian_process_conditioned_on_every_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter goes timing by timing; here all of them at once, from the covariance of everything with everything."""
    monkeypatch.setattr(round_costs, "LIFETIME", np.inf)
    monkeypatch.setattr(round_costs, "MOST_OFF", np.inf)
    monkeypatch.setattr(round_costs, "LATE", 0.0)  # it makes the model a product, so that no Gaussian is exact
    monkeypatch.setattr(round_costs, "LATE_DOUBT", 0.0)
    generator = np.random.default_rng(1)
    ks = generator.integers(0, LONGEST + 1, 30)
    logs = np.log(1 + 0.3 * ks) + 0.05 * generator.standard_normal(30)
    costs = RoundCosts()
    for k in set(ks.tolist()):
        costs.observe(1, k, None, LONGEST)
    for k, log in zip(ks.tolist(), logs.tolist(), strict=True):
        costs.observe(1, k, float(np.exp(log)), LONGEST)

    drafts = np.arange(LONGEST + 1)
    line = 1 + round_costs.USUAL_STEP * drafts
    bumps = np.array([round_costs.FIRST_BUMP_DOUBT**2, *[round_costs.BUMP_DOUBT**2] * (LONGEST - 1)])
    shared_bumps = np.array([[bumps[: min(i, j)].sum() for j in drafts] for i in drafts])
    prior = shared_bumps + round_costs.SLOPE_DOUBT**2 * np.outer(drafts / line, drafts / line)
    steps = np.arange(1, 31)
    pace = PACE_DOUBT**2 + WALK**2 * np.minimum.outer(steps, steps)
    seen = pace + prior[np.ix_(ks, ks)] + NOISE**2 * np.eye(30)
    shared = prior[:, ks] + pace[-1]
    expected = np.log(line) + shared @ np.linalg.solve(seen, logs - np.log(line)[ks])
    assert np.log(seconds_of(costs, 1, LONGEST)) == pytest.approx(expected, abs=1e-6)


def test_an_unknown_cost_is_drawn_along_the_usual_line_until_more_is_known() -> None:
    costs = RoundCosts()
    assert not costs.is_known
    costs.observe(1, 3, 9.9, LONGEST)
    assert not costs.is_known  # the first of its kind
    costs.observe(1, 3, 1.6, LONGEST)
    assert costs.is_known
    assert seconds_of(costs, 1, 3) == pytest.approx([1.0, 1.2, 1.4, 1.6], rel=0.01)


def test_two_steep_costs_make_those_between_and_beyond_them_steep() -> None:
    costs = RoundCosts()
    for _ in range(4):
        timed(costs, 1, 2.0)
        timed(costs, 4, 5.0)
    seconds = seconds_of(costs, 1, LONGEST)
    assert seconds[[1, 4]] == pytest.approx([2.0, 5.0], rel=0.05)
    assert 2.3 < seconds[2] < seconds[3] < 4.6
    assert seconds[0] < 1.6  # the usual step alone would make it 1.67
    assert seconds[6] > 5.9


@pytest.mark.parametrize("late", [0.0, 0.25])
def test_the_end_of_a_round_that_is_in_the_time_of_the_next_is_not_thought_its_own(late: float) -> None:
    costs, generator = RoundCosts(), Random(0)
    kinds = {0: 1.0, 1: 1.5, 3: 2.0}
    for k in kinds:
        timed(costs, k)
    before = 3
    for _ in range(100):
        k = generator.choice([0, 1, 3])
        costs.observe(1, k, kinds[k] ** (1 - late) * kinds[before] ** late * (1 + 0.05 * generator.random()), LONGEST)
        before = k
    seconds = seconds_of(costs, 1, 3)
    assert seconds[[1, 3]] / seconds[0] == pytest.approx([1.5, 2.0], rel=0.05)  # as they were timed: 1.36, 1.68


def test_rounds_of_other_rows_are_not_in_the_time_of_the_next() -> None:
    costs = RoundCosts()
    for _ in range(60):  # a machine that reads a quarter late
        for k, seconds in ((0, 2.0**0.25), (0, 1.0), (3, 2.0**0.75), (3, 2.0)):
            costs.observe(1, k, seconds, LONGEST)
    for _ in range(30):
        costs.observe(4, 7, 9.0, LONGEST)
        costs.observe(1, 0, 1.0, LONGEST)
    assert seconds_of(costs, 1, 3)[[0, 3]] == pytest.approx([1.0, 2.0], rel=0.04)


def test_a_machine_that_slows_down_does_not_make_the_k_that_ran_look_dear() -> None:
    costs = RoundCosts()
    for _ in range(6):
        timed(costs, 0, 1.0)
        timed(costs, 3, 1.5)
    for _ in range(60):
        timed(costs, 3, 1.5 * 1.4)
    plain, *_, drafted = seconds_of(costs, 1, 3)
    assert drafted == pytest.approx(1.5 * 1.4, rel=0.01)
    assert drafted / plain == pytest.approx(1.5, rel=0.03)


@pytest.mark.parametrize("times", [3, 30])
def test_a_disturbance_passes_and_a_lasting_change_is_believed(times: int) -> None:
    costs = RoundCosts()
    for _ in range(6):
        timed(costs, 0, 1.0)
        timed(costs, 3, 1.5)
    timed(costs, 3, 1.5 * times, 1.5, 1.5)
    assert seconds_of(costs, 1, 3)[[0, 3]] == pytest.approx([1.0, 1.5], rel=0.08)
    timed(costs, 3, *[1.5 * times] * 3 * LEARN_EVERY)
    assert seconds_of(costs, 1, 3)[[0, 3]] == pytest.approx([1.0 * times, 1.5 * times], rel=0.15)


@pytest.mark.parametrize("slower", [1.3, 1.7, 2.5])
def test_a_pace_that_jumps_just_when_k_changes_is_not_thought_its_cost(slower: float) -> None:
    costs = RoundCosts()
    for _ in range(6):
        timed(costs, 0, 1.0)
        timed(costs, 3, 1.5)
    timed(costs, 0, 1.0 * slower)
    plain, *_, drafted = seconds_of(costs, 1, 3)
    assert plain == pytest.approx(slower, rel=0.1)
    assert drafted / plain == pytest.approx(1.5, rel=0.03)


def test_a_draft_is_never_thought_free_though_plain_decoding_was_disturbed() -> None:
    costs = RoundCosts()
    timed(costs, 1, *[1.45] * 8)
    timed(costs, 0, 1.7)  # of one round, while others used the machine
    timed(costs, 1, *[1.45] * 8)
    plain, drafted = seconds_of(costs, 1, 1)
    assert drafted > 1.02 * plain


def test_a_first_timing_that_was_disturbed_is_forgotten_soon() -> None:
    costs = RoundCosts()
    timed(costs, 3, 6.0, 1.5, 1.5, 1.5)
    assert seconds_of(costs, 1, 3) == pytest.approx([1.5 / 1.6 * each for each in (1.0, 1.2, 1.4, 1.6)], rel=0.1)


def test_a_run_is_compared_with_the_next_by_its_end() -> None:
    costs = RoundCosts()
    for _ in range(8):
        timed(costs, 0, 1.0)
        timed(costs, 3, 1.5)
    timed(costs, 0, *[1.0] * 24, *[1.6] * 9)  # the machine slows down in between
    timed(costs, 3, 1.5 * 1.6)
    plain, *_, drafted = seconds_of(costs, 1, 3)
    assert drafted / plain == pytest.approx(1.5, rel=0.01)


def test_what_is_left_of_a_run_is_learnt_though_the_next_engine_asks_for_other_drafts() -> None:
    for longest, rows in ((2, 1), (7, 4)):
        costs = RoundCosts()
        for _ in range(1 + 41):
            costs.observe(1, 3, 2.0, 3)
        costs.observe(rows, 0, None, longest)
        assert costs.timings(1) == 41


def test_the_first_timing_of_a_long_run_is_learnt_from() -> None:
    costs = RoundCosts()
    for _ in range(12):
        costs.observe(1, 7, None, 7)
    costs.observe(1, 7, 2.0, 7)
    assert costs.seconds(1, 7)[7] == pytest.approx(2.0, rel=0.01)


def test_doubt_falls_with_every_timing_and_most_for_the_k_that_was_timed() -> None:
    costs = RoundCosts()
    timed(costs, 0, 1.0)
    before = [doubt(costs, k) for k in (2, 3, 7)]
    assert before[0] < before[1] < before[2]
    for _ in range(10):
        timed(costs, 3, 1.5)
        timed(costs, 0, 1.0)
    after = [doubt(costs, k) for k in (2, 3, 7)]
    assert after[1] < after[0] < after[2]
    assert after[1] < 0.03 < 0.1 < after[2]
    assert all(now < then for now, then in zip(after, before, strict=True))


def test_what_was_not_timed_for_long_comes_into_doubt_again() -> None:
    costs = RoundCosts()
    for _ in range(10):
        timed(costs, 7, 2.0)
        timed(costs, 0, 1.0)
    before = doubt(costs, 7)
    timed(costs, 0, *[1.0] * 2000)
    assert doubt(costs, 7) > 3 * before


def test_drawn_costs_never_fall_with_more_drafts() -> None:
    costs = RoundCosts()
    for _ in range(5):
        timed(costs, 2, 1.5)
        timed(costs, 3, 1.3)  # disturbed, or not: nobody may count on it
    random = Random(0)
    for _ in range(50):
        assert (np.diff(costs.drawn(1, LONGEST, LONGEST, random)) >= 0).all()


def test_a_known_cliff_is_feared_until_it_is_measured() -> None:
    plain, feared = RoundCosts(), RoundCosts(widest_block=4)
    for costs in (plain, feared):
        for _ in range(3):
            timed(costs, 0, 1.0)
            timed(costs, 3, 1.3)
    assert seconds_of(feared, 1, 4)[:4] == pytest.approx(seconds_of(plain, 1, 4)[:4], rel=0.02)
    assert seconds_of(feared, 1, 4)[4] == pytest.approx(1.28 * seconds_of(plain, 1, 4)[4], rel=0.03)
    assert RoundCosts(widest_block=8).seconds(1, LONGEST) == pytest.approx(RoundCosts().seconds(1, LONGEST))
    for _ in range(3):
        timed(feared, 4, 1.41)
        timed(feared, 3, 1.3)
    assert seconds_of(feared, 1, 5)[4] == pytest.approx(1.41, rel=0.03)


def test_a_new_width_begins_with_the_costs_of_the_nearest_one_at_its_own_pace() -> None:
    costs = RoundCosts()
    for _ in range(5):
        for k, seconds in ((0, 1.0), (3, 3.0), (7, 6.0)):
            timed(costs, k, seconds, rows=4)
            timed(costs, k, 1 + 0.01 * k, rows=1)
    timed(costs, 0, 2.0, rows=6)
    assert seconds_of(costs, 6, LONGEST)[[0, 3, 7]] == pytest.approx([2.0, 6.0, 12.0], rel=0.15)
    assert doubt(costs, 7, rows=6) > 2 * doubt(costs, 7, rows=4)


def test_more_drafts_than_were_asked_for_before_keep_what_is_known() -> None:
    costs = RoundCosts()
    for _ in range(5):
        for k, seconds in ((0, 1.0), (2, 2.0)):
            costs.observe(1, k, seconds, 2)
    before = seconds_of(costs, 1, 2)
    assert seconds_of(costs, 1, 5).shape == (6,)
    assert seconds_of(costs, 1, 5)[:3] == pytest.approx(before, rel=0.05)
    assert seconds_of(costs, 1, 2) == pytest.approx(before, rel=0.05)


def test_costs_survive_being_written_and_read_and_nonsense_in_their_place() -> None:
    costs = RoundCosts()
    for _ in range(10):
        for k, seconds in ((0, 1.0), (0, 1.0), (3, 2.0), (3, 2.0)):
            costs.observe(2, k, seconds, LONGEST)
    timed(costs, 5, 3.0, rows=2)  # timed once: not well enough
    kept = json.loads(json.dumps(costs.to_json()))
    assert kept == {"2": {"0": pytest.approx(1.0, rel=0.06), "3": pytest.approx(2.0, rel=0.06)}}
    again = RoundCosts()
    assert not again.knows_plain
    again.restore({**kept, "x": {"0": 1.0}, "1": 7, "4": {"y": 1.0, "0": "fast", "1": -1.0, "2": 1e308, "3": 1e-308}})
    assert again.knows_plain
    assert again.timings(2) == 0
    assert again.to_json() == {}  # nothing measured in this process
    assert seconds_of(again, 2, 3)[[0, 3]] == pytest.approx([1.0, 2.0], rel=0.05)
    assert seconds_of(again, 4, 3)[[0, 3]] == pytest.approx([1.0, 2.0], rel=0.05)  # no timing of it was fit to keep
    timed(again, 3, 20.0, rows=2)  # the machine is slower today
    assert seconds_of(again, 2, 3)[[0, 3]] == pytest.approx([10.0, 20.0], rel=0.05)


def test_kept_costs_that_nobody_would_guess_are_believed() -> None:
    costs = RoundCosts()
    costs.restore({"1": {"0": 1.0, "1": 2.0, "7": 9.0}})
    assert seconds_of(costs, 1, LONGEST)[[0, 1, 7]] == pytest.approx([1.0, 2.0, 9.0], rel=0.1)


def test_a_single_long_run_is_kept() -> None:
    costs = RoundCosts()
    timed(costs, 4, *[2.0] * 8)  # of these, two were learned from when they came
    assert costs.to_json()["1"] == {"4": pytest.approx(2.0, rel=0.02)}
