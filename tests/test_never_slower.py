"""The bench of "auto" against every fixed K: its prices, its choice of the best, and one small run."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

import mlx_mtp
from bench import never_slower
from bench.replay import ReplayDrafter
from mlx_mtp.config import EngineConfig
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.spec_decode.draft_length import AdaptiveLength, FixedLength
from mlx_mtp.spec_decode.round_costs import RoundCosts


def test_where_a_text_took_another_turn_no_draft_is_right_any_more() -> None:
    prompt = [0] * never_slower.PROMPT
    found = never_slower.as_known([[5, 6, 8, 8], [5, 6, 7]], [[*prompt, 5, 6, 7, 8, 9]] * 2)
    assert found.shape == (2, never_slower.TOKENS)
    assert found[0, :4].tolist() == [True, True, False, False]
    assert not found[0, 2:].any()
    assert found[1].all()


def test_prices_by_halves_share_no_pass() -> None:
    prices = never_slower.Prices()
    for slower in (1.0, 10.0, 2.0, 20.0):
        prices.passes.append([slower * (1 + k) for k in range(8)])
    first, second = prices.halves()
    assert first == pytest.approx([2**0.5 * (1 + k) for k in range(8)])
    assert second == pytest.approx([200**0.5 * (1 + k) for k in range(8)])


def test_a_price_is_misled_neither_by_the_pace_of_a_pass_nor_by_a_disturbance() -> None:
    prices, generator = never_slower.Prices(), np.random.default_rng(0)
    costs = 1 + 0.2 * np.arange(8)
    for _ in range(9):
        seconds = costs * generator.uniform(1, 3)
        seconds[generator.integers(8)] *= 2.5
        prices.passes.append(seconds.tolist())
    found = np.array(prices.seconds())
    assert found / found[0] == pytest.approx(costs, rel=1e-6)


def test_a_k_without_a_turn_in_a_pass_is_priced_by_the_others() -> None:
    """Passes over some Ks only, each at its own pace: all tell of the ratios between those."""
    true, paces = np.array([1.0, 1.4, 2.0]), (1.0, 1.1, 0.9, 1.3, 1.0)
    passes = [[float(pace * each) for each in true] for pace in paces]
    for each in passes[2:]:
        each[1] = math.nan
    found = never_slower.Prices(passes).seconds()
    assert np.allclose(np.array(found) / found[0], true)


def test_the_time_goes_to_the_ks_that_may_be_the_best_and_to_those_that_were_chosen_often() -> None:
    def seen(*lengths: int) -> never_slower.Seen:
        return never_slower.Seen([*lengths], [0.0] * len(lengths), [0.0] * len(lengths), np.zeros((1, 1), bool))

    prices = never_slower.Prices([[1.0, 1.3, 2.0, 4.0]])  # 1, 1.15, 0.95 and 0.56 tokens a second
    tokens = [1.0, 1.5, 1.9, 2.25]
    assert never_slower.worth_pricing([seen(*[1] * 99, 3)], [tokens], prices) == [0, 1, 2]
    assert never_slower.worth_pricing([seen(*[1] * 9, 3), seen(*[1] * 90)], [tokens] * 2, prices) == [0, 1, 2, 3]


def test_measured_again_each_pass_has_the_same_turns() -> None:
    passes = [[1.0, 2.0], [1.5, 2.5], [3.0, math.nan], [4.0, math.nan], [5.0, math.nan]]
    again = [never_slower.Prices(passes).resampled(random.Random(seed)).passes for seed in range(20)]
    for drawn in again:
        assert all(each in passes[:2] for each in drawn[:2])
        assert all(each in passes[2:] for each in drawn[2:])
    assert any(drawn[0] == drawn[1] for drawn in again)


def test_the_best_fixed_length_has_the_most_tokens_a_second() -> None:
    assert never_slower.best_length([1.0, 2.0, 3.0], [1.0, 1.5, 1.9]) == 2
    assert never_slower.best_length([1.0, 1.5, 1.75], [1.0, 1.4, 1.9]) == 1
    assert never_slower.best_length([1.0, 1.0, 1.0], [1.0, 1.1, 1.2]) == 0


def test_a_round_brings_what_is_right_until_the_first_that_is_wrong() -> None:
    right = np.array([[True, True, False, True], [True, False, True, True]])
    everywhere = np.ones_like(right)
    assert never_slower.brought(right, everywhere, 2) == [1.0, 1 + 6 / 8, 1 + 6 / 8 + 2 / 6]
    decoded = np.array([[True, True, False, False], [False, False, True, False]])
    assert never_slower.brought(right, decoded, 2) == [1.0, 2.0, 2 + 2 / 3]
    assert never_slower.brought(np.ones((1, 9), bool), np.ones((1, 9), bool), 7) == [float(k + 1) for k in range(8)]


def test_choosing_is_part_of_the_price() -> None:
    seen = never_slower.Seen([2, 0, 1, 1], [9.0] * 4, [7.0, 0.5, 0.5, 7.0], np.zeros((1, 1), bool))
    assert seen.tokens([1.0, 1.8], 1, 9) == 1 + 2 * 1.8
    assert seen.price([1.0, 1.5], 1, 9) == 1.0 + 2 * 1.5 + 3 * 0.5  # the longest is left out: something disturbed it
    often = never_slower.Seen([1] * 40, [9.0] * 40, [2.0, 0.0, 0.0, 0.0] * 10, np.zeros((1, 1), bool))
    assert often.price([1.0, 1.0], 0, 40) == pytest.approx(40 + 40 * 16 / 38)  # one in four has to be paid for


def test_auto_is_compared_with_the_k_that_other_prices_say_is_best() -> None:
    seen = never_slower.Seen([1] * 200, [0.0] * 200, [0.0] * 200, np.zeros((1, 1), bool))
    found = never_slower.shares(seen, [1.0, 1.5], [1.0, 1.1], [1.0, 2.0])
    assert found == never_slower.Shares(1.0, 1.0)
    assert never_slower.shares(seen, [1.0, 1.5], [1.0, 1.9], [1.0, 2.0]).late == 0.75


def test_of_several_runs_the_one_in_the_median_is_told_and_the_worst() -> None:
    assert never_slower._told([0.9, 1.0, 0.8], 0.02, [0.7, 0.6, 0.5]) == "0.900 ± 0.020 (worst 0.800, luckiest 0.600)"


def test_each_half_of_the_prices_is_asked_once_for_the_best_and_once_for_costs() -> None:
    """K = 1 ran, after SETTLED rounds K = 0: the halves disagree about which is better, in each one's favour."""
    lengths = [1] * never_slower.SETTLED + [0] * (never_slower.ROUNDS - never_slower.SETTLED)
    seen = never_slower.Seen(lengths, [0.0] * len(lengths), [0.0] * len(lengths), np.zeros((1, 1), bool))
    prices = never_slower.Prices([[1.0, 1.2], [1.0, 3.0]] * 2)
    (found,) = never_slower.crossed([seen], [[1.0, 1.5]], prices)
    by_halves = [never_slower.shares(seen, [1.0, 1.5], *by) for by in (prices.halves(), prices.halves()[::-1])]
    assert found.late == pytest.approx((by_halves[0].late + by_halves[1].late) / 2)
    assert found.cold == pytest.approx((by_halves[0].cold + by_halves[1].cold) / 2)
    assert found.late != pytest.approx(found.cold)


def test_a_standard_error_is_that_of_the_prices() -> None:
    """One run of K = 1 alone, where K = 0 is the best: its share is a ratio of two prices."""
    every = [never_slower.Seen([1] * 200, [0.0] * 200, [0.0] * 200, np.zeros((1, 1), bool))]
    generator = np.random.default_rng(0)
    for noise in (0.0, 0.1):
        passes = [[float(np.exp(noise * generator.normal())), 2.0] for _ in range(40)]
        errors = never_slower.standard_errors(every, [[1.0, 1.5]], never_slower.Prices(passes))
        expected = 0.75 * 1.25 * noise / 40**0.5  # medians are a quarter less sure than means
        assert expected / 1.6 <= errors.late == errors.cold <= 1.6 * expected


def test_what_is_spent_in_a_controller_is_clocked() -> None:
    clocked = never_slower.Clocked(FixedLength(3))
    assert clocked.longest == clocked.choose(1) == 3
    assert 0 < clocked.seconds < 1


def test_auto_is_set_against_every_fixed_length(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = mlx_mtp.load()
    monkeypatch.setattr(never_slower, "PRICED_FOR", 0.0)
    for name, value in {"ROUNDS": 8, "SETTLED": 3, "PRICED_EVERY": 4, "PASSES": 2, "TOKENS": 800}.items():
        monkeypatch.setattr(never_slower, name, value)
    given: list[np.ndarray] = []

    class Noting(ReplayDrafter):
        def __init__(self, drafter: Drafter, drafts: np.ndarray) -> None:
            super().__init__(drafter, drafts)
            given.append(drafts)

    seeds: list[int] = []

    def noted(longest: int, costs: RoundCosts, seed: int) -> AdaptiveLength:
        seeds.append(seed)
        return AdaptiveLength(longest, costs, seed)

    rights: list[np.ndarray] = []

    def brought(right: np.ndarray, decoded: np.ndarray, longest: int) -> list[float]:
        rights.append(right)
        return real(right, decoded, longest)

    real, turn = never_slower.brought, np.arange(800) < 700
    monkeypatch.setattr(never_slower, "brought", brought)
    monkeypatch.setattr(never_slower, "as_known", lambda tokens, known: np.tile(turn, (len(known), 1)))
    monkeypatch.setattr(never_slower, "ReplayDrafter", Noting)
    monkeypatch.setattr(never_slower, "AdaptiveLength", noted)
    never_slower.compare(pair, 2, 0.5, never_slower.texts(pair, 2, 800), runs=2)
    assert len(given) == 2
    assert len({AdaptiveLength(7, RoundCosts(), seed)._random.random() for seed in seeds}) == 2, "likewise of draws"
    assert (given[0] != given[1]).mean() > 0.25, "the runs share their luck"
    assert all(right[:, :700].any() and not right[:, 700:].any() for right in rights), "none behind a turn"
    line = capsys.readouterr().out
    late, cold = (float(part.split()[0]) for part in (line.split("3 rounds ")[1], line.split("256 tokens ")[1]))
    assert 0.05 < late < 20  # nothing is known of so few rounds but that they were compared
    assert 0.05 < cold < 20
    assert len(line.split("ms by K ")[1].split()) == EngineConfig().max_draft_tokens + 1
