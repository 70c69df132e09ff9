"""Running acceptance at each position: what is believed before it is measured, and how soon a turn is noticed."""

from __future__ import annotations

import random
import statistics

import pytest

from mlx_mtp.spec_decode.draft_length import Acceptance

LONGEST = 7


def test_a_position_is_believed_like_the_one_before_it_until_it_is_measured() -> None:
    acceptance = Acceptance(3)
    before = acceptance.expected_tokens()
    assert before == pytest.approx([1, 1.6, 1.96, 2.176])
    for _ in range(60):
        acceptance.observe(2, [1])  # the first always, the second never
    after = acceptance.expected_tokens()
    assert after[1] == pytest.approx(2, abs=0.02)
    assert after[3] - after[1] < 0.2 < before[3] - before[1]


def test_a_turn_is_noticed_soon_though_rounds_of_many_drafts_differ_much() -> None:
    rounds = []
    for seed in range(40):
        generator, acceptance = random.Random(seed), Acceptance(LONGEST)
        for _ in range(100):
            acceptance.observe(LONGEST, [next((i for i in range(LONGEST) if generator.random() >= 0.8), LONGEST)])
        noticed = 0
        while acceptance.rates()[0] >= 0.5:
            acceptance.observe(LONGEST, [0])
            noticed += 1
        rounds.append(noticed)
    assert statistics.mean(rounds) <= 15  # counted by accepted drafts a round it would be 36
