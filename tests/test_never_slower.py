"""The bench of "auto" against every fixed K: its prices, its choice of the best, and one small run."""

from __future__ import annotations

from typing import cast

import pytest

import mlx_mtp
from bench import never_slower
from mlx_mtp import Pair
from mlx_mtp.config import EngineConfig
from mlx_mtp.spec_decode.draft_length import FixedLength


def test_prices_by_halves_share_no_round(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {k: iter([99.0, 1.0 + k, 10.0 + k, 3.0 + k, 12.0 + k]) for k in range(8)}  # the first warms up
    monkeypatch.setattr(never_slower, "PRICED_FOR", 0.0)
    monkeypatch.setattr(never_slower, "round_timer", lambda pair, rows, length, k: lambda: next(blocks[k]))
    prices = never_slower.Prices(cast(Pair, None), 4)
    for _ in range(4 // never_slower.BLOCKS):
        prices.measure()
    assert prices.halves() == ([2.0 + k for k in range(8)], [11.0 + k for k in range(8)])
    assert prices.seconds() == [6.5 + k for k in range(8)]


def test_the_best_fixed_length_has_the_most_expected_tokens_a_second() -> None:
    assert never_slower.best_length(1.0, [1.0, 1.5, 1.9]) == 2
    assert never_slower.best_length(0.5, [1.0, 1.4, 1.9]) == 1
    assert never_slower.best_length(0.0, [1.0, 1.1, 1.2]) == 0


def test_choosing_is_part_of_the_price() -> None:
    seen = never_slower.Seen([0, 1, 1], [1.0, 2.0, 2.0], [9.0] * 3, [0.5, 0.5, 7.0])
    assert seen.speed([1.0, 1.5], 1, 9) == 4 / 4
    clocked = never_slower.Clocked(FixedLength(3))
    assert clocked.longest == clocked.choose(1) == 3
    assert 0 < clocked.seconds < 1


def test_auto_is_set_against_every_fixed_length(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = mlx_mtp.load()
    monkeypatch.setattr(never_slower, "PRICED_FOR", 0.0)
    for name, value in {"ROUNDS": 8, "SETTLED": 3, "PRICED_EVERY": 4, "BLOCKS": 1, "TOKENS": 60}.items():
        monkeypatch.setattr(never_slower, name, value)
    never_slower.compare(pair, 2, 1.0, never_slower.texts(pair, 2))
    line = capsys.readouterr().out
    late, cold = (float(part.split()[0]) for part in (line.split("3 rounds ")[1], line.split("256 tokens ")[1]))
    assert 0.05 < late < 20  # nothing is known of so few rounds but that they were compared
    assert 0.05 < cold < 20
    assert len(line.split("ms by K ")[1].split()) == EngineConfig().max_draft_tokens + 1
